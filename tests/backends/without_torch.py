"""The command line in a process where PyTorch is not installed, as on a Mac: `python -m tests.backends.without_torch COMMANDS.json`.

Runs each command of a JSON list, `rm FILE` among them; prints one JSON object: [exit code, stdout, stderr] of each, and what of PyTorch was
imported.
"""

import contextlib
import importlib.machinery
import io
import json
import sys
from pathlib import Path


class Without:
    """The finder of modules on the path, which does not find some packages."""

    def __init__(self, *names):
        self._names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self._names:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(importlib.machinery.PathFinder, name)


def main():
    finders = [Without("torch", "peft") if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
    sys.meta_path[:] = finders
    from mlx_forget.cli import main as forget

    answers = []
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if command[0] == "rm":
            Path(command[1]).unlink(missing_ok=True)
            answers.append([0, "", ""])
            continue
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                forget(command)
            except SystemExit as stop:
                answers.append([int(stop.code or 0), out.getvalue(), err.getvalue()])
    loaded = [name for name in sys.modules if name.partition(".")[0] in ("torch", "peft")]
    print(json.dumps({"answers": answers, "loaded": loaded}))


if __name__ == "__main__":
    main()
