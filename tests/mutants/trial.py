"""A mutant in a process of its own: put in place of what it changes, and tried with tests until one fails.

The process is forked from one that has imported the tool and the tests, so that a mutant costs little more than its tests. No file is
changed. A mistake in the body of a function takes the place of its code; any other is made as everything is imported anew.
"""

import functools
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from tests.mutants.covering import PYTEST
from tests.mutants.sites import Site, mutated

_MOST_BYTES = 6 << 30
_MOST_WALL_SECONDS = 900
# What a child and a test may take beside its usual time.
_CPU_SECONDS_TO_START, _CPU_SECONDS_FOR_A_TEST = 60, 2


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _Finder(MetaPathFinder, SourceFileLoader):
    """Finds one module only, and loads it with its mistake."""

    def __init__(self, root: Path, site: Site) -> None:
        SourceFileLoader.__init__(self, module_of(site.path), str(root / site.path))
        self.root, self.site = root, site

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # type: ignore[override]
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name: str) -> Any:
        return compile(mutated(self.root, self.site), self.path, "exec")


def put_in_place(root: Path, site: Site) -> None:
    """From now on, this process runs the tool with the mistake."""
    if site.outermost is None:
        for name in [name for name in sys.modules if name.split(".")[0] in ("mlx_forget", "cuda_backend", "tests")]:
            if not name.startswith("tests.mutants") and name != "tests":
                del sys.modules[name]
        sys.meta_path.insert(0, _Finder(root, site))
        return
    code: Any = compile(mutated(root, site), str(root / site.path), "exec")
    found: Any = importlib.import_module(module_of(site.path))
    for name in site.outermost[0].split("."):
        code = next(one for one in code.co_consts if isinstance(one, CodeType) and one.co_name == name)
        found = vars(found)[name]
    while not hasattr(found, "__code__"):
        match found:
            case property():
                found = found.fget
            case classmethod() | staticmethod():
                found = found.__func__
            case functools.cached_property():
                found = found.func
            case _:
                found = found.__wrapped__
    # A generator that is a context manager, and what is cached, have a function behind them.
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    found.__code__ = code


class _TimeLimits:
    """A test that takes several times as long as it should is stopped, with its process."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS_FOR_A_TEST + 5 * self.seconds.get(item.nodeid, 1))


def tried(root: Path, site: Site | None, tests: dict[str, float], home: Path) -> str:
    """What becomes of a mutant: killed, killed by time, or survived.

    Args:
        root: of the repository.
        site: the mistake; None for none, which should survive.
        tests: ids of the tests, with the seconds of CPU that each takes.
        home: a cache folder of the tool to begin with; the mutant gets a copy, so that no other sees what it leaves there.
    """
    if not tests:
        return "survived: no test runs it"
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        process = os.fork()
        if process == 0:
            _child(root, site, tests, home, Path(folder))
        deadline = time.monotonic() + _MOST_WALL_SECONDS
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return "killed by time"
            time.sleep(0.02)
    status = ended[1]
    if os.WIFSIGNALED(status):
        return "killed by time" if os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU) else "killed"
    return "killed" if os.WEXITSTATUS(status) else "survived"


def _child(root: Path, site: Site | None, tests: dict[str, float], home: Path, folder: Path) -> None:
    code = 1
    try:
        os.environ |= {"PYTEST_XDIST_TESTRUNUID": folder.name, "TMPDIR": str(folder)}
        tempfile.tempdir = str(folder)
        if home.exists():
            shutil.copytree(home, folder / f"mlx-forget-tests-{folder.name}")
        if "MUTANTS_SHOW" not in os.environ:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = int(_CPU_SECONDS_TO_START + 3 * sum(tests.values()))
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 5))
        if site is not None:
            put_in_place(root, site)
        code = int(pytest.main([*PYTEST, f"--basetemp={folder}/t", *tests], plugins=[_TimeLimits(tests)]))
    finally:
        os._exit(code)
