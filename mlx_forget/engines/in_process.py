"""One run after another in this process: nothing is started, everything is seen; for small sweeps and for debugging."""

import traceback
from collections import deque
from collections.abc import Sequence

from mlx_forget.config import TrainConfig
from mlx_forget.config_layers import from_layers
from mlx_forget.engines import Demand, Engine, Exit, Task
from mlx_forget.engines.processes import num_cores
from mlx_forget.errors import Interrupted, RunFailed, UserError, exit_code
from mlx_forget.pipeline.opened import Opened
from mlx_forget.records import REQUESTED
from mlx_forget.strict_yaml import read_yaml
from mlx_forget.sweeps.grid import Resources
from mlx_forget.sweeps.stacking import execute_stack
from mlx_forget.training.plan import plan_run
from mlx_forget.training.run import execute
from mlx_forget.training.watch import Watch


class InProcessEngine(Engine):
    """Trains a task to its end whenever it is asked what has ended; `Watch.interrupted` stops it."""

    speaks = True

    def __init__(self, demand: Demand, watch: Watch) -> None:
        if (demand.workers or 1) > 1:
            raise UserError("Engine 'in-process' trains one run after another: leave out --workers, or choose --engine processes.")
        self._demand, self._watch = demand, watch
        self._waiting: deque[Task] = deque()

    def resources(self, asked: Resources, *, num_tasks: int) -> Resources:
        found = self._demand.resources.over(asked).over(Resources(threads=num_cores(), ranks=1))
        if found.num_ranks > 1:
            raise UserError("Engine 'in-process' trains a run in one process: choose --engine processes for several GPUs a run.")
        return found

    def accepts(self, task: Task) -> bool:
        return not self._waiting

    def start(self, task: Task) -> None:
        self._waiting.append(task)

    def ended(self) -> Sequence[tuple[Task, Exit]]:
        return [(task, self._train(task)) for task in (self._waiting.popleft() for _ in range(len(self._waiting)))]

    def _train(self, task: Task) -> Exit:
        try:
            opened = Opened()
            plans = [
                plan_run(from_layers(TrainConfig, read_yaml(folder / REQUESTED)), folder=folder, watch=Watch(), opened=opened)
                for folder in task.folders
            ]
            if len(plans) == 1:
                execute(plans[0], watch=self._watch, wait=True)
            else:
                execute_stack(plans, watch=self._watch, wait=True)
        except (UserError, RunFailed, Interrupted) as error:
            return self._failed(task, str(error), exit_code(error))
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:
                return self._failed(task, f"{error.filename}: {error.strerror}.", 2)
            return self._failed(task, traceback.format_exc(), 1)
        return Exit(0)

    def _failed(self, task: Task, text: str, code: int) -> Exit:
        with task.log.open("a", encoding="utf-8") as log:
            log.write(f"{text}\n")
        return Exit(code)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass
