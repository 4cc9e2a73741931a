"""A recipe is a grid of runs: which training configurations, and what each may use.

name: figure1
config: {model: 0.65m, target: code, ...}     # keys of TrainConfig, and of `resources`
arms: {plain: {method: plain}, ...}           # named variants; each is laid over config, and runs the whole grid
list: [{seed: 0, p: 0}, {seed: 1, p: 1%}]     # points given one by one
zip: {model: [tiny, xl], resources.gpus: [1, 8]}    # axes that move together; or several such mappings, in a list
grid: {p: [0, 1%], base.seed: [0, 1]}         # axes of which every combination is a run
stages: [{target: code}, {target: math}]      # each starts from the one before (see `stages`); laid over config and arms
smoke: {config: {...}, grid: {...}}           # laid over the above when FORGET_SCALE=smoke; without it, that scale's defaults lie under

A key may be dotted: `base.seed` is the seed of the base model. `resources` says what a run may use and changes no run's name.
"""

import dataclasses
import itertools
import math
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_forget.config import TrainConfig, scale_defaults
from mlx_forget.config_layers import from_layers
from mlx_forget.errors import UserError, unknown
from mlx_forget.strict_yaml import read_given

_RESOURCES = "resources"


@dataclass(frozen=True)
class Resources:
    """What a run may use; None leaves it to the engine.

    Args:
        threads: CPU threads of each of its processes.
        gpus: GPUs of the run; a fraction shares one.
        ranks: processes of the run; None is one a GPU.
        memory_gb: memory that a cluster sets aside for it, in 1e9 bytes.
    """

    threads: int | None = field(default=None, metadata={"aliases": ()})
    gpus: float | None = field(default=None, metadata={"aliases": ()})
    ranks: int | None = field(default=None, metadata={"aliases": ()})
    memory_gb: float | None = field(default=None, metadata={"aliases": ()})

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("gpus", 0), ("ranks", 1), ("memory_gb", 0)):
            value = getattr(self, name)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise UserError(f"{_RESOURCES}.{name} must be at least {least}, it is {value}.")
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise UserError(f"{_RESOURCES}.gpus is a whole number or a fraction of one GPU, not {self.gpus:g}.")

    @property
    def num_ranks(self) -> int:
        return self.ranks or max(1, int(self.gpus or 1))

    def over(self, under: "Resources") -> "Resources":
        """These, where they are given, over others."""
        given = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}
        return dataclasses.replace(under, **given)


@dataclass(frozen=True)
class Point:
    """One run of a grid; `arm` is the name of its variant, "" in a recipe without arms."""

    config: TrainConfig
    resources: Resources
    arm: str = ""


@dataclass(frozen=True)
class Recipe:
    """A named grid over training configurations.

    Args:
        grid: axes of which every combination is a run.
        zips: axes that move together; each is one axis of the grid.
        points: runs given one by one; together one axis of the grid.
    """

    name: str
    config: Mapping[str, Any]
    grid: Mapping[str, list[Any]]
    description: str = ""
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stages: tuple[Mapping[str, Any], ...] = ()
    zips: Sequence[Mapping[str, list[Any]]] = ()
    points: Sequence[Mapping[str, Any]] | None = None

    def runs(self, overrides: Mapping[str, Any] | None = None) -> list[Point]:
        """Every run, `overrides` laid over it: a list adds or replaces an axis, any other value takes its key off every axis.

        Raises:
            UserError: an axis that names no key, that is empty or given twice, or zipped lists of unequal lengths.
        """
        over = flatten(overrides or {})
        fixed = {key: value for key, value in over.items() if not isinstance(value, list)}
        grid = flatten(self.grid) | {key: value for key, value in over.items() if isinstance(value, list)}
        axes = {key: [flatten({key: value}) for value in _filled(key, values)] for key, values in grid.items() if key not in fixed}
        for number, lists in enumerate(self.zips):
            kept = {key: _filled(key, values) for key, values in flatten(lists).items() if key not in over}
            lengths = {key: len(values) for key, values in kept.items()}
            if len(set(lengths.values())) > 1:
                raise UserError(f"Zipped axes must be of one length: {', '.join(f'{k!r} has {n}' for k, n in lengths.items())}.")
            if kept:
                axes[f"zip {number}"] = [dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True)]
        if self.points is not None:
            points = [{k: v for k, v in flatten(point).items() if k not in over} for point in _filled("list", self.points)]
            axes["list"] = points
        _check_once(axes)
        variants: Mapping[str, Mapping[str, Any]] = self.arms or {"": {}}
        return [
            _point([flatten(layer) for layer in (self.config, keys, fixed, *cells)], arm)
            for arm, keys in variants.items()
            for cells in itertools.product(*axes.values())
        ]

    def configs(self, overrides: Mapping[str, Any]) -> list[TrainConfig]:
        """The configuration of every run; see `runs`."""
        return [point.config for point in self.runs(overrides)]


def read_recipe(path: Path) -> Recipe:
    """A recipe file.

    Raises:
        UserError: not a recipe, or unknown keys.
    """
    content = read_given(path)
    known = {"name", "description", "config", "arms", "grid", "zip", "list", "stages", "smoke"}
    for key in content:
        if key not in known:
            raise unknown("recipe key", key, known)
    smoke, scaled = content.get("smoke") or {}, set[str]()
    for name, part in (("smoke", smoke), *((name, content.get(name)) for name in ("config", "grid", "arms"))):
        if part is not None and not (isinstance(part, dict) and all(isinstance(key, str) for key in part)):
            raise UserError(f"{path}: {name} must be a mapping of keys to values.")
    if not all(isinstance(smoke.get(name) or {}, dict) for name in ("config", "grid")):
        raise UserError(f"{path}: what smoke changes must be mappings of keys to values.")
    config, grid = dict(content.get("config") or {}), dict(content.get("grid") or {})
    if os.environ.get("FORGET_SCALE") == "smoke":
        # A recipe that says nothing of this scale has its defaults, as `forget train` has; what the recipe gives stays.
        under = {} if "smoke" in content else flatten(scale_defaults())
        config, grid = under | flatten(config | (smoke.get("config") or {})), grid | (smoke.get("grid") or {})
        content |= {key: smoke[key] for key in ("zip", "list") if key in smoke}
        scaled = set(smoke.get("config") or {})
    zipped = content.get("zip") or []
    zips = [zipped] if isinstance(zipped, dict) else zipped
    if not isinstance(zips, list) or not all(isinstance(lists, dict) for lists in zips):
        raise UserError(f"{path}: zip must be a mapping of keys to lists, or a list of such mappings.")
    for axes in (grid, *zips):
        for key, values in axes.items():
            if not isinstance(values, list):
                raise UserError(f"{path}: grid axis {key!r} must be a list of values.")
    points = content.get("list")
    if points is not None and not (isinstance(points, list) and all(isinstance(point, dict) for point in points)):
        raise UserError(f"{path}: list must be a list of mappings of keys to values.")
    arms = dict(content.get("arms") or {})
    for arm, values in arms.items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: arm {arm!r} must be a mapping of keys to values.")
    stages = content.get("stages") or []
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{path}: stages must be a list of mappings of keys to values.")
    # What the smoke scale sets, no stage sets otherwise.
    stages = [{key: value for key, value in stage.items() if key not in scaled} for stage in stages]
    return Recipe(content.get("name", path.stem), config, grid, content.get("description", ""), arms, tuple(stages), zips, points)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys by their own names, those of nested mappings dotted: `{base: {max_steps: 3}}` is `{base.iters: 3}`.

    Raises:
        UserError: a key that there is not, or one given twice.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        parts = {key: value} if not isinstance(value, Mapping) else {f"{key}.{inner}": v for inner, v in value.items()}
        for dotted, one in parts.items():
            name = canonical(dotted)
            if name in flat:
                raise UserError(f"recipe: {name!r} is given twice.")
            flat[name] = one
    return flat


def canonical(key: str) -> str:
    """The name of a key of TrainConfig, of `base` or of `resources`, dotted, for what a recipe calls it.

    Raises:
        UserError: it names none (with the nearest).
    """
    outer, dot, inner = str(key).partition(".")
    if outer == _RESOURCES:
        return f"{outer}.{_name_of(inner, Resources, 'resources key')}"
    name = _name_of(outer, TrainConfig, "recipe key")
    if not dot:
        return name
    if name == "base":
        return f"{name}.{_name_of(inner, TrainConfig, 'base key')}"
    if not _is_mapping(name):
        raise UserError(f"Recipe key {key!r} names nothing: {name} is not a mapping of keys. Dotted keys begin with base.")
    return f"{name}.{inner}"


def varying(configs: Sequence[TrainConfig]) -> list[str]:
    """The keys in which configurations differ, dotted below `base`."""
    rows = [_shown(config) for config in configs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [name for name in names if len({str(row.get(name)) for row in rows}) > 1]


def labels(points: Sequence[Point]) -> list[str]:
    """What tells the points of a grid apart: the arm, and the keys in which the points of an arm differ; "" for a point alone."""
    of_arms = [varying([point.config for point in points if point.arm == arm]) for arm in dict.fromkeys(p.arm for p in points)]
    within = list(dict.fromkeys(name for names in of_arms for name in names))
    return [", ".join(part for part in (point.arm, _keys_text(point.config, within)) if part) for point in points]


def titles(points: Sequence[Point]) -> list[str]:
    """What the runs of a grid are called: by their labels, and a run alone by its p."""
    return [label or _keys_text(point.config, ["p"]) for point, label in zip(points, labels(points), strict=True)]


def _keys_text(config: TrainConfig, names: Iterable[str]) -> str:
    row = _shown(config)
    return ", ".join(f"{name} = {row.get(name)}" for name in names)


def _shown(config: TrainConfig) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, Mapping):
            row |= {f"{f.name}.{key}": inner for key, inner in value.items()}
        else:
            row[f.name] = value
    return row


def _is_mapping(name: str) -> bool:
    origin = typing.get_origin(typing.get_type_hints(TrainConfig)[name])
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _name_of(key: str, kind: type, what: str) -> str:
    names = {alias: f.name for f in dataclasses.fields(kind) for alias in (f.name, *f.metadata["aliases"])}
    name = names.get(key.replace("-", "_"))
    if name is None:
        raise unknown(what, key, names)
    return name


def _filled(key: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise UserError(f"Grid axis {key!r} is empty." if values == [] else f"Grid axis {key!r} must be a list of values.")
    return values


def _check_once(axes: Mapping[str, list[dict[str, Any]]]) -> None:
    """No key on two axes: which one would count?"""
    seen: dict[str, str] = {}
    for axis, cells in axes.items():
        for key in {key for cell in cells for key in cell}:
            if key in seen:
                raise UserError(f"{key!r} is on two axes of the grid: give it once.")
            seen[key] = axis


def _point(layers: Sequence[Mapping[str, Any]], arm: str) -> Point:
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    nested: dict[str, Any] = {}
    for key, value in merged.items():
        outer, dot, inner = key.partition(".")
        if dot:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    resources = from_layers(Resources, nested.pop(_RESOURCES, {}), where=_RESOURCES)
    return Point(from_layers(TrainConfig, nested, where="recipe"), resources, arm)
