"""A sweep: the runs of a recipe, planned and checked, with the base models that they share."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_forget.config import TrainConfig
from mlx_forget.errors import UserError
from mlx_forget.pipeline.opened import Opened
from mlx_forget.sweeps.grid import Point, Recipe, Resources, titles
from mlx_forget.sweeps.stacking import Wanted, group_runs
from mlx_forget.training.plan import HERE, Plan, Target, plan_run
from mlx_forget.training.watch import Watch

NOTHING_ASKED = Resources()


@dataclass(eq=False)
class Job:
    """One run of a sweep and where it stands.

    Args:
        resources: what the recipe asks for.
        state: waiting, queued, running, elsewhere (another sweep trains it), done, failed, blocked (its base failed) or interrupted.
        reason: why it failed.
        progress: what the run last wrote about itself.
    """

    plan: Plan
    title: str
    log: Path
    resources: Resources = field(default_factory=Resources)
    state: str = "waiting"
    reason: str = ""
    progress: dict[str, Any] = field(default_factory=dict)


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


def plan_sweep(
    recipe: Recipe,
    folder: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    resources: Resources = NOTHING_ASKED,
    target: Target = HERE,
    watch: Watch | None = None,
) -> Sweep:
    """Resolve and check every run; each is trained alone until `stack_sweep` says otherwise.

    Args:
        resources: what runs may use, over what the recipe says.
        target: the devices that it is planned for; how many a run has, its resources say.

    Raises:
        UserError: anything that cannot work, two runs with one id, or an axis that a shared base model cannot follow.
    """
    assert not recipe.stages, "stages follow one another: plan_stages"
    jobs: dict[str, Job] = {}
    bases: dict[Path, Job] = {}
    opened = Opened()
    for number, (point, here) in enumerate(titled_runs(recipe, overrides)):
        asked = resources.over(point.resources)
        here_or_there = dataclasses.replace(target, num_devices=asked.num_ranks) if asked.num_ranks > 1 else target
        quiet = watch if number == 0 else Watch(progress=watch.progress) if watch else None
        plan = plan_run(point.config, watch=quiet, target=here_or_there, opened=opened)
        plan = dataclasses.replace(plan, folder=folder / plan.folder.name)
        if plan.run_id in jobs:
            raise UserError(
                f"Two runs of the grid are the same run, {plan.run_id}: {jobs[plan.run_id].title} and {here}. "
                "Take one away, or let them differ in a key that changes the result."
            )
        jobs[plan.run_id] = Job(plan, here, plan.folder / "log.txt", asked)
        if plan.base is not None:
            base = bases.setdefault(plan.base.folder, base_job(plan.base))
            base.resources = most(base.resources, asked)
    runs = list(jobs.values())
    _check_tokenizers(runs)
    return Sweep(folder, runs, list(bases.values()), [[job] for job in runs], [])


def stack_sweep(sweep: Sweep, wanted: Wanted, *, num_processes: int) -> Sweep:
    """The sweep with runs of one shape put together into stacks, where they can be and it pays (see `stacking`).

    Args:
        wanted: auto, off, or how many at a time.
        num_processes: stacks that will share the device's memory.
    """
    groups, notes = group_runs([job.plan for job in sweep.jobs], wanted, num_processes=num_processes)
    stacks: list[list[Job]] = []
    for numbers in groups:
        alike: dict[Resources, list[Job]] = {}
        for number in numbers:
            alike.setdefault(sweep.jobs[number].resources, []).append(sweep.jobs[number])
        stacks.extend(alike.values())
    for together in stacks:
        for job in together:
            job.log = together[0].log
    return dataclasses.replace(sweep, stacks=stacks, notes=notes)


def base_title(config: TrainConfig) -> str:
    """A base model in words."""
    return f"base {config.model}, seed {config.seed}"


def base_job(base: Plan) -> Job:
    """The job that trains a base model."""
    return Job(base, base_title(base.config), base.folder / "log.txt")


def most(one: Resources, other: Resources) -> Resources:
    """What a base model may use: the most that any of its runs may."""
    pairs = {f.name: (getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Resources)}
    return Resources(**{name: max((v for v in pair if v is not None), default=None) for name, pair in pairs.items()})


def _check_tokenizers(jobs: list[Job]) -> None:
    """Runs of one start model have its tokenizer, whatever they ask for."""
    asked: dict[Path | str, tuple[str, TrainConfig]] = {}
    for job in jobs:
        plan = job.plan
        if plan.base is None and plan.start is None:
            continue
        start = plan.base.folder if plan.base is not None else str(plan.config.start_name)
        first, config = asked.setdefault(start, (job.title, plan.config))
        for key in ("tokenizer", "vocab_size"):
            if getattr(config, key) != getattr(plan.config, key):
                raise UserError(
                    f"The axis {key!r} changes the tokenizer, and these runs start from one model, {start}, which has its own: "
                    f"{first}; and {job.title}. Take {key!r} off the axes, or give every tokenizer a base of its own (init: auto)."
                )


def titled_runs(recipe: Recipe, overrides: Mapping[str, Any] | None) -> list[tuple[Point, str]]:
    """Every run of a recipe with its title."""
    points = recipe.runs(overrides)
    return list(zip(points, titles(points), strict=True))
