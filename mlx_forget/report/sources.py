"""What a report is about: the runs of a folder, or of a table that was exported from one; and the recipe that would repeat them."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget.config import TrainConfig
from mlx_forget.errors import UserError
from mlx_forget.runs.export import read_export
from mlx_forget.runs.index import read_index
from mlx_forget.runs.rows import Row
from mlx_forget.runs.selection import select

# Keys in which runs may differ and still be described by one law: what a law reads, repeats, and how long a run went on.
READ_BY_LAWS = frozenset(
    "model init target pretrain p target_tokens seed method coefficient iters tokens_per_param steps_per_eval eval_rows tokenizer "
    "stop_target_loss stop_patience stop_tokens stop_epochs max_forgetting pretrain_epochs compare_to_start".split()
)
# Points of a grid that are written out one by one.
MOST_POINTS = 60
# How a start that is another run is told.
_RUN = "run "


@dataclass(frozen=True)
class Runs:
    """The runs of a report.

    Args:
        name: of the folder or file.
        root: where histories lie below; None for a table.
        rows: runs that have ended, those that were chosen.
        problems, begun: what else is there (see `RunIndex`).
        copies: folders of runs that are there already, and left out.
        num_records: records there are, chosen or not.
    """

    name: str
    source: Path
    root: Path | None
    rows: list[Row]
    problems: dict[str, str]
    begun: list[str]
    copies: list[str]
    num_records: int

    @property
    def finetunes(self) -> list[Row]:
        """Runs that ended well and measured what was forgotten."""
        return [row for row in self.rows if row["forgetting_nats"] is not None and row["status"] != "diverged"]

    @property
    def diverged(self) -> list[Row]:
        return [row for row in self.rows if row["status"] == "diverged"]


def read_source(source: Path, *, where: str | None = None, status: str | None = None) -> Runs:
    """The runs of a folder or an exported table.

    Raises:
        UserError: nothing there, no run, or no run left.
    """
    if source.is_dir():
        index = read_index(source)
        rows, problems, begun, root = index.rows, index.problems, index.begun, index.root
    elif source.is_file():
        rows, problems, begun, root = read_export(source), {}, [], None
    else:
        raise UserError(f"There is nothing at {source}: give the folder of a sweep, or a table of forget runs export.")
    first: dict[tuple[Any, Any], Row] = {}
    copies = [str(row["folder"]) for row in rows if first.setdefault((row["run"], row["backend"]), row) is not row]
    _tell_starts(list(first.values()))
    chosen = select(list(first.values()), where=where, status=status)
    if not chosen:
        what = "no run that has ended" if not rows else f"no run of {len(rows):,} that was asked for"
        more = f"; {len(begun)} were begun: forget sweep goes on with them" if begun and not rows else ""
        raise UserError(f"{source} holds {what}{more}.")
    return Runs(source.resolve().name, source, root, chosen, problems, begun, copies, len(rows) + len(problems))


def _tell_starts(rows: Sequence[Row]) -> None:
    """Of runs that started from others of these rows, such as stages, say from which: the path is of one machine's disk."""
    learnt = {row["run"]: row["domain"] for row in rows}
    for row in rows:
        if row["base"] in learnt:
            row["init"] = f"{_RUN}{row['base']}, which learnt {learnt[row['base']]}"


@dataclass(frozen=True)
class Recipe:
    """What the runs have in common, and in what they differ.

    Args:
        config: keys that all runs share and that are not the defaults.
        axes: the values of each key that varies, in order.
        is_grid: every combination of the axes was run, once.
        points: the combinations, where they are no grid and not too many.
        follow: runs start from one another, which no grid or list says.
    """

    config: dict[str, Any]
    axes: dict[str, list[Any]]
    is_grid: bool
    points: list[dict[str, Any]]
    follow: bool = False

    @property
    def is_whole(self) -> bool:
        """Every run is in it."""
        return not self.follow and (self.is_grid or not self.axes or bool(self.points))

    def as_yaml(self, name: str) -> str:
        """The recipe, for `forget sweep`."""
        import yaml

        config: dict[str, Any] = {}
        for key, value in self.config.items():
            if key.startswith("base."):
                config.setdefault("base", {})[key.removeprefix("base.")] = value
            else:
                config[key] = value
        content: dict[str, Any] = {"name": name, "config": config}
        if self.is_grid and self.axes:
            content["grid"] = self.axes
        elif self.points:
            content["list"] = self.points
        text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
        return text


def recipe_of(rows: Sequence[Row]) -> Recipe:
    """The recipe of finetuning runs, read off their configurations."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig) if field.metadata["science"] and field.name != "base"}
    columns = {key: _column(key) for key in fields}
    known = {key: column for key, column in columns.items() if any(column in row for row in rows)}
    of_base = sorted({name for row in rows for name in row if name.startswith("base_")})
    known |= {f"base.{name.removeprefix('base_')}": name for name in of_base}
    values = {key: _distinct(rows, column) for key, column in known.items()}
    if len({row["base"] for row in rows}) == 1:
        # One base model, however it was asked for.
        values = {
            key: [found[-1] if found[0] is None else found[0]] if key.startswith("base.") else found
            for key, found in values.items()
        }
    axes = {key: found for key, found in values.items() if len(found) > 1}
    config: dict[str, Any] = {}
    for key, found in values.items():
        is_default = key in fields and found[0] in (fields[key].default, None)
        if key not in axes and not is_default:
            config[key] = found[0]
    combinations = [tuple(row.get(known[key]) for key in axes) for row in rows]
    whole = set(itertools.product(*axes.values())) if _product(axes) == len(rows) else None
    follow = any(str(row.get("init")).startswith(_RUN) for row in rows)
    is_grid = not follow and whole is not None and whole == set(combinations)
    points: list[dict[str, Any]] = []
    if not is_grid and not follow and len(rows) <= MOST_POINTS:
        combinations.sort(key=lambda one: [found.index(value) for found, value in zip(axes.values(), one, strict=True)])
        points = [dict(zip(axes, one, strict=True)) for one in combinations]
    return Recipe(config, axes, is_grid, points, follow)


def _column(key: str) -> str:
    """The column of a row that holds what the configuration asked for."""
    return {"p": "p_asked", "learning_rate": "learning_rate_asked"}.get(key, key)


def _distinct(rows: Sequence[Row], column: str) -> list[Any]:
    found = list(dict.fromkeys(row.get(column) for row in rows))
    return sorted(found, key=lambda value: (value is None, isinstance(value, str), value if value is not None else 0))


def _product(axes: dict[str, list[Any]]) -> int:
    total = 1
    for values in axes.values():
        total *= len(values)
    return total


def unread_keys(rows: Sequence[Row]) -> list[str]:
    """Keys in which runs differ and that no law reads."""
    return [key for key in recipe_of(rows).axes if key not in READ_BY_LAWS and not key.startswith("base.")]
