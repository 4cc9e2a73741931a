"""The README and the documentation do what they say: every command and every block of Python runs, at smoke scale."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_forget.cli import load_command
from tests.run_page import Command, Script, missing, perform, steps
from tests.small_checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_that_run(page):
    return [step for step in steps(page.read_text(encoding="utf-8")) if isinstance(step, Command | Script)]


@pytest.fixture
def folder(tmp_path):
    """What a reader has: some text, some conversations, a checkpoint in Hugging Face form, a table of runs, and the published ones."""
    pytest.importorskip("transformers")
    (tmp_path / "data").symlink_to(ROOT / "data")
    write_checkpoint(tmp_path / "my-model")
    (tmp_path / "notes.txt").write_text("".join(f"{i}. A note about the number {i}, and about {i * i}.\n" for i in range(4000)))
    rows = ({"prompt": f"What is {i} plus {i}?", "completion": f"{i} plus {i} is {2 * i}."} for i in range(3000))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = [(n, d, p) for n in (1.1e8, 3.3e8, 1.3e9) for d in (3e5, 3e6) for p in (0, 0.005, 0.01, 0.05)]
    lost = {"code": 300, "math": 700}
    runs = ((n, d, p, 20 * d**0.3 / ((1 + b * p) * n) ** 0.42, domain) for domain, b in lost.items() for n, d, p in grid)
    table = "".join(
        f"{n:g},{d:g},{p},3.05,{3.05 + forgot * (1 + 1e-3 * (i % 7)):.5f},{domain}\n"
        for i, (n, d, p, forgot, domain) in enumerate(runs)
    )
    (tmp_path / "table.csv").write_text("N,D,p,L0,loss,domain\n" + table)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_that_run(page)], ids=lambda page: page.stem)
def test_everything_on_the_page_runs(page, folder):
    command = [sys.executable, "-m", "tests.run_page", str(page)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "300"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def commands_that_do_not_run():
    """`forget` lines of other blocks: their data is not at hand, or they take hours."""
    for page in PAGES:
        for language, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            if language in ("", "text"):
                yield from (line for line in body.splitlines() if re.match(r"forget \w", line))


def test_commands_that_cannot_run_here_parse_at_least():
    lines = set(commands_that_do_not_run())
    assert len(lines) >= 5
    for line in lines:
        _, name, *rest = shlex.split(line, comments=True)
        command = load_command(name)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        command.make_context(line, rest)


def test_a_page_that_promises_what_is_not_so_fails(tmp_path, monkeypatch):
    """The test above would notice: a wrong exit code, a number that is off, a line that is not printed, Python that raises."""
    monkeypatch.chdir(tmp_path)
    page = "```console\n$ forget laws nonsense\n```\n```console\n$ forget laws cmr  # a comment\ncmr loss = b\n```\n```python\n1 / 0\n```\n"
    problems = [perform(step, {})[0] for step in steps(page)]
    assert "exits with 2" in problems[0]
    assert "does not print: cmr loss = b" in problems[1]
    assert "a Python block fails" in problems[2]
    page = "```console\n$ forget laws nonsense  # exits with 2\n$ forget laws cmr\nsource Gu et al., ...\n```\n"
    assert [perform(step, {})[0] for step in steps(page)] == [None, None]
    assert missing(["error 2.1%, N = 1e6"], "error 2.11%, N = 1,000,000") is None
    assert missing(["error 2.1%"], "error 2.2%") == "error 2.1%"


def test_the_pages_name_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:`|^|\$ )make ([a-z0-9-]+)", text, re.MULTILINE))
    assert {"reproduce-figure1", "test", "docs"} <= named <= targets
