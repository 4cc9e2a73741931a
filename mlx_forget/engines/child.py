"""The ordinary command in a process group of its own: how a run is started, asked to stop, and ended with whoever started it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mlx_forget.engines import Task
from mlx_forget.progress import SUPERVISOR
from mlx_forget.records import REQUESTED

# A large checkpoint takes its time; torchrun's own patience is 30 s.
_SECONDS_TO_STOP = 600
# What a run must find on another machine as it was where the sweep was planned.
_CARRIED = ("FORGET_HOME", "FORGET_SCALE", "HF_HOME", "PYTHONPATH")


def carried() -> dict[str, str]:
    """The variables of this environment that a run on another machine needs; paths made absolute."""
    from mlx_forget.pipeline.corpora import forget_home

    return {name: os.environ[name] for name in _CARRIED if name in os.environ} | {"FORGET_HOME": str(forget_home().absolute())}


class Child:
    """A task in child processes: one, or as many ranks as it asks for under `torchrun`.

    The child's session is its own: a Ctrl-C on the terminal reaches the sweep alone, which passes it on once. A single process ends
    itself when its parent has died (`progress.supervisor`); `torchrun` does not, so a guard stands before it.
    """

    def __init__(self, task: Task, variables: Mapping[str, str] | None = None) -> None:
        threads = str(task.resources.threads or 1)
        environment = {
            **os.environ,
            **(variables or {}),
            SUPERVISOR: str(os.getpid()),
            "OMP_NUM_THREADS": threads,
            "PYTHONUNBUFFERED": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SECONDS_TO_STOP),
        }
        with task.log.open("ab") as log:
            self._process = subprocess.Popen(
                command_of(task), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def poll(self) -> int | None:
        """The exit code, 128 + N after signal N; None while it runs."""
        code = self._process.poll()
        return None if code is None else 128 - code if code < 0 else code

    def stop(self) -> None:
        """Ask for a checkpoint and an end; `torchrun` passes it on to every rank."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code, once there is one."""
        self._process.wait()
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def command_of(task: Task) -> list[str]:
    """The command line that trains a task."""
    first, *others = map(str, task.folders)
    train = ["-m", "mlx_forget", "train", "--config", str(Path(first) / REQUESTED), "--output", first]
    for folder in others:
        train += ["--stack-with", folder]
    ranks = task.resources.num_ranks
    if ranks == 1:
        return [sys.executable, *train]
    guard = [sys.executable, "-m", "mlx_forget.engines.guard", str(os.getpid())]
    return [*guard, sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *train]


def last_line(log: Path) -> str:
    """The last line of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].removeprefix("forget: ") if lines else "(empty)"
