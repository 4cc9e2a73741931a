"""Carrying out a sweep: base models first, every run once, on whatever engine; what died is taken up again, what failed is kept in mind.

A run that has a record is done. One that failed leaves `failure.json` in its folder; it is listed and left alone until a retry is asked
for. A run that another sweep is training in the same folder is left to it.
"""

import dataclasses
import glob
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget import records
from mlx_forget.config_layers import to_yaml
from mlx_forget.durable_files import read_object, sync
from mlx_forget.engines import STOPPED, Engine, Exit, Task
from mlx_forget.engines.child import last_line
from mlx_forget.engines.lease import is_alive
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.progress import read_progress
from mlx_forget.records import FAILURE, REQUESTED
from mlx_forget.runs.missing import note_planned
from mlx_forget.sweeps.grid import Resources
from mlx_forget.sweeps.sweep import Job, Sweep
from mlx_forget.training.folder import is_held
from mlx_forget.training.watch import Watch

_SECONDS_BETWEEN_LOOKS = 0.25
# How often a run that another sweep trains is looked at.
_SECONDS_BETWEEN_PROBES = 1.0
# Folders of a run are looked into this often at most, so that hundreds of runs do not wear a network file system out.
_FILES_PER_SECOND = 40
# How often a run is taken up again that gets no further before its worker dies.
_MOST_LOSSES = 3
_ENDED = ("done", "failed", "blocked")


@dataclass(eq=False)
class _Unit:
    """What one task trains: a base model, a run, or a stack of runs."""

    jobs: list[Job]
    resources: Resources
    base: Job | None = None
    task: Task | None = None
    num_losses: int = 0
    step_at_loss: int = -1
    looked: float = -1.0

    @property
    def left(self) -> list[Job]:
        return [job for job in self.jobs if job.state not in _ENDED]


def execute_sweep(
    sweep: Sweep,
    engine: Engine,
    *,
    retry_failed: bool = False,
    on_change: Callable[[list[Job]], None] = lambda jobs: None,
    watch: Watch | None = None,
) -> list[Job]:
    """Train what is not done, and return every job, base models first.

    Args:
        retry_failed: also what failed before.
        watch: `interrupted` stops the sweep; `say` is told of workers that died.

    Raises:
        UserError: no place of the engine is large enough for a run.
        Interrupted: a stop was asked for; whatever was running has a checkpoint.
        RunFailed: the cluster no longer answers.
    """
    watch = watch or Watch()
    everything = [*sweep.bases, *sweep.jobs]
    for job in everything:
        look_back(job, retry=retry_failed)
    if any(job.state not in _ENDED for job in sweep.jobs):
        note_planned(sweep.folder, {job.plan.folder.name: job.title for job in sweep.jobs})
    base_of = {base.plan.folder: base for base in sweep.bases}

    def unit(jobs: list[Job], num_tasks: int) -> _Unit:
        base = jobs[0].plan.base
        given = engine.resources(jobs[0].resources, num_tasks=num_tasks)
        return _Unit(jobs, given, None if base is None else base_of[base.folder])

    try:
        units = [unit([base], len(sweep.bases)) for base in sweep.bases]
        units += [unit(stack, len(sweep.stacks)) for stack in sweep.stacks]
        dispatch = _Dispatch(engine, [unit for unit in units if unit.left], watch)
        while dispatch.step():
            on_change(everything)
            if not engine.speaks:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        engine.close()
    on_change(everything)
    number = watch.interrupted()
    if number and any(job.state not in _ENDED for job in everything):
        raise Interrupted("interrupted; the same command goes on from there", signal=number)
    return everything


class _Dispatch:
    """Which unit waits, which runs, and what to do when one ends."""

    def __init__(self, engine: Engine, waiting: list[_Unit], watch: Watch) -> None:
        self._engine, self._waiting, self._watch = engine, waiting, watch
        self._running: dict[Task, _Unit] = {}
        self._stopping = False

    def step(self) -> bool:
        """Start what can be, settle what has ended; whether anything is left to do."""
        if self._watch.interrupted() and not self._stopping:
            self._stopping = True
            self._engine.stop()
        if not self._stopping:
            self._waiting = [unit for unit in self._waiting if not self._begin(unit)]
        for task, exit_ in self._engine.ended():
            self._settle(self._running.pop(task), exit_)
        self._read_progress()
        return bool(self._running) or (bool(self._waiting) and not self._stopping)

    def _begin(self, unit: _Unit) -> bool:
        """Whether a waiting unit need wait no longer: it was started, or there is nothing left to train."""
        if unit.base is not None and unit.base.state in ("failed", "blocked"):
            for job in unit.left:
                job.state, job.reason = "blocked", f"{unit.base.title} failed"
            return True
        if unit.base is not None and unit.base.state != "done":
            return False
        if not self._engine.accepts(_task(unit)) or self._is_elsewhere(unit):
            return False
        if not unit.left:
            return True
        task = _task(unit)
        for job in unit.left:
            self._request(job, task)
        unit.task = task
        self._running[task] = unit
        self._engine.start(task)
        return True

    def _is_elsewhere(self, unit: _Unit) -> bool:
        """Whether another sweep trains some of it; looked at now and then, and again whenever it may start."""
        now = time.monotonic()
        if any(job.state == "elsewhere" for job in unit.jobs) and now - unit.looked < _SECONDS_BETWEEN_PROBES:
            return True
        unit.looked = now
        for job in unit.left:
            held = is_held(job.plan.folder)
            if not held and records.read_record(job.plan.folder) is not None:
                look_back(job, retry=False)
            else:
                job.state = "elsewhere" if held else "waiting"
        return any(job.state == "elsewhere" for job in unit.jobs)

    def _request(self, job: Job, task: Task) -> None:
        """Write down in the run's folder what is asked for, and forget an earlier failure."""
        folder = job.plan.folder
        folder.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(job.plan.config, num_threads=task.resources.threads)
        if self._engine.remote:
            # Another machine would choose for itself, and the run would have another name than the one it was planned under.
            config = dataclasses.replace(config, backend=job.plan.backend, precision=job.plan.precision)
        _write(folder / REQUESTED, to_yaml(config))
        (folder / FAILURE).unlink(missing_ok=True)
        _remove_asides(folder / FAILURE)
        job.state, job.reason = "queued", ""

    def _settle(self, unit: _Unit, exit_: Exit) -> None:
        unit.task = None
        for job in unit.left:
            # A run of a stack may have ended well where another has not.
            look_back(job, retry=False)
        left = unit.left
        if not left:
            return
        if self._stopping or self._watch.interrupted():
            for job in left:
                job.state = "interrupted"
        elif (died := _died(exit_)) and self._may_go_on(unit):
            for job in left:
                job.state = "waiting"
            self._waiting.append(unit)
            self._watch.say(f"{left[0].title}: {died}. It is taken up again.")
        else:
            for job in left:
                job.state, job.reason = "failed", exit_.reason or _died(exit_) or last_line(job.log)
                _note_failure(job, exit_)

    def _may_go_on(self, unit: _Unit) -> bool:
        """Whether it got further since it was lost before, or was not lost often."""
        step = max((job.progress.get("step", 0) for job in unit.jobs), default=0)
        if step > unit.step_at_loss:
            unit.num_losses, unit.step_at_loss = 0, step
        unit.num_losses += 1
        return unit.num_losses <= _MOST_LOSSES

    def _read_progress(self) -> None:
        now = time.monotonic()
        for task, unit in self._running.items():
            if now - unit.looked < len(self._running) / _FILES_PER_SECOND:
                continue
            unit.looked = now
            begun = self._engine.begun(task)
            for job in unit.left:
                job.state = "running" if begun else "queued"
                job.progress = read_progress(job.plan.folder) or job.progress


def unfinished_strangers(sweep: Sweep) -> list[Path]:
    """Folders within the sweep's that hold begun runs which are none of its own."""
    own = {job.plan.folder.name for job in sweep.jobs}
    begun = (".lock", REQUESTED, records.CONFIG, "checkpoints")
    return [
        folder
        for folder in sorted(sweep.folder.glob("*/"))
        if folder.name not in own
        and not folder.name.startswith(".")
        and not (folder / records.RECORD).exists()
        and any((folder / name).exists() for name in begun)
    ]


def _task(unit: _Unit) -> Task:
    left = unit.left
    together = "" if len(left) == 1 else f" and {len(left) - 1} more"
    return Task(
        title=left[0].title + together,
        folders=tuple(job.plan.folder.absolute() for job in left),
        log=left[0].log.absolute(),
        resources=unit.resources,
    )


def look_back(job: Job, *, retry: bool) -> None:
    """What earlier sweeps left: a record, a failure, or neither."""
    folder = job.plan.folder
    job.state, job.reason = "waiting", ""
    try:
        record = records.read_record(folder)
    except UserError as error:
        if not retry:
            job.state, job.reason = "failed", str(error)
            return
        os.replace(folder / records.RECORD, folder / f"damaged-{records.RECORD}")
        record = None
    if record is not None:
        _of_record(job, record)
        if job.state == "failed" and retry:
            os.replace(folder / records.RECORD, folder / f"diverged-{records.RECORD}")
            job.state, job.reason = "waiting", ""
        return
    if not retry and (folder / FAILURE).is_file():
        try:
            found = read_object(folder / FAILURE)
        except (OSError, ValueError):
            found = {}
        job.state, job.reason = "failed", str(found.get("reason", "it failed before"))


def _of_record(job: Job, record: dict[str, Any]) -> None:
    if record["run_id"] != job.plan.run_id:
        job.state, job.reason = "failed", f"{job.plan.folder} holds another run, {record['run_id']}"
    elif record["status"] == "diverged":
        job.state, job.reason = "failed", f"diverged: {record['reason']}"
    else:
        job.state, job.reason = "done", ""


def _died(exit_: Exit) -> str:
    """How a task ended that was ended from without; empty for one that ended by itself."""
    if exit_.code is None:
        return exit_.reason or "its worker died"
    if exit_.code in STOPPED or exit_.code > 128:
        number = exit_.code - 128
        names = {one.value: one.name for one in signal.Signals}
        return f"it was ended from without ({names.get(number, f'signal {number}')})"
    return ""


def _note_failure(job: Job, exit_: Exit) -> None:
    content = {
        "schema_version": 1,
        "run_id": job.plan.run_id,
        "exit_code": exit_.code,
        "reason": job.reason,
        "log": str(job.log),
        "ended_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    _write(job.plan.folder / FAILURE, json.dumps(content, indent=1))


def _write(path: Path, text: str) -> None:
    """Write a file that other sweeps may be writing too, each aside under a name of its own."""
    _remove_asides(path)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _remove_asides(path: Path) -> None:
    """Remove what sweeps that were killed on this machine left of a file."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(socket.gethostname())}.*.part"):
        number = aside.name.split(".")[-2]
        if number.isdecimal() and not is_alive(int(number)):
            aside.unlink(missing_ok=True)


def states(jobs: Iterable[Job]) -> dict[str, int]:
    """How many jobs are in each state."""
    counts: dict[str, int] = {}
    for job in jobs:
        counts[job.state] = counts.get(job.state, 0) + 1
    return counts
