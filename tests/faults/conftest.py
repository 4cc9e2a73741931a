"""The folder that every fault begins with, what comes of each command when nothing goes wrong, and the counts at the end."""

from collections import Counter
from pathlib import Path

import pytest

from tests.faults import scenarios

# (what was tried, of which suite) for the line at the end.
TRIED: Counter[str] = Counter()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "world"
    scenarios.make_world(folder)
    return folder


@pytest.fixture(scope="session")
def straight(world, tmp_path_factory):
    """Result and named points of a scenario that nothing disturbs, made once."""
    made: dict[str, tuple[dict[str, object], tuple[str, ...], Path]] = {}

    def of(name: str) -> tuple[dict[str, object], tuple[str, ...], Path]:
        if name not in made:
            folder = scenarios.copy_world(world, tmp_path_factory.mktemp("straight") / name)
            outcome = scenarios.run(folder, scenarios.SCENARIOS[name])
            assert outcome.code == 0, outcome.said
            result = scenarios.result_of(folder)
            assert len(result) > 1
            assert result["strangers"] == []
            made[name] = (result, outcome.points, folder)
        return made[name]

    return of


@pytest.fixture
def tried():
    return TRIED


def pytest_terminal_summary(terminalreporter):
    for what, count in sorted(TRIED.items()):
        terminalreporter.write_line(f"faults: {count:,} {what}")
