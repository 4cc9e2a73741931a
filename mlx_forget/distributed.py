"""Several processes, one run: what the core asks of the processes that a launcher started (`torchrun`, `mlx.launch`).

A process knows from its environment that it was launched, before any framework is loaded; the backend then joins it to the others.
Rank 0 alone locks, prepares, writes and speaks; the others wait, and read what it made.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import LeaderFailed, RunFailed, exit_code

# A variable that holds the rank -> the launcher that sets it.
_RANK_VARIABLES = {
    "MLX_RANK": "mlx.launch",
    "RANK": "torchrun",
    "OMPI_COMM_WORLD_RANK": "mpirun",
}


def launched_rank() -> int | None:
    """The rank that a launcher gave this process; None for a process of its own. Reads the environment only."""
    name = _launcher_variable()
    return None if name is None else int(os.environ[name])


def launcher() -> str | None:
    """Who started this process as one of several, in words; None for a process of its own."""
    name = _launcher_variable()
    return None if name is None else _RANK_VARIABLES[name]


def _launcher_variable() -> str | None:
    return next((name for name in _RANK_VARIABLES if os.environ.get(name, "").isdigit()), None)


class Group(ABC):
    """The processes of a run."""

    rank: int
    size: int

    @abstractmethod
    def all_sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum over ranks, float64 in the shape of `values`; waits for all of them."""

    def broadcast(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Rank 0's values on every rank."""
        return self.all_sum(values if self.rank == 0 else np.zeros_like(values))

    def agree(self, *answers: bool) -> tuple[bool, ...]:
        """For each question, whether any rank says yes."""
        return tuple(bool(count) for count in self.all_sum(np.array(answers, np.float64)))

    def smallest(self, value: int) -> int:
        """The smallest of what the ranks say."""
        said = np.zeros(self.size)
        said[self.rank] = value
        return int(self.all_sum(said).min())

    def barrier(self) -> None:
        """Wait for every rank."""
        self.all_sum(np.zeros(1))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Name the likely cause when a framework fails within: another process has ended.

        Raises:
            RunFailed: with what the framework said.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, RunFailed):
                raise
            # Without the place in the framework's source before it and the advice after it.
            reason = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().splitlines()[0]).split(". ")[0].rstrip(".")
            raise RunFailed(
                f"Another process of this run has ended ({reason}): the same command goes on from the last checkpoint."
            ) from error

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Rank 0 runs the block while the others wait; then they run it, and find what it has made.

        Raises:
            LeaderFailed: on the others, when the block failed on rank 0, which says why.
        """
        if self.rank:
            code = int(self.all_sum(np.zeros(1))[0])
            if code:
                raise LeaderFailed(code)
            yield
            return
        try:
            yield
        except BaseException as error:
            self.all_sum(np.array([float(exit_code(error))]))
            raise
        self.all_sum(np.zeros(1))


@final
class Alone(Group):
    """A process of its own."""

    rank = 0
    size = 1

    def all_sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return values


ALONE = Alone()
