"""Continual learning: a recipe whose runs are stages, each of which starts from the one before.

stages:
  - {target: code}                  # keys of TrainConfig, laid over the recipe's config and arms
  - {target: math, keep: best}      # which checkpoint goes on to the next stage: end (by default) or best
  - {name: more code, target: cpp}  # a stage is called by its target unless it has a name

Each stage is an ordinary run. The reference of its KL term and anchors is the model that it starts from, so it is set anew at every
stage. Replay is from all that came before: `replay_data: self` samples the start model, and `replay_data: earlier` takes, in equal
parts, the pretraining data and the tokens that each earlier stage learnt from. The rate is that of a finetune of the first start model.

An arm and a cell of the grid make one chain of stages; chains are trained side by side, stage by stage. What is checked before anything
is trained is every stage of every chain, as if each started from the first start model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from mlx_forget.config import TrainConfig
from mlx_forget.config_keys import REPLAY_SELF
from mlx_forget.errors import UserError, unknown
from mlx_forget.methods import METHODS
from mlx_forget.pipeline.opened import Opened
from mlx_forget.pipeline.sides import Blend
from mlx_forget.sweeps.dispatch import look_back
from mlx_forget.sweeps.grid import Point, Recipe, Resources, labels
from mlx_forget.sweeps.sweep import Job, Sweep, base_job, most
from mlx_forget.training.data import sources_of
from mlx_forget.training.plan import Plan, plan_run
from mlx_forget.training.watch import Watch

EARLIER = "earlier"
Keep = Literal["end", "best"]
CHECKPOINT_OF: dict[Keep, str] = {"end": "last", "best": "best"}


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe: its name, its keys, and which of its checkpoints goes on."""

    name: str
    keys: Mapping[str, Any]
    keep: Keep


@dataclass(frozen=True)
class Chain:
    """Stages that follow one another.

    Args:
        label: the arm and the cell of the grid.
        plans: of each stage, as if it started from the start model of the first one: all but the start and the run's name is final.
        resources: what the recipe lets the run of each stage use.
    """

    label: str
    stages: tuple[Stage, ...]
    plans: tuple[Plan, ...]
    resources: tuple[Resources, ...]

    def title(self, number: int) -> str:
        """A stage in words."""
        return _title(self.label, self.stages[number])

    def plan(self, number: int, before: Path | None, *, watch: Watch | None = None, opened: Opened | None = None) -> Plan:
        """The plan of a stage that starts from the run folder of the one before; the first stage has none before it."""
        checked = self.plans[number]
        if before is None:
            return checked
        factor = checked.config.method_spec().learning_rate_factor
        start = before / "checkpoints" / CHECKPOINT_OF[self.stages[number - 1].keep]
        config = dataclasses.replace(checked.config, init=str(start), base={}, learning_rate=checked.schedule.peak / factor)
        return plan_run(config, watch=watch, opened=opened)


def plan_stages(recipe: Recipe, *, overrides: Mapping[str, Any] | None = None, watch: Watch | None = None) -> list[Chain]:
    """Resolve and check every stage of every chain.

    Raises:
        UserError: anything that cannot work.
    """
    watch = watch or Watch()
    stages = _read(recipe)
    chains, quiet, opened = [], Watch(progress=watch.progress), Opened()
    for number, (label, points) in enumerate(_labelled(recipe, stages, overrides)):
        plans: list[Plan] = []
        for point in points:
            config = _with_earlier(point.config, plans)
            plans.append(plan_run(config, watch=quiet if number or plans else watch, opened=opened))
        chains.append(Chain(label, stages, tuple(plans), tuple(point.resources for point in points)))
    return chains


def titled_stages(recipe: Recipe, overrides: Mapping[str, Any] | None = None) -> list[list[tuple[Point, str]]]:
    """Every chain as its stages with their titles; nothing is read but the recipe.

    What a later stage replays of earlier ones is known once these have been planned; here it replays itself, which costs the same.
    """
    stages = _read(recipe)
    return [
        [(_alone(point, is_first=number == 0), _title(label, stages[number])) for number, point in enumerate(points)]
        for label, points in _labelled(recipe, stages, overrides)
    ]


def planned_so_far(chains: list[Chain], folder: Path, *, watch: Watch | None = None) -> list[tuple[int, bool, Job]]:
    """Every stage of every chain: its number from 1, whether its name is final, and its job as earlier sweeps left it.

    A stage has its name once the stage before it is done.
    """
    rows: list[tuple[int, bool, Job]] = []
    opened = Opened()
    for chain in chains:
        before: Job | None = None
        for number in range(len(chain.stages)):
            named = number == 0 or (before is not None and before.state == "done")
            plan = (
                chain.plan(number, before.plan.folder if before else None, watch=watch, opened=opened)
                if named
                else chain.plans[number]
            )
            plan = dataclasses.replace(plan, folder=folder / plan.folder.name)
            before = Job(plan, chain.title(number), plan.folder / "log.txt", chain.resources[number])
            if named:
                look_back(before, retry=False)
            rows.append((number + 1, named, before))
    return rows


def execute_stages(
    chains: list[Chain],
    folder: Path,
    *,
    run: Callable[[Sweep], list[Job]],
    done: Callable[[list[list[Path]]], None] = lambda folders: None,
    watch: Watch | None = None,
) -> list[Job]:
    """Train what is not done, stage by stage; returns the jobs of every stage that was begun.

    Args:
        run: trains a sweep, such as `execute_sweep`.
        done: called after each stage with the run folders of each chain so far.
    """
    quiet = Watch() if watch is None else Watch(progress=watch.progress)
    folders: list[list[Path]] = [[] for _ in chains]
    jobs: dict[Path, Job] = {}
    for number in range(len(chains[0].stages)):
        sweep = _sweep_of(chains, number, folder, folders, quiet)
        ran = run(sweep)
        jobs |= {job.plan.folder: job for job in ran}
        if any(job.state != "done" for job in ran):
            break
        done(folders)
    return list(jobs.values())


def _sweep_of(chains: list[Chain], number: int, folder: Path, folders: list[list[Path]], watch: Watch) -> Sweep:
    """One stage of all chains as a sweep; the run folders are added to those of the chains. A run that two chains share is one."""
    jobs: dict[str, Job] = {}
    bases: dict[Path, Job] = {}
    opened = Opened()
    for chain, before in zip(chains, folders, strict=True):
        plan = chain.plan(number, before[-1] if before else None, watch=watch, opened=opened)
        plan = dataclasses.replace(plan, folder=folder / plan.folder.name)
        before.append(plan.folder)
        asked = chain.resources[number]
        jobs.setdefault(plan.run_id, Job(plan, chain.title(number), plan.folder / "log.txt", asked))
        if plan.base is not None:
            base = bases.setdefault(plan.base.folder, base_job(plan.base))
            base.resources = most(base.resources, asked)
    runs = list(jobs.values())
    return Sweep(folder, runs, list(bases.values()), [[job] for job in runs], [])


def _title(label: str, stage: Stage) -> str:
    return ", ".join(part for part in (label, stage.name) if part)


def _labelled(recipe: Recipe, stages: tuple[Stage, ...], overrides: Mapping[str, Any] | None) -> list[tuple[str, list[Point]]]:
    """Every chain: what it is called, and the point of each of its stages."""
    arms = recipe.arms or {"": {}}
    of_stages = []
    for stage in stages:
        over = dataclasses.replace(recipe, arms={name: {**arm, **stage.keys} for name, arm in arms.items()})
        of_stages.append(over.runs(overrides))
    return [(label, [points[number] for points in of_stages]) for number, label in enumerate(labels(of_stages[0]))]


def _read(recipe: Recipe) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for given in recipe.stages:
        keys = dict(given)
        name, keep = keys.pop("name", None), keys.pop("keep", "end")
        for key in ("init", "base"):
            if key in keys:
                raise UserError(f"A stage starts from the one before: give {key} to the recipe's config, for the first stage.")
        if keep not in CHECKPOINT_OF:
            raise unknown("keep", keep, CHECKPOINT_OF)
        name = str(name or keys.get("target") or keys.get("data") or f"stage {len(stages) + 1}")
        if name in (stage.name for stage in stages):
            raise UserError(f"Two stages are called {name!r}: give them names.")
        stages.append(Stage(name, keys, keep))
    if len(stages) < 2:
        raise UserError("Stages follow one another: a recipe needs at least two.")
    return tuple(stages)


def _alone(point: Point, *, is_first: bool) -> Point:
    """A stage without those before it."""
    if is_first or point.config.replay_data != EARLIER:
        return dataclasses.replace(point, config=_with_earlier(point.config, []))
    return dataclasses.replace(point, config=dataclasses.replace(point.config, replay_data=REPLAY_SELF))


def _with_earlier(config: TrainConfig, before: list[Plan]) -> TrainConfig:
    """The configuration with `replay_data: earlier` spelt out."""
    if config.replay_data != EARLIER:
        return config
    if not METHODS[config.method].reads_replay:
        return dataclasses.replace(config, replay_data=REPLAY_SELF)
    parts = [sources_of(plan.config.target) for plan in before]
    if config.pretrain is not None:
        parts.append(sources_of(config.pretrain))
    if not parts:
        raise UserError("The first stage has no earlier data to replay and --pretrain is none: give it method: plain.")
    shares: dict[str, Fraction] = {}
    for part in parts:
        for name, share in part.items():
            shares[name] = shares.get(name, Fraction(0)) + share / len(parts)
    limits: dict[str, int] = {}
    for plan in before:
        side = plan.stream.target
        members = side.members if isinstance(side, Blend) else (side,)
        for name, member in zip(sources_of(plan.config.target), members, strict=True):
            learnt = member.num_tokens if member.rows.is_padded else member.num_rows * member.row_length
            limits[name] = max(limits.get(name, 0), learnt)
    limits = {name: limit for name, limit in limits.items() if name not in sources_of(config.pretrain)}
    text = next(iter(shares)) if len(shares) == 1 else ",".join(f"{name}={share}" for name, share in shares.items())
    return dataclasses.replace(config, replay_data=text, replay_limits=limits)
