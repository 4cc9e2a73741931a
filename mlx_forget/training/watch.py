"""What a run tells whoever started it, and how it is asked to stop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget.distributed import Group
from mlx_forget.pipeline.catalog import silent
from mlx_forget.pipeline.tokenise import Progress
from mlx_forget.training.loop import Observer, Report


class NoObserver(Observer):
    """Nobody watches."""

    def on_report(self, report: Report) -> None:
        pass

    def on_evaluation(self, row: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Watch:
    """How a run talks to its caller.

    Args:
        say: one announced sentence.
        progress: preparation work (activity, fraction done).
        observer: makes the observer of a run from its title.
        interrupted: the number of the signal that asked to stop, or None.
    """

    say: Callable[[str], None] = lambda sentence: None
    progress: Progress = silent
    observer: Callable[[str, Path], Observer] = lambda title, folder: NoObserver()
    interrupted: Callable[[], int | None] = lambda: None

    def of(self, group: Group) -> "Watch":
        """What a process of a group says: rank 0 speaks for all."""
        return self if group.rank == 0 else Watch(interrupted=self.interrupted)
