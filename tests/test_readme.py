"""The README's commands run, at smoke scale, in the order in which it gives them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands():
    """Every `forget` line of the README's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ forget")]


def test_every_forget_command_of_the_readme_runs(tmp_path):
    (tmp_path / "notes.txt").write_text("".join(f"{i}. A note about the number {i}, and about {i * i}.\n" for i in range(4000)))
    assert len(commands()) >= 5
    for line in commands():
        command = [sys.executable, "-m", "mlx_forget", *shlex.split(line, comments=True)[1:]]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert result.returncode == 0, f"{line}\n{result.stderr}"


def test_the_readme_names_the_makefiles_targets():
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z0-9-]+)", (ROOT / "README.md").read_text()))
    assert {"reproduce-figure1", "test"} <= named <= targets
