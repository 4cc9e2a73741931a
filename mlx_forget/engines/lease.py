"""The lease under which workers of a cluster attend to runs: while the sweep lives it writes a beat; workers that see none end their runs.

A lease is a folder in the sweep's folder, which every machine of the cluster must see: `beat.json`, and a file under `attended/` for
every task that is past its queue. Nothing is compared between clocks: a worker counts how long the beat has not changed for it.
"""

import hashlib
import json
import os
import shutil
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mlx_forget.durable_files import read_object
from mlx_forget.engines import Task
from mlx_forget.engines.child import Child
from mlx_forget.errors import UserError

_SECONDS_BETWEEN_BEATS = 2.0
_SECONDS_BETWEEN_LOOKS = 0.25
# A network file system may show a new file late.
_SECONDS_TO_APPEAR = 30.0
# Network file systems keep attributes for up to a minute.
SECONDS_TO_LAPSE = 150.0

_STOPPED = 143


@dataclass(frozen=True)
class Lease:
    """What a worker knows of the sweep that it works for.

    Args:
        folder: of the lease.
        seconds_to_lapse: how long the beat may stand still.
        working_folder: where the sweep was started; relative paths in configurations begin there.
        variables: what the environment of runs must hold.
    """

    folder: Path
    seconds_to_lapse: float
    working_folder: Path
    variables: dict[str, str]

    def beat(self) -> dict[str, object] | None:
        """What the sweep wrote last; None where there is nothing to read."""
        try:
            return read_object(self.folder / "beat.json")
        except (OSError, ValueError):
            return None

    def mark(self, task: Task) -> Path:
        """The file that says a task is attended."""
        return self.folder / "attended" / hashlib.sha256(str(task.folders[0]).encode()).hexdigest()[:16]


class Leaseholder:
    """The sweep's side of a lease: a thread writes the beat until the sweep ends, however it ends."""

    def __init__(self, sweep_folder: Path, variables: dict[str, str], seconds_to_lapse: float = SECONDS_TO_LAPSE) -> None:
        sweep_folder = sweep_folder.absolute()
        sweep_folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(sweep_folder)
        folder = sweep_folder / f".sweep-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self.lease = Lease(folder, seconds_to_lapse, Path.cwd(), variables)
        (folder / "attended").mkdir(parents=True)
        self._count = 0
        self._stop = False
        self._write = threading.Lock()
        self._closed = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lease")
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(min(_SECONDS_BETWEEN_BEATS, self.lease.seconds_to_lapse / 4)):
            self._beat()

    def _beat(self) -> None:
        with self._write:
            self._count += 1
            aside = self.lease.folder / ".beat.part"
            aside.write_text(json.dumps({"count": self._count, "stop": self._stop}), encoding="utf-8")
            os.replace(aside, self.lease.folder / "beat.json")

    def stop(self) -> None:
        """Ask every worker to end its run with a checkpoint."""
        self._stop = True
        self._beat()

    def close(self) -> None:
        """Give the lease up; workers that still hold it end their runs."""
        self._closed.set()
        self._thread.join()
        shutil.rmtree(self.lease.folder, ignore_errors=True)


def _remove_abandoned(sweep_folder: Path) -> None:
    """Remove leases of sweeps that were killed on this machine."""
    for folder in sweep_folder.glob(f".sweep-{socket.gethostname()}-*"):
        number = folder.name.split("-")[-2]
        if number.isdecimal() and not is_alive(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class Attendance:
    """A worker's side: one task and the child that trains it."""

    def __init__(self, task: Task, lease: Lease) -> None:
        self._task, self._lease = task, lease
        self._child: Child | None = None

    def run(self) -> int:
        """Train the task and return the command's exit code; 143 when it was stopped because the sweep says so, or is gone.

        Raises:
            UserError: this machine does not see the sweep's folder.
        """
        last = self._first_beat()
        if last.get("stop"):
            return _STOPPED
        mark = self._lease.mark(self._task)
        mark.write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")
        os.chdir(self._lease.working_folder)
        changed = time.monotonic()
        self._child = Child(self._task, self._lease.variables)
        try:
            while (code := self._child.poll()) is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                beat = self._lease.beat()
                if beat is not None and beat != last:
                    last, changed = beat, time.monotonic()
                if last.get("stop") or time.monotonic() - changed > self._lease.seconds_to_lapse:
                    self._child.stop()
                    code = self._child.wait()
                    break
        except KeyboardInterrupt:
            # How Ray cancels a task that has begun.
            return self.stop()
        mark.unlink(missing_ok=True)
        return code

    def stop(self) -> int:
        """End the child with a checkpoint: the worker itself is told to go."""
        if self._child is None:
            return _STOPPED
        self._child.stop()
        return self._child.wait()

    def _first_beat(self) -> dict[str, object]:
        until = time.monotonic() + min(_SECONDS_TO_APPEAR, self._lease.seconds_to_lapse)
        while (beat := self._lease.beat()) is None:
            if time.monotonic() > until:
                raise UserError(
                    f"{socket.gethostname()} does not see {self._lease.folder.parent}, or its sweep has ended: all machines of a "
                    "cluster must share the sweep's folder and FORGET_HOME."
                )
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return beat


def attend(task: Task, lease: Lease) -> int:
    """Train a task as a worker of a cluster; see `Attendance.run`."""
    return Attendance(task, lease).run()
