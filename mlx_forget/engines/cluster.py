"""What engines on a cluster share: the lease, and that tasks in a queue are taken back while those under way are waited for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from mlx_forget.engines import Demand, Engine, Exit, Task
from mlx_forget.engines.child import carried
from mlx_forget.engines.lease import SECONDS_TO_LAPSE, Leaseholder

Handle = TypeVar("Handle")


class ClusterEngine(Engine, Generic[Handle]):
    """Hands tasks to a scheduler that someone else runs; it decides when and where."""

    remote = True

    def __init__(self, demand: Demand, *, seconds_to_lapse: float = SECONDS_TO_LAPSE) -> None:
        self._holder = Leaseholder(demand.folder, carried(), seconds_to_lapse)
        self._handles: dict[Task, Handle] = {}

    @property
    def lease_folder(self) -> str:
        """Where the scheduler may keep its files until the sweep ends."""
        return str(self._holder.lease.folder)

    def accepts(self, task: Task) -> bool:
        return True

    def begun(self, task: Task) -> bool:
        return self._holder.lease.mark(task).exists()

    def ended(self) -> Sequence[tuple[Task, Exit]]:
        found = []
        for task, exit_ in self._look(self._handles):
            del self._handles[task]
            self._holder.lease.mark(task).unlink(missing_ok=True)
            found.append((task, exit_))
        return found

    @abstractmethod
    def _look(self, handles: dict[Task, Handle]) -> Sequence[tuple[Task, Exit]]:
        """The tasks among `handles` that have ended."""

    @abstractmethod
    def _take_back(self, handle: Handle) -> None:
        """Take a task out of the queue."""

    def stop(self) -> None:
        # First the word, then the queue: a task that begins in between reads it and ends.
        self._holder.stop()
        for task, handle in self._handles.items():
            if not self.begun(task):
                self._take_back(handle)

    def close(self) -> None:
        for handle in self._handles.values():
            self._take_back(handle)
        self._handles = {}
        self._holder.close()


def stopped() -> Exit:
    """How a task ends that was taken back."""
    return Exit(143, "taken back")


def first_line(error: BaseException | None) -> str:
    """The first line of what a scheduler says, or what kind of error it is."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
