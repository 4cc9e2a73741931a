"""Ray: every run is a task with its CPUs and GPUs; Ray finds the place, never the ranks.

A run on k GPUs is a task with num_gpus=k that starts `torchrun --standalone --nproc-per-node=k` as a child process group. A worker that
dies takes no run with it: its child sees that and writes a checkpoint, and the sweep hands the run in again.
"""

import os
import signal
import socket
import threading
from collections.abc import Sequence
from typing import Any

from mlx_forget.engines import Demand, Exit, Task
from mlx_forget.engines.cluster import ClusterEngine, first_line, stopped
from mlx_forget.engines.lease import SECONDS_TO_LAPSE, attend
from mlx_forget.engines.processes import num_cores
from mlx_forget.errors import RunFailed, UserError
from mlx_forget.sweeps.grid import Resources
from mlx_forget.training.watch import Watch

_SECONDS_TO_ANSWER = 10.0
# Runs pass files, never objects: the smallest store that Ray takes.
_OBJECT_STORE_BYTES = 80_000_000


class RayEngine(ClusterEngine[Any]):
    """Tasks of an existing cluster (`--address`, or RAY_ADDRESS), else of Ray on this machine for as long as the sweep lasts."""

    def __init__(self, demand: Demand, watch: Watch, *, seconds_to_lapse: float = SECONDS_TO_LAPSE) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's own niceness of 15 leaves runs next to nothing on a machine that does anything else.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray would warn of it, and for runs without GPUs none must be visible.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        import ray

        self._demand = demand
        address = demand.address or os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            threads = demand.resources.threads or 1
            options |= {
                "num_cpus": max(num_cores(), (demand.workers or 1) * threads * demand.resources.num_ranks),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
            # An address file of a cluster that someone else left on this machine must not be taken for ours.
            options["address"] = "local"
        else:
            _knock(address)
            options["address"] = address
        terminate = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            raise UserError(f"Ray{f' at {address}' if address else ''} does not answer: {first_line(error)}") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)
        self._ray = ray
        try:
            super().__init__(demand, seconds_to_lapse=seconds_to_lapse)
        except BaseException:
            ray.shutdown()
            raise
        self._total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        demand.say(
            f"Ray {ray.__version__}{f' at {address}' if address else ' on this machine'}: "
            f"{self._total.get('CPU', 0):g} CPUs, {self._total.get('GPU', 0):g} GPUs."
        )

    def resources(self, asked: Resources, *, num_tasks: int) -> Resources:
        default = Resources(threads=1, gpus=1.0 if self._total.get("GPU", 0) else 0.0)
        found = self._demand.resources.over(asked).over(default)
        cpus, gpus = float((found.threads or 1) * found.num_ranks), found.gpus or 0.0
        for name, wanted, unit in (("CPU", cpus, "CPUs"), ("GPU", gpus, "GPUs")):
            if wanted > self._total.get(name, 0):
                raise UserError(
                    f"A run asks for {wanted:g} {unit}, and all of Ray has {self._total.get(name, 0):g}: it would never start."
                )
        return found

    def accepts(self, task: Task) -> bool:
        return self._demand.workers is None or len(self._handles) < self._demand.workers

    def start(self, task: Task) -> None:
        wants = task.resources
        options: dict[str, Any] = {
            "num_cpus": (wants.threads or 1) * wants.num_ranks,
            "num_gpus": wants.gpus or 0.0,
            "max_retries": 0,
            "name": task.title,
        }
        if wants.memory_gb is not None:
            options["memory"] = int(wants.memory_gb * 1e9)
        self._handles[task] = self._ray.remote(attend).options(**options).remote(task, self._holder.lease)

    def _look(self, handles: dict[Task, Any]) -> Sequence[tuple[Task, Exit]]:
        if not handles:
            return []
        tasks = {handle: task for task, handle in handles.items()}
        try:
            ready, _ = self._ray.wait(list(tasks), num_returns=len(tasks), timeout=0, fetch_local=False)
        except self._ray.exceptions.RayError as error:
            raise RunFailed(f"Ray no longer answers: {first_line(error)} The same command goes on.") from None
        return [(tasks[handle], self._exit(handle)) for handle in ready]

    def _exit(self, handle: Any) -> Exit:
        errors = self._ray.exceptions
        try:
            return Exit(self._ray.get(handle))
        except errors.TaskCancelledError:
            return stopped()
        except errors.RayTaskError as error:
            return Exit(2, first_line(error.cause))
        except errors.RayError as error:
            return Exit(None, f"its Ray worker died: {first_line(error)}")

    def _take_back(self, handle: Any) -> None:
        self._ray.cancel(handle, force=False)

    def close(self) -> None:
        super().close()
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Find out in seconds that nobody is there: Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        if address not in ("auto", "local"):
            raise UserError(f"--address takes HOST:PORT, ray://HOST:PORT or auto, not {address!r}.")
        return
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"No Ray cluster answers at {address} ({error}): start one with `ray start --head`, or leave --address out."
        ) from None
