"""A recipe is a grid of runs. Each run is the ordinary command in a process of its own; what is done is skipped, what was begun resumes.

name: figure1
config: {model: 0.65m, target: code, ...}     # keys of TrainConfig
arms: {plain: {method: plain}, ...}           # named variants; each is laid over config, and runs the whole grid
grid: {p: [0, 1%], seed: [0, 1]}              # every combination is a run
stages: [{target: code}, {target: math}]      # each starts from the one before (see `stages`); laid over config and arms
smoke: {config: {...}, grid: {...}}           # laid over the above when FORGET_SCALE=smoke
"""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget import records
from mlx_forget.config import TrainConfig, from_layers, read_yaml, to_yaml
from mlx_forget.errors import Interrupted, UserError, unknown
from mlx_forget.plan import Plan, plan_run
from mlx_forget.progress import PROGRESS_FILE, SUPERVISOR
from mlx_forget.stacking import Wanted, group_runs
from mlx_forget.watch import Watch

_SECONDS_BETWEEN_POLLS = 0.25
# The configuration of a run in its folder, as the sweep asked for it.
REQUESTED = "requested.yaml"


@dataclass(frozen=True)
class Recipe:
    """A named grid over training configurations."""

    name: str
    config: Mapping[str, Any]
    grid: Mapping[str, list[Any]]
    description: str = ""
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stages: tuple[Mapping[str, Any], ...] = ()

    def configs(self, overrides: Mapping[str, Any]) -> list[TrainConfig]:
        """Every run of the grid, `overrides` laid over it: a list adds or replaces an axis, any other value takes an axis away.

        Raises:
            UserError: an axis that names no key, or an empty one.
        """
        fixed = {key: value for key, value in overrides.items() if not isinstance(value, list)}
        axes = {key: value for key, value in {**self.grid, **overrides}.items() if isinstance(value, list)}
        for key, values in axes.items():
            if not values:
                raise UserError(f"Grid axis {key!r} is empty.")
        cells = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        variants: list[Mapping[str, Any]] = list(self.arms.values()) or [{}]
        return [from_layers(TrainConfig, self.config, arm, fixed, cell, where="recipe") for arm in variants for cell in cells]


def read_recipe(path: Path) -> Recipe:
    """A recipe file.

    Raises:
        UserError: not a recipe, or unknown keys.
    """
    content = read_yaml(path)
    known = {"name", "description", "config", "arms", "grid", "stages", "smoke"}
    for key in content:
        if key not in known:
            raise unknown("recipe key", key, known)
    smoke = content.get("smoke") or {}
    for name, part in (("smoke", smoke), *((name, content.get(name)) for name in ("config", "grid", "arms"))):
        if part is not None and not (isinstance(part, dict) and all(isinstance(key, str) for key in part)):
            raise UserError(f"{path}: {name} must be a mapping of keys to values.")
    if not all(isinstance(part or {}, dict) for part in smoke.values()):
        raise UserError(f"{path}: what smoke changes must be mappings of keys to values.")
    scaled = set[str]()
    config, grid = dict(content.get("config") or {}), dict(content.get("grid") or {})
    if os.environ.get("FORGET_SCALE") == "smoke":
        config, grid = config | (smoke.get("config") or {}), grid | (smoke.get("grid") or {})
        scaled = set(smoke.get("config") or {})
    for key, values in grid.items():
        if not isinstance(values, list):
            raise UserError(f"{path}: grid axis {key!r} must be a list of values.")
    arms = dict(content.get("arms") or {})
    for arm, values in arms.items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: arm {arm!r} must be a mapping of keys to values.")
    stages = content.get("stages") or []
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{path}: stages must be a list of mappings of keys to values.")
    # What the smoke scale sets, no stage sets otherwise.
    stages = [{key: value for key, value in stage.items() if key not in scaled} for stage in stages]
    return Recipe(content.get("name", path.stem), config, grid, content.get("description", ""), arms, tuple(stages))


@dataclass
class Job:
    """One run of a sweep and the process that trains it, alone or with the others of its stack."""

    plan: Plan
    title: str
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    exit_code: int | None = None
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> str:
        if self.process is not None:
            return "running"
        if self.exit_code is None:
            return "waiting"
        return {0: "done", 130: "interrupted", 143: "interrupted"}.get(self.exit_code, "failed")


@dataclass(frozen=True)
class Sweep:
    """A planned sweep: the runs, and the base models that must be there first.

    Args:
        stacks: the runs again, those together that one process trains as one.
        notes: why they are together, or not.
    """

    folder: Path
    jobs: list[Job]
    bases: list[Job]
    stacks: list[list[Job]]
    notes: list[str]


def plan_sweep(recipe: Recipe, folder: Path, *, overrides: Mapping[str, Any] | None = None, watch: Watch | None = None) -> Sweep:
    """Resolve and check every run; each is trained alone until `stack_sweep` says otherwise.

    Raises:
        UserError: anything that cannot work, or two runs with one id.
    """
    assert not recipe.stages, "stages follow one another: plan_stages"
    configs = recipe.configs(overrides or {})
    jobs: dict[str, Job] = {}
    bases: dict[Path, Job] = {}
    for number, config in enumerate(configs):
        plan = plan_run(config, watch=watch if number == 0 else Watch(progress=watch.progress) if watch else None)
        plan = dataclasses.replace(plan, folder=folder / plan.folder.name)
        if plan.run_id in jobs:
            raise UserError(
                f"Two runs of the grid are the same run, {plan.run_id}: {jobs[plan.run_id].title} and {_title(config, configs)}."
            )
        jobs[plan.run_id] = Job(plan, _title(config, configs), plan.folder / "log.txt")
        if plan.base is not None:
            bases.setdefault(
                plan.base.folder,
                Job(plan.base, f"base {plan.base.config.model}, seed {plan.base.config.seed}", plan.base.folder / "log.txt"),
            )
    runs = list(jobs.values())
    return Sweep(folder, runs, list(bases.values()), [[job] for job in runs], [])


def stack_sweep(sweep: Sweep, wanted: Wanted, *, num_processes: int) -> Sweep:
    """The sweep with runs of one shape put together into stacks, where they can be and it pays (see `stacking`).

    Args:
        wanted: auto, off, or how many at a time.
        num_processes: stacks that will share the device's memory.
    """
    groups, notes = group_runs([job.plan for job in sweep.jobs], wanted, num_processes=num_processes)
    stacks = [[sweep.jobs[number] for number in numbers] for numbers in groups]
    for together in stacks:
        for job in together:
            job.log = together[0].log
    return dataclasses.replace(sweep, stacks=stacks, notes=notes)


def execute_sweep(
    sweep: Sweep,
    *,
    num_processes: int,
    num_threads: int,
    on_change: Callable[[list[Job]], None] = lambda jobs: None,
    interrupted: Callable[[], int | None] = lambda: None,
) -> list[Job]:
    """Train what is not done: base models first, then runs or stacks, `num_processes` at a time with `num_threads` threads each.

    A single base gets all threads. Returns every job; an interrupted sweep leaves checkpoints and raises Interrupted.
    """
    everything = [*sweep.bases, *sweep.jobs]
    for stage in ([[base] for base in sweep.bases], sweep.stacks):
        if not stage:
            continue
        at_once = min(num_processes, len(stage))
        threads = max(num_threads, num_processes * num_threads // at_once)
        _run_stage(stage, everything, at_once, threads, on_change, interrupted)
        if any(job.state == "failed" for together in stage for job in together):
            break
    return everything


def _run_stage(
    stage: list[list[Job]],
    everything: list[Job],
    at_once: int,
    num_threads: int,
    on_change: Callable[[list[Job]], None],
    interrupted: Callable[[], int | None],
) -> None:
    jobs = [job for together in stage for job in together]
    for job in jobs:
        if records.read_record(job.plan.folder) is not None:
            job.exit_code = 0
    waiting = [left for together in stage if (left := [job for job in together if job.exit_code is None])]
    stopping = False
    try:
        while waiting or _processes(jobs):
            if interrupted() and not stopping:
                stopping, waiting = True, []
                for process in _processes(jobs):
                    process.send_signal(signal.SIGTERM)
            while waiting and len(_processes(jobs)) < at_once:
                _start(waiting.pop(0), num_threads)
            for job in jobs:
                _poll(job)
            on_change(everything)
            time.sleep(_SECONDS_BETWEEN_POLLS)
    finally:
        for process in _processes(jobs):
            process.kill()
    if stopping:
        raise Interrupted("interrupted; the same command goes on from there", signal=interrupted() or signal.SIGINT)
    on_change(everything)


def _processes(jobs: list[Job]) -> "list[subprocess.Popen[bytes]]":
    """The processes that run, each once."""
    return list({id(job.process): job.process for job in jobs if job.process is not None}.values())


def _start(together: list[Job], num_threads: int) -> None:
    for job in together:
        folder = job.plan.folder
        folder.mkdir(parents=True, exist_ok=True)
        config = dataclasses.replace(job.plan.config, num_threads=num_threads)
        (folder / REQUESTED).write_text(to_yaml(config), encoding="utf-8")
    folders = [str(job.plan.folder) for job in together]
    command = [sys.executable, "-m", "mlx_forget", "train", "--config", f"{folders[0]}/{REQUESTED}", "--output", folders[0]]
    for folder_name in folders[1:]:
        command += ["--stack-with", folder_name]
    environment = {**os.environ, SUPERVISOR: str(os.getpid()), "OMP_NUM_THREADS": str(num_threads), "PYTHONUNBUFFERED": "1"}
    with together[0].log.open("ab") as log:
        # A session of its own: a Ctrl-C on the terminal reaches the sweep alone, which passes it on once.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    for job in together:
        job.process = process


def _poll(job: Job) -> None:
    if job.process is None:
        return
    try:
        job.progress = json.loads((job.plan.folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        job.progress = {}
    code = job.process.poll()
    if code is not None:
        record = records.read_record(job.plan.folder)
        # A run of a stack may have ended well where another has not.
        ended_well = record is not None and record["status"] != "diverged"
        job.process, job.exit_code = None, 0 if ended_well else 128 - code if code < 0 else code


def _title(config: TrainConfig, configs: list[TrainConfig]) -> str:
    """The keys in which a run differs from the others."""
    varying = [f.name for f in dataclasses.fields(config) if len({str(getattr(other, f.name)) for other in configs}) > 1] or ["p"]
    return ", ".join(f"{name} = {getattr(config, name)}" for name in varying)


def default_processes() -> int:
    """Processes that run side by side on the CPU: one a core, at most eight."""
    return int(np.clip(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 1, 8))
