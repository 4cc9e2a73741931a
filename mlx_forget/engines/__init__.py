"""Where the runs of a sweep are trained: a task goes in, how it ended comes out.

Every engine but the one in this process starts the ordinary command in child processes (`child.py`). On a cluster a task is attended by
a worker (`lease.py`): it ends the child when the sweep that asked for it is gone. What a run is, which runs wait for which, and what
to do about a worker that died are the sweep's affairs (`sweeps/dispatch.py`).
"""

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_forget.errors import UserError, unknown
from mlx_forget.sweeps.grid import Resources
from mlx_forget.training.watch import Watch

# Exit codes of a run that was asked to stop and has a checkpoint.
STOPPED = (130, 143)


@dataclass(frozen=True)
class Task:
    """What is trained by one command: a run, or runs of one shape as one. `requested.yaml` lies in every folder.

    Args:
        title: the run in words.
        folders: run folders, absolute.
        log: where the command writes what it says.
        resources: what it may use, with nothing left open but memory.
    """

    title: str
    folders: tuple[Path, ...]
    log: Path
    resources: Resources


@dataclass(frozen=True)
class Exit:
    """How a task ended.

    Args:
        code: the command's exit code; None when whoever ran it died.
        reason: what is known beyond the log.
    """

    code: int | None
    reason: str = ""


@dataclass(frozen=True)
class Demand:
    """What a sweep asks of an engine.

    Args:
        folder: of the sweep, where an engine may keep what it needs.
        workers: tasks at a time; None is as many as the engine sees fit.
        resources: what a run may use, over what its recipe asks for; None leaves it to the recipe, then to the engine.
        address: of a cluster that runs already.
        settings: keys of the scheduler behind the engine.
        uses_gpu: whether the sweep's backend trains on GPUs where there are any.
        gpus: GPUs of this machine that a process can be confined to, by the name that `gpu_variable` takes.
        gpu_variable: the environment variable that confines a process to some of them.
        say: one announced sentence.
    """

    folder: Path
    workers: int | None = None
    resources: Resources = field(default_factory=Resources)
    address: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    uses_gpu: bool = False
    gpus: tuple[str, ...] = ()
    gpu_variable: str = ""
    say: Callable[[str], None] = lambda sentence: None


class Engine(ABC):
    """Trains tasks. One that has been started ends in `ended`, once."""

    # Whether runs speak to the terminal themselves.
    speaks = False
    # Whether runs may be trained on other machines than this one.
    remote = False

    @abstractmethod
    def resources(self, asked: Resources, *, num_tasks: int) -> Resources:
        """What a task will be given, when a recipe asks for `asked`.

        Args:
            num_tasks: how many of its kind (base models, or runs) the sweep has.

        Raises:
            UserError: there is no such place.
        """

    @abstractmethod
    def accepts(self, task: Task) -> bool:
        """Whether there is a place for a task now."""

    @abstractmethod
    def start(self, task: Task) -> None:
        """Begin a task that is accepted."""

    @abstractmethod
    def ended(self) -> Sequence[tuple[Task, Exit]]:
        """The tasks that have ended since the last call; to be called often.

        Raises:
            RunFailed: the cluster no longer answers.
        """

    def begun(self, task: Task) -> bool:
        """Whether a started task is past its queue."""
        return True

    @abstractmethod
    def stop(self) -> None:
        """Ask every task to write a checkpoint and end."""

    @abstractmethod
    def close(self) -> None:
        """End what still runs, at once, and let go of the engine."""


@dataclass(frozen=True)
class _Row:
    engine: str
    requires: str | None
    text: str


ENGINES = {
    "processes": _Row("mlx_forget.engines.processes:ProcessEngine", None, "processes on this machine"),
    "in-process": _Row("mlx_forget.engines.in_process:InProcessEngine", None, "one run after another in this process"),
    "ray": _Row("mlx_forget.engines.ray_tasks:RayEngine", "ray", "tasks of a Ray cluster, or of Ray on this machine"),
    "slurm": _Row("mlx_forget.engines.slurm_arrays:SlurmEngine", "submitit", "Slurm job arrays"),
}


def open_engine(name: str, demand: Demand, watch: Watch) -> Engine:
    """The engine of that name, ready to take tasks.

    Args:
        watch: how runs in this process talk.

    Raises:
        UserError: unknown, not installed, a setting that it does not have, or a cluster that does not answer.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    row = ENGINES[name]
    if row.requires is not None and row.requires not in sys.modules and importlib.util.find_spec(row.requires) is None:
        raise UserError(f"Engine {name!r} needs {row.requires}, which is not installed: pip install 'mlx-forget[{name}]'")
    if demand.address is not None and name != "ray":
        raise UserError(f"Engine {name!r} has no address: leave out --address, or choose --engine ray.")
    if demand.settings and name != "slurm":
        raise UserError(f"Engine {name!r} takes no --slurm settings: choose --engine slurm.")
    module, _, attribute = row.engine.partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute)(demand, watch)
    return engine
