"""Which tests enter which functions of some files, and how long each test takes: what a mutant is tried with.

A function that a test enters before its body, in a fixture that others may share or as its file is imported, counts for every test of
that file.
"""

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

PYTEST = ["-q", "-x", "-m", "not full", "-p", "no:xdist", "-p", "no:cacheprovider"]


class Covering:
    """A plugin of pytest that notes, for every test, its seconds of CPU and (file, first line) of the watched functions it enters."""

    def __init__(self, watched: dict[str, str]) -> None:
        self.watched = watched
        self.entered: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self.shared: set[tuple[str, int]] = set()
        self.seconds: dict[str, float] = {}
        self._now = self.shared

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, None, None]:
        begin = time.process_time()
        yield
        self.seconds[item.nodeid] = time.process_time() - begin

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        self._now = self.entered[item.nodeid]
        yield
        self._now = self.shared

    def enter(self, frame: Any, event: str, argument: object) -> None:
        path = self.watched.get(frame.f_code.co_filename)
        if path is not None:
            self._now.add((path, frame.f_code.co_firstlineno))


def covering(root: Path, watched: list[str], test_file: str, kept: Path) -> dict[str, Any]:
    """Every test of a file with its seconds and the functions it enters: {"tests": {id: [seconds, [[path, line], ...]]}, "shared": [...]}.

    What is kept from an earlier call serves as long as neither the tests nor the watched files have changed.
    """
    digest = hashlib.sha256()
    for path in (test_file, *watched):
        digest.update((root / path).read_bytes())
    kept = kept / f"{test_file.replace('/', '-')}-{Path(watched[0]).stem}.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["digest"] == digest.hexdigest():
        return found
    plugin = Covering({str(root / path): path for path in watched})
    sys.settrace(plugin.enter)
    try:
        code = pytest.main([*PYTEST, test_file], plugins=[plugin])
    finally:
        sys.settrace(None)
    assert code == 0, f"{test_file} does not pass as it is"
    found = {
        "digest": digest.hexdigest(),
        "tests": {name: [plugin.seconds[name], sorted(plugin.entered[name])] for name in plugin.seconds},
        "shared": sorted(plugin.shared),
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found))
    return json.loads(json.dumps(found))
