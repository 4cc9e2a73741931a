"""Mutants in processes of their own: put in place of what they change, and tried with tests until one fails.

Pytest collects the tests of a part once; then, instead of running them, it forks a process for every mutant, which costs little more
than its tests. No file is changed. A mistake in the body of a function takes the place of its code; any other, and one in a function
that runs as modules are imported, is made as everything is imported anew.
"""

import functools
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import pairwise, zip_longest
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from tests.mutants.covering import Covering
from tests.mutants.sites import Site, mutated

PYTEST = ["-q", "-s", "-x", "-m", "not full", "-p", "no:xdist", "-p", "no:cacheprovider"]

_MOST_BYTES = 6 << 30
# What a child and a test may take beside twice their usual time, which was measured while their lines were traced.
_CPU_SECONDS_TO_START, _CPU_SECONDS_FOR_A_TEST = 15, 2
# By the clock, for what waits and takes no CPU time, on a machine that has much else to do.
_WALL_SECONDS_TO_START, _WALL_SECONDS_FOR_A_SECOND = 120, 20

# Seconds of the tests that are tried in one round.
_ROUNDS = (0.0, 0.3, 1.5, 1e9)

Tests = dict[str, tuple[float, list[list[Any]]]]


class _Finder(MetaPathFinder, SourceFileLoader):
    """Finds one module only, and loads it with its mistake."""

    def __init__(self, root: Path, site: Site) -> None:
        SourceFileLoader.__init__(self, _module_of(site.path), str(root / site.path))
        self.root, self.site = root, site

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # type: ignore[override]
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name: str) -> Any:
        return compile(mutated(self.root, self.site), self.path, "exec")


def put_in_place(root: Path, site: Site, *, anew: bool = False) -> None:
    """From now on, this process runs the tool with the mistake; `anew` where what was imported is not to be used any more."""
    if anew:
        _forget_imports()
        sys.meta_path.insert(0, _Finder(root, site))
        return
    assert site.outermost is not None
    code: Any = compile(mutated(root, site), str(root / site.path), "exec")
    found: Any = importlib.import_module(_module_of(site.path))
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


def _forget_imports() -> None:
    for name in list(sys.modules):
        if (
            name.split(".")[0] in ("mlx_forget", "cuda_backend", "tests")
            and name != "tests"
            and not name.startswith("tests.mutants")
        ):
            del sys.modules[name]


def _module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Trials:
    """A plugin of pytest that tries mutants with the tests that were collected.

    Args:
        root: of the repository.
        sources: the files that are mutated, as paths from the root.
        test_files: likewise.
        todo: the mutants.
        most_seconds: of tests for a mutant, by CPU time while their lines are traced.
        deadline: by the monotonic clock; no mutant is begun later.
        kept: folder for what is found out about the tests.
        tell: called with each mutant, what became of it, and its seconds.
    """

    def __init__(
        self,
        root: Path,
        sources: list[str],
        test_files: tuple[str, ...],
        todo: list[Site],
        *,
        most_seconds: float,
        deadline: float,
        kept: Path,
        tell: Callable[[Site, str, float], None],
    ) -> None:
        self.root, self.sources, self.test_files, self.todo = root, sources, test_files, todo
        self.most_seconds, self.deadline, self.kept, self.tell = most_seconds, deadline, kept, tell
        self.imported = Covering({str(root / path): path for path in sources})
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """Try all."""
        _forget_imports()
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            # The cache folder of the tests, and their temporary folders, are in there; see `tests/conftest.py`.
            os.environ |= {"PYTEST_XDIST_TESTRUNUID": "mutants", "TMPDIR": folder}
            tempfile.tempdir = folder
            try:
                self._collect(Path(folder))
            finally:
                del os.environ["TMPDIR"]
                tempfile.tempdir = None

    def _collect(self, folder: Path) -> None:
        self.folder, self.cache, self.home = folder, folder / "mlx-forget-tests-mutants", self.kept / "home"
        self.home.mkdir(parents=True, exist_ok=True)
        sys.settrace(self.imported.trace)
        for path in self.sources:
            importlib.import_module(_module_of(path))
        code = pytest.main([*PYTEST, f"--basetemp={folder}/t", *self.test_files], plugins=[self])
        if code:
            raise SystemExit(int(code))

    def pytest_collection_finish(self) -> None:
        sys.settrace(None)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """A test that takes several times as long as it should is stopped, with its process."""
        if self.seconds:
            signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS_FOR_A_TEST + 2 * self.seconds[item.nodeid])

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        maps = [self._covering(session, test_file) for test_file in self.test_files]
        at_import = self.imported.outside
        for site in self.todo:
            if time.monotonic() > self.deadline:
                break
            anew = site.outermost is None or any(
                path == site.path and site.outermost[1] <= line <= site.outermost[2] for path, line in at_import
            )
            tests = self._chosen(site, maps, whole_file=anew)
            begin = time.monotonic()
            self.tell(site, self._tried(session, site, tests, anew=anew), time.monotonic() - begin)
        return True

    def _covering(self, session: pytest.Session, test_file: str) -> Tests:
        """What `Covering` finds of a test file; what was found earlier serves as long as neither tests nor sources have changed."""
        digest = hashlib.sha256()
        for path in (test_file, *self.sources):
            digest.update((self.root / path).read_bytes())
        kept = self.kept / "covering" / f"{test_file.replace('/', '-')}-{digest.hexdigest()[:16]}.json"
        if not kept.exists():
            code = self._forked(lambda: self._trace(session, test_file, kept))
            if code:
                sys.exit(f"{test_file} does not pass as it is.")
            shutil.copytree(self.cache, self.home, dirs_exist_ok=True)
        found: Tests = json.loads(kept.read_text())
        return found

    def _trace(self, session: pytest.Session, test_file: str, kept: Path) -> int:
        plugin = Covering(self.imported.watched)
        session.config.pluginmanager.register(plugin)
        sys.settrace(plugin.trace)
        code = _run(session, [item for item in session.items if item.nodeid.split("::")[0] == test_file])
        sys.settrace(None)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not code:
            replace_text(kept, json.dumps(plugin.found()))
        return code

    def _chosen(self, site: Site, maps: list[Tests], *, whole_file: bool) -> dict[str, float]:
        """The tests that run the statement of a mutant, with their seconds: the quick ones of every file, then slower ones, until they
        take as long as a mutant may. For a whole file those that run any of its functions, and for as long again those that may read its
        names."""
        first, last = (0, 1 << 30) if whole_file else site.lines

        def runs_it(lines: list[list[Any]]) -> bool:
            return any(path == site.path and first <= line <= last for path, line in lines)

        chosen = self._quickest([{name: seconds for name, (seconds, lines) in tests.items() if runs_it(lines)} for tests in maps])
        if whole_file:
            chosen |= self._quickest([{name: one[0] for name, one in tests.items() if name not in chosen} for tests in maps])
        return chosen

    def _quickest(self, files: list[dict[str, float]]) -> dict[str, float]:
        """Tests by file, and of each the seconds: those of a round file by file, so that what a module's tests share is made once."""
        files = sorted(files, key=lambda tests: sum(tests.values()))
        chosen: dict[str, float] = {}
        for quicker, slower in pairwise(_ROUNDS):
            for tests in files:
                for name, seconds in sorted(tests.items(), key=lambda item: item[1]):
                    if quicker <= seconds < slower and sum(chosen.values()) + seconds <= self.most_seconds:
                        chosen[name] = seconds
        return chosen

    def _tried(self, session: pytest.Session, site: Site, tests: dict[str, float], *, anew: bool) -> str:
        if not tests:
            return "survived: no test that is quick enough runs it"

        def child() -> int:
            if "MUTANTS_SHOW" not in os.environ:
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
            resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            most = int(_CPU_SECONDS_TO_START + 2 * sum(tests.values()))
            resource.setrlimit(resource.RLIMIT_CPU, (most, most + 5))
            put_in_place(self.root, site, anew=anew)
            if anew:
                self.seconds = {}
                # One after the other: most mistakes are noticed before all files have been imported.
                files = dict.fromkeys(name.split("::")[0] for name in tests)
                codes = (int(pytest.main([*PYTEST, f"--basetemp={self.folder}/t", file], plugins=[_Only(tests)])) for file in files)
                return next((code for code in codes if code), 0)
            self.seconds = tests
            items = {item.nodeid: item for item in session.items}
            return _run(session, [items[name] for name in tests])

        code = self._forked(child, _WALL_SECONDS_TO_START + _WALL_SECONDS_FOR_A_SECOND * sum(tests.values()))
        assert code != pytest.ExitCode.NO_TESTS_COLLECTED
        if code < 0:
            return "killed by time" if -code in (signal.SIGPROF, signal.SIGXCPU, signal.SIGALRM) else "killed"
        return "killed" if code else "survived"

    def _forked(self, work: Callable[[], int], most_seconds: float = 1e9) -> int:
        """The exit status of a process that does the work, with a fresh copy of the cache folder; negative for a signal, as
        `subprocess` has it, and SIGALRM where it took longer than it may. It ends with all that it has started, also when this one is
        stopped."""
        for path in self.folder.iterdir():
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.home, self.cache)
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                code = work()
            finally:
                os._exit(code)
        with suppress(PermissionError):
            os.setpgid(process, process)
        try:
            deadline = time.monotonic() + most_seconds
            while not (ended := os.waitpid(process, os.WNOHANG))[0]:
                if time.monotonic() > deadline:
                    return -signal.SIGALRM
                time.sleep(0.02)
            return os.waitstatus_to_exitcode(ended[1])
        finally:
            _end(process)


class _Only:
    """A plugin of pytest that picks tests, in an order. By the names of their functions: parameters may come from what is mutated."""

    def __init__(self, tests: dict[str, float]) -> None:
        self.places = {name.split("[")[0]: place for place, name in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        places = {item: self.places.get(item.nodeid.split("[")[0]) for item in items}
        items[:] = sorted((item for item in items if places[item] is not None), key=places.get)  # type: ignore[arg-type]


def _run(session: pytest.Session, items: list[pytest.Item]) -> int:
    """Run tests until one fails: 1 if one did."""
    for item, following in zip_longest(items, items[1:]):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return 1
    return 0


def _end(process: int) -> None:
    """Kill what is left of a process and of those that it started."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)


def replace_text(path: Path, text: str) -> None:
    """Write a file, aside first."""
    aside = path.with_suffix(".part")
    aside.write_text(text)
    os.replace(aside, path)
