"""Run what a page of the documentation tells its reader to run, in order, in the present folder.

    python -m tests.run_page PAGE.md

- A line `$ forget ...` of a block fenced as `console` runs. The lines below it, up to the next command, are what it prints: each must
  be among its lines of output, numbers to within 1%; `...` at its end leaves the rest out. A comment `# exits with 1` says so.
- A block with `title="FILE"` is written to that file.
- A block fenced as `python` without a title runs; all of a page share one namespace.
"""

import contextlib
import io
import math
import re
import shlex
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)(?P<rest>[^\n]*)\n(?P<body>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
TOLERANCE = 0.01


@dataclass(frozen=True)
class Command:
    """A command of a console block, the lines that the page says it prints, and its exit code."""

    line: str
    printed: tuple[str, ...]
    code: int


@dataclass(frozen=True)
class File:
    name: str
    content: str


@dataclass(frozen=True)
class Script:
    content: str


def steps(page):
    """What a page asks its reader to do, in order."""
    for block in _BLOCK.finditer(page):
        body = textwrap.dedent(block["body"])
        title = re.search(r'title="([^"]+)"', block["rest"])
        if title is not None:
            yield File(title[1], body)
        elif block["language"] == "console":
            yield from _commands(body)
        elif block["language"] == "python":
            yield Script(body)


def _commands(body):
    for part in re.split(r"^\$ ", body.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        line, *printed = part.rstrip().splitlines()
        code = re.search(r"# exits with (\d)", line)
        yield Command(line, tuple(one.strip() for one in printed if one.strip()), int(code[1]) if code else 0)


def missing(printed, output):
    """The first printed line that the output lacks, or None."""
    found = [line.split() for line in output.splitlines()]
    return next((line for line in printed if not any(_alike(line.split(), words) for words in found)), None)


def _alike(promised, found):
    if promised[-1] == "...":
        promised, found = promised[:-1], found[: len(promised) - 1]
    return len(promised) == len(found) and all(map(_same, promised, found))


def _same(promised, found):
    if _NUMBER.sub("#", promised) != _NUMBER.sub("#", found):
        return False
    numbers = ([float(number.replace(",", "")) for number in _NUMBER.findall(word)] for word in (promised, found))
    return all(math.isclose(one, other, rel_tol=TOLERANCE) for one, other in zip(*numbers, strict=True))


def perform(step, namespace):
    """Take one step; returns (what went wrong or None, the output)."""
    from mlx_forget.cli import main as forget

    output = io.StringIO()
    if isinstance(step, File):
        Path(step.name).parent.mkdir(parents=True, exist_ok=True)
        Path(step.name).write_text(step.content, encoding="utf-8")
        return None, ""
    code = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            if isinstance(step, Script):
                exec(compile(step.content, "<page>", "exec"), namespace)
            else:
                forget(shlex.split(step.line, comments=True)[1:])
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    if isinstance(step, Script):
        return (f"a Python block fails:\n{step.content}" if code else None), output.getvalue()
    if code != step.code:
        return f"`{step.line}` exits with {code}", output.getvalue()
    line = missing(step.printed, output.getvalue())
    return (f"`{step.line}` does not print: {line}" if line else None), output.getvalue()


def main():
    namespace = {"__name__": "page"}
    for step in steps(Path(sys.argv[1]).read_text(encoding="utf-8")):
        problem, output = perform(step, namespace)
        if problem:
            sys.exit(f"{sys.argv[1]}: {problem}\n{output}")


if __name__ == "__main__":
    main()
