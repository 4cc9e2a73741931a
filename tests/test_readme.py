"""The README and the documentation do what they say: every command and every block of Python runs, at smoke scale."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_page import Command, Script, missing, perform, steps

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_that_run(page):
    return [step for step in steps(page.read_text(encoding="utf-8")) if isinstance(step, Command | Script)]


@pytest.fixture
def folder(tmp_path):
    """What a reader has: some text and some conversations."""
    (tmp_path / "notes.txt").write_text("".join(f"{i}. A note about the number {i}, and about {i * i}.\n" for i in range(4000)))
    rows = ({"prompt": f"What is {i} plus {i}?", "completion": f"{i} plus {i} is {2 * i}."} for i in range(3000))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_that_run(page)], ids=lambda page: page.stem)
def test_everything_on_the_page_runs(page, folder):
    command = [sys.executable, "-m", "tests.run_page", str(page)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "300"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


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
