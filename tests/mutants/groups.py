"""What is mutated, how many of the mutants each part gets, and the fast tests that know of it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Group:
    """One part of the tool.

    Args:
        num: mutants drawn from it.
        files: its source files, as patterns from the root of the repository.
        tests: the test files that a mutant of it is tried with.
    """

    num: int
    files: tuple[str, ...]
    tests: tuple[str, ...]

    def sources(self, root: Path) -> list[str]:
        return [str(path.relative_to(root)) for pattern in self.files for path in sorted(root.glob(pattern))]


# Of tests for one mutant, in CPU time while their lines are traced (about three times as much as otherwise): what only slower ones notice
# is left to `make test`.
MOST_SECONDS = 20.0

GROUPS = {
    "laws": Group(
        100,
        ("mlx_forget/laws/*.py",),
        tuple(
            f"tests/laws/test_{name}.py"
            for name in "forms tables solver fit fit_files identify advise cli_laws cli_advise validate uncertainty literature".split()
        ),
    ),
    "mixture": Group(
        40,
        ("mlx_forget/pipeline/mixture.py", "mlx_forget/pipeline/shares.py"),
        tuple(f"tests/pipeline/test_{name}.py" for name in "mixture shares".split()),
    ),
    "checkpoint": Group(
        35,
        ("mlx_forget/checkpoint.py",),
        ("tests/test_checkpoint.py", "tests/training/test_loop.py"),
    ),
    "records": Group(
        25,
        ("mlx_forget/records.py", "mlx_forget/history.py", "mlx_forget/durable_files.py"),
        ("tests/test_records.py", "tests/training/test_loop.py"),
    ),
}
