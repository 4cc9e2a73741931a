"""The U-curves of a sweep: which are drawn, and what is read at their minima."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from mlx_forget.config_keys import REPLAY_SELF
from mlx_forget.errors import UserError
from mlx_forget.evaluate import Estimate
from mlx_forget.history import read_history
from mlx_forget.methods import METHODS
from mlx_forget.pages.chart import short_count
from mlx_forget.pipeline.mixture import parse_share
from mlx_forget.records import HISTORY, read_record
from mlx_forget.report.sources import recipe_of
from mlx_forget.runs.rows import Row
from mlx_forget.studies.figure1 import Curve
from mlx_forget.studies.figure1 import Row as Reading
from mlx_forget.studies.figure1 import table as read_minima
from mlx_forget.studies.method_comparison import describe

# As many as the page has colours for, and as a reader can take in.
MOST_CURVES = 7
MOST_PANELS = 6

T = TypeVar("T")


@dataclass(frozen=True)
class Panel:
    """Runs of one model, one amount of data and one seed, which differ in what they are compared by.

    Args:
        name: the model, the data and the seed.
        by: the keys in which its runs differ.
        names: of its curves.
        readings: what is read at each minimum; `less_than_previous` and `ratio` only mean something where the runs differ in p alone.
        left_out: runs that are not drawn, since there are too many, or their history cannot be read.
    """

    name: str
    by: tuple[str, ...]
    names: list[str]
    curves: list[Curve]
    readings: list[Reading]
    left_out: list[str]

    @property
    def by_share(self) -> bool:
        return self.by in ((), ("p",))

    def forgetting(self, number: int) -> Estimate:
        return self.readings[number].forgetting


def make_panels(rows: Sequence[Row], root: Path) -> tuple[list[Panel], int]:
    """The panels that are drawn, evenly spread over sizes and data, and how many there would be."""
    groups: dict[tuple[str, float, float, object], list[Row]] = {}
    first_seed: dict[tuple[str, float, float], object] = {}
    for row in sorted(rows, key=lambda row: (row["seed"] is None, row["seed"])):
        cell = (row["domain"], row["N"], row["D"] or 0.0)
        seed = first_seed.setdefault(cell, row["seed"])
        if row["seed"] == seed:
            groups.setdefault((*cell, seed), []).append(row)
    keys = sorted(groups, key=lambda key: (key[0], key[1], key[2]))
    panels = [panel for key in _spread(keys, MOST_PANELS) if (panel := _panel(key, groups[key], root)) is not None]
    return panels, len(keys)


def _panel(key: tuple[str, float, float, object], rows: list[Row], root: Path) -> Panel | None:
    domain, size, tokens, seed = key
    axes = list(recipe_of(rows).axes)
    # A method is told with its coefficient and its data.
    by = tuple(key for key in axes if "method" not in axes or key not in ("replay_data", "coefficient"))
    without_start = tuple(key for key in by if key != "init")
    if len({name_of(row, without_start) for row in rows}) == len(rows):
        # Runs of a stage start from runs of the stage before.
        by = without_start
    order = list(METHODS)
    ordered = sorted(
        rows,
        key=lambda row: (
            order.index(row["method"]) if row["method"] in order else len(order),
            row.get("replay_data") not in (None, REPLAY_SELF),
            row.get("coefficient") or 0.0,
            row.get("fine_tune_type") or "full",
            row.get("lora_rank") or 0,
            row["p"] or 0.0,
            -(row["learning_rate"] or 0.0),
            str(row["run"]),
        ),
    )
    first: dict[str, Row] = {}
    for row in ordered:
        first.setdefault(name_of(row, by), row)
    names, curves = [], []
    for name in _spread(list(first), MOST_CURVES):
        curve = _curve(first[name], root)
        if curve is not None:
            names.append(name)
            curves.append(curve)
    drawn = {curve.record["run_id"] for curve in curves}
    left_out = [str(row["run"]) for row in ordered if row["run"] not in drawn]
    if not curves:
        return None
    title = f"{short_count(size)} parameters, {short_count(tokens)} tokens of {domain}, seed {seed}"
    return Panel(title, by, names, curves, read_minima(curves), left_out)


def name_of(row: Row, by: Sequence[str]) -> str:
    """A run by the keys in which it differs from the others."""
    parts = []
    told = {key for key in by if key.startswith("lora_") or key in ("method", "fine_tune_type")}
    if told:
        config = {key: row.get(key) for key in ("method", "coefficient", "replay_data", "fine_tune_type")}
        config |= {key: value for key, value in row.items() if key.startswith("lora_")}
        config |= {"p": row["p_asked"] if told & {"method"} or "p" in by else "0"}
        parts.append(
            describe(
                {
                    "replay_data": "self",
                    **{key: value for key, value in config.items() if value is not None or key == "coefficient"},
                }
            )
        )
    for key in by:
        if key in told:
            continue
        if key == "p" and not told:
            parts.append(f"p = {share_text(row)}")
        elif key == "learning_rate":
            parts.append(f"rate {row['learning_rate']:.3g}")
        elif key not in ("p", "seed"):
            parts.append(f"{key} = {row.get(key)}")
    return ", ".join(parts) or f"p = {share_text(row)}"


def share_text(row: Row) -> str:
    """p as it was asked for, in percent where it is one share."""
    try:
        return f"{100 * float(parse_share(str(row['p_asked']))):g}%"
    except UserError:
        return str(row["p_asked"])


def _curve(row: Row, root: Path) -> Curve | None:
    folder = root / row["folder"]
    record = read_record(folder)
    if record is None or not (folder / HISTORY).is_file():
        return None
    rows = [line for line in read_history(folder / HISTORY).to_pylist() if line["pretrain_val_windows"]]
    best = next((i for i, line in enumerate(rows) if line["step"] == row["steps"]), None)
    if best is None or rows[0]["step"] != 0:
        return None
    return Curve(Fraction(row["p"] or 0).limit_denominator(10**9), share_text(row), row["seed"], record, rows, best)


def _spread(items: Sequence[T], most: int) -> list[T]:
    if len(items) <= most:
        return list(items)
    places = {round(number * (len(items) - 1) / (most - 1)) for number in range(most)}
    return [items[place] for place in sorted(places)]
