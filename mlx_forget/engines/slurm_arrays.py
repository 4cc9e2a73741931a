"""Slurm through `submitit`: the runs that are ready go into the queue as job arrays, those of one kind as one array.

A job that Slurm is about to end (its time is up, or it is preempted) writes a checkpoint and goes back into the queue. What submitit
keeps of a job, pickles among it, lies in the lease's folder and is gone when the sweep has ended.
"""

import shutil
from collections.abc import Sequence
from typing import Any

from mlx_forget.engines import Demand, Exit, Task
from mlx_forget.engines.cluster import ClusterEngine, first_line, stopped
from mlx_forget.engines.lease import SECONDS_TO_LAPSE, Attendance, Lease
from mlx_forget.errors import RunFailed, UserError
from mlx_forget.sweeps.grid import Resources
from mlx_forget.training.watch import Watch

_MINUTES = 24 * 60
# How often a job that ran out of time may go back into the queue.
_MOST_REQUEUES = 1000


class AttendedJob:
    """What a job calls, as submitit wants it."""

    def __init__(self) -> None:
        self._attendance: Attendance | None = None

    def __call__(self, task: Task, lease: Lease) -> int:
        self._attendance = Attendance(task, lease)
        return self._attendance.run()

    def checkpoint(self, task: Task, lease: Lease) -> Any:
        """Slurm is about to end the job: stop the run with a checkpoint, and ask for the same job again."""
        from submitit.helpers import DelayedSubmission

        assert self._attendance is not None
        self._attendance.stop()
        return DelayedSubmission(AttendedJob(), task, lease)


class SlurmEngine(ClusterEngine[Any]):
    """Job arrays, at most `workers` jobs of each at a time; `cluster=local` runs them on this machine, without Slurm."""

    def __init__(self, demand: Demand, watch: Watch, *, seconds_to_lapse: float = SECONDS_TO_LAPSE) -> None:
        import submitit

        self._submitit = submitit
        settings: dict[str, Any] = {key: int(value) if value.isdigit() else value for key, value in demand.settings.items()}
        self._cluster = settings.pop("cluster", "slurm")
        if self._cluster not in ("slurm", "local"):
            raise UserError(f"--slurm cluster= takes slurm or local, not {self._cluster!r}.")
        if self._cluster == "slurm" and shutil.which("sbatch") is None:
            raise UserError("There is no Slurm here (no sbatch): run this on a login node, or try it with --slurm cluster=local.")
        self._settings = settings
        self._demand = demand
        super().__init__(demand, seconds_to_lapse=seconds_to_lapse)
        try:
            self._executor(Resources(threads=1))
        except (TypeError, ValueError, NameError, AssertionError, RuntimeError) as error:
            self._holder.close()
            raise UserError(f"Slurm does not take these settings: {' '.join(str(error).split())[:400]}") from None
        self._queued: list[Task] = []

    def _executor(self, wants: Resources) -> Any:
        """An executor whose jobs may use this much."""
        options: dict[str, Any] = {"slurm_max_num_timeout": _MOST_REQUEUES} if self._cluster == "slurm" else {}
        executor = self._submitit.AutoExecutor(folder=f"{self.lease_folder}/jobs", cluster=self._cluster, **options)
        executor.update_parameters(
            name=f"forget-{self._demand.folder.name}", timeout_min=_MINUTES, cpus_per_task=(wants.threads or 1) * wants.num_ranks
        )
        if wants.gpus:
            executor.update_parameters(gpus_per_node=int(wants.gpus))
        if wants.memory_gb is not None:
            executor.update_parameters(mem_gb=wants.memory_gb)
        if self._demand.workers is not None and self._cluster == "slurm":
            executor.update_parameters(slurm_array_parallelism=self._demand.workers)
        known = set(executor._valid_parameters())
        executor.update_parameters(**{key if key in known else f"slurm_{key}": value for key, value in self._settings.items()})
        return executor

    def resources(self, asked: Resources, *, num_tasks: int) -> Resources:
        found = self._demand.resources.over(asked).over(Resources(threads=1, gpus=0.0))
        if found.gpus and found.gpus < 1:
            raise UserError(f"Slurm gives whole GPUs, and a run asks for {found.gpus:g}.")
        return found

    def accepts(self, task: Task) -> bool:
        # The local executor starts whatever it is given.
        busy = len(self._handles) + len(self._queued)
        return self._cluster == "slurm" or busy < (self._demand.workers or 2)

    def start(self, task: Task) -> None:
        self._queued.append(task)

    def _look(self, handles: dict[Task, Any]) -> Sequence[tuple[Task, Exit]]:
        self._submit()
        return [(task, self._exit(task, job)) for task, job in list(handles.items()) if job.done()]

    def _submit(self) -> None:
        """Everything that became ready since the last look, in an array for each kind of job."""
        kinds: dict[Resources, list[Task]] = {}
        for task in self._queued:
            kinds.setdefault(task.resources, []).append(task)
        self._queued = []
        for wants, tasks in kinds.items():
            functions = [AttendedJob() for _ in tasks]
            executor = self._executor(wants)
            try:
                with executor.batch():
                    jobs = [executor.submit(run, task, self._holder.lease) for run, task in zip(functions, tasks, strict=True)]
            except (RuntimeError, OSError) as error:
                raise RunFailed(f"Slurm takes no jobs: {first_line(error)} The same command goes on.") from None
            self._handles.update(zip(tasks, jobs, strict=True))

    def _exit(self, task: Task, job: Any) -> Exit:
        if job.state.startswith("CANCELLED"):
            return stopped()
        try:
            return Exit(job.result())
        except self._submitit.core.utils.FailedJobError as error:
            return Exit(2, str(error).strip().splitlines()[-1])
        except self._submitit.core.utils.UncompletedJobError as error:
            return Exit(None, f"its job {job.job_id} died: {first_line(error)}")

    def _take_back(self, handle: Any) -> None:
        handle.cancel(check=False)

    def stop(self) -> None:
        self._queued = []
        super().stop()
