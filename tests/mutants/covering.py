"""Which tests run which lines of some files, and how long each test takes: what a mutant is tried with.

A line that a fixture runs counts for every test that asks for the fixture.
"""

import inspect
import time
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import pytest

Line = tuple[str, int]


class Covering:
    """A plugin of pytest that notes the (file, line) of the watched files that every test runs, and its seconds of CPU.

    Args:
        watched: path from the root by absolute path.

    Attributes:
        outside: lines of functions that ran outside of tests and fixtures, such as while modules are imported.
    """

    def __init__(self, watched: dict[str, str]) -> None:
        self.watched = watched
        self.lines: dict[str, set[Line]] = defaultdict(set)
        self.seconds: dict[str, float] = defaultdict(float)
        self._fixtures: dict[str, list[str]] = {}
        self.outside: set[Line] = set()
        self._now = self.outside

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Generator[None, None, None]:
        around, begin = self._now, time.process_time()
        self._now = self.lines[f"fixture {fixturedef.argname}"]
        yield
        self._now = around
        self.seconds[f"fixture {fixturedef.argname}"] = time.process_time() - begin

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: Any) -> Generator[None, None, None]:
        self._now, begin = self.lines[item.nodeid], time.process_time()
        self._fixtures[item.nodeid] = [f"fixture {name}" for name in item.fixturenames]
        yield
        self._now = self.outside
        self.seconds[item.nodeid] = time.process_time() - begin

    def trace(self, frame: Any, event: str, argument: object) -> Any:
        """A trace function, as `sys.settrace` wants one."""
        path = self.watched.get(frame.f_code.co_filename)
        # Not the bodies of modules and classes.
        if path is None or not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            return None
        self._now.add((path, frame.f_lineno))
        return self.trace

    def found(self) -> dict[str, tuple[float, list[Line]]]:
        """Of each test its seconds and lines, with those of its fixtures."""
        return {
            test: (
                sum(self.seconds[one] for one in (test, *fixtures)),
                sorted(set().union(*(self.lines[one] for one in (test, *fixtures)))),
            )
            for test, fixtures in self._fixtures.items()
        }
