"""A pool of processes on this machine; each task has its threads, and its GPUs to itself where there are any."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from mlx_forget.engines import Demand, Engine, Exit, Task
from mlx_forget.engines.child import Child
from mlx_forget.errors import UserError
from mlx_forget.sweeps.grid import Resources
from mlx_forget.training.watch import Watch


class ProcessEngine(Engine):
    """At most `workers` tasks at a time."""

    def __init__(self, demand: Demand, watch: Watch) -> None:
        self._demand = demand
        self._workers = demand.workers or num_workers(demand)
        self._running: dict[Task, tuple[Child, tuple[str, ...]]] = {}
        # GPUs by name and the share of each that is taken.
        self._taken = dict.fromkeys(demand.gpus, 0.0)

    def resources(self, asked: Resources, *, num_tasks: int) -> Resources:
        demand = self._demand
        count = len(demand.gpus)
        # More workers than GPUs share them, unless the recipe or the command says how.
        share = min(1.0, count / self._workers) if demand.uses_gpu and count else 0.0
        threads = max(1, num_cores() // self._workers)
        # Fewer tasks than workers leave nobody's threads idle: a single base model gets all of them.
        threads = max(threads, self._workers * threads // min(self._workers, num_tasks))
        asked = demand.resources.over(asked)
        found = asked.over(Resources(threads=threads, gpus=share))
        if demand.uses_gpu and not count and (asked.gpus or 0) <= 1:
            # The one accelerator of this machine needs no confining.
            return dataclasses.replace(found, gpus=0.0)
        if (found.gpus or 0) > count and (count or asked.gpus):
            raise UserError(
                f"A run asks for {found.gpus:g} GPUs, and this machine has {count} that a run can be confined to: give --gpus {min(count, 1)}."
            )
        return found

    def accepts(self, task: Task) -> bool:
        return len(self._running) < self._workers and self._gpus(task) is not None

    def _gpus(self, task: Task) -> tuple[str, ...] | None:
        """Free GPUs for a task: whole ones, or the emptiest that has room for its share; None where there are none."""
        wanted = task.resources.gpus or 0.0
        if not wanted:
            return ()
        if wanted >= 1:
            free = [name for name, taken in self._taken.items() if not taken]
            return tuple(free[: int(wanted)]) if len(free) >= wanted else None
        room = [name for name, taken in self._taken.items() if taken + wanted <= 1 + 1e-9]
        return (min(room, key=lambda name: self._taken[name]),) if room else None

    def start(self, task: Task) -> None:
        gpus = self._gpus(task)
        assert gpus is not None
        for name in gpus:
            self._taken[name] += min(1.0, task.resources.gpus or 0.0)
        confined = {self._demand.gpu_variable: ",".join(gpus)} if gpus and self._demand.gpu_variable else {}
        self._running[task] = Child(task, confined), gpus

    def ended(self) -> Sequence[tuple[Task, Exit]]:
        found = []
        for task, (child, gpus) in list(self._running.items()):
            code = child.poll()
            if code is not None:
                del self._running[task]
                for name in gpus:
                    self._taken[name] = max(0.0, self._taken[name] - min(1.0, task.resources.gpus or 0.0))
                found.append((task, Exit(code)))
        return found

    def stop(self) -> None:
        for child, _ in self._running.values():
            child.stop()

    def close(self) -> None:
        for child, _ in self._running.values():
            child.kill()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_workers(demand: Demand, asked: Resources | None = None) -> int:
    """Tasks side by side where nobody says: one a core, at most eight; on GPUs, one for as many GPUs as a run asks for.

    Args:
        asked: what the recipe asks for a run.
    """
    if demand.uses_gpu:
        wanted = demand.resources.over(asked or Resources())
        return max(1, int(len(demand.gpus) / (wanted.gpus or 1)))
    return int(np.clip(num_cores(), 1, 8))
