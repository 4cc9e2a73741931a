"""The plots of a report: U-curves, forgetting against size, data and share, measured against fitted, and methods."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from mlx_forget.laws.uncertainty import Uncertainty, predict_intervals
from mlx_forget.pages.chart import HUES, Axis, Point, Series, chart, short_count
from mlx_forget.report.curves import Panel, share_text
from mlx_forget.report.fits import Fitted
from mlx_forget.runs.rows import Row
from mlx_forget.studies.method_comparison import Trajectory

_LOSSES = (
    ("target_val_loss", "target validation loss"),
    ("target_train_loss", "target train loss"),
    ("pretrain_val_loss", "pretraining validation loss"),
)
# More marks than this cannot be told apart, and make a page heavy.
MOST_MARKS = 1500
# A column with more values than this is a continuum.
MOST_VALUES = 12
# A continuum is cut this near its middle; a law's line has so many corners.
NEAR = 0.15
LINE_POINTS = 12
# Forgetting that spans more than this factor is drawn on a logarithmic axis.
LOG_ABOVE = 12.0


def curve_plots(panel: Panel) -> list[Markup]:
    """Target validation, target train and pretraining loss against the step, the minimum of the first ringed.

    The target loss's first fall is cut off: beside it the U could not be seen.
    """
    made = []
    for column, name in _LOSSES:
        cut = _cut(panel, column) if column == "target_val_loss" else math.inf
        series = [_curve(panel, number, column, cut) for number in range(len(panel.curves))]
        made.append(
            chart(
                series,
                x=Axis(
                    "finetuning step",
                    show=lambda step: f"{step:,.0f}",
                    reach=(0, max(curve.rows[-1]["step"] for curve in panel.curves)),
                ),
                y=Axis(f"{name} (nats per token{'' if math.isinf(cut) else '; start cut off'})"),
                title=f"{name} against the step: {panel.name}",
                width=360,
                height=270,
            )
        )
    return made


def _cut(panel: Panel, column: str) -> float:
    """The loss above which nothing is drawn: what the curves end with, or three quarters of their evaluations lie below."""
    values = np.array([row[column] for curve in panel.curves for row in curve.rows])
    return float(max(np.quantile(values, 0.75), max(curve.rows[-1][column] for curve in panel.curves)))


def _curve(panel: Panel, number: int, column: str, cut: float) -> Series:
    curve = panel.curves[number]
    run_id = curve.record["run_id"]
    points = [
        Point(
            row["step"],
            row[column],
            f"{panel.names[number]}: {row[column]:.4f} at step {row['step']:,} (run {run_id})",
            index == curve.best,
        )
        for index, row in enumerate(curve.rows)
        if row[column] <= cut or index == curve.best
    ]
    return Series(panel.names[number], points, [(point.x, point.y) for point in points])


@dataclass(frozen=True)
class Scatter:
    """Forgetting against one column.

    Args:
        note: what is not drawn, or how.
    """

    title: str
    plot: Markup
    note: str


_TITLES = {"N": "parameters N", "D": "unique target tokens D", "p": "share p of pretraining data"}


def scatters(rows: Sequence[Row], fits: Sequence[Fitted]) -> list[Scatter]:
    """Forgetting against N, D and p, of whichever the runs have more than one."""
    domains = sorted({row["domain"] for row in rows})
    made = []
    for domain in domains:
        part = [row for row in rows if row["domain"] == domain and row["D"] and row["p"] is not None]
        law = next((one.uncertainty for one in fits if one.domain == domain and one.response == "pretraining"), None)
        for column, title in _TITLES.items():
            if len({_key(row, column) for row in part}) > 1:
                made.append(_scatter(part, column, f"{title}, {domain}" if len(domains) > 1 else title, law))
    return made


def _key(row: Row, column: str) -> Any:
    """What runs share that stand at one place: of one share asked for, they are served nearly the same."""
    return share_text(row) if column == "p" else row[column]


def _scatter(rows: list[Row], column: str, title: str, law: Uncertainty | None) -> Scatter:
    by, held = _other_columns(rows, column)
    part, level = _slice(rows, held)
    groups: dict[Any, list[Row]] = {}
    for row in sorted(part, key=lambda row: (row[by], str(_key(row, by)))):
        groups.setdefault(_key(row, by), []).append(row)
    keys = list(groups)
    if len(keys) > len(HUES):
        keys = [keys[round(number * (len(keys) - 1) / (len(HUES) - 1))] for number in range(len(HUES))]
    drawn = [row for key in keys for row in groups[key]]
    places = _places(drawn, column)
    every = max(1, math.ceil(len(drawn) / MOST_MARKS))
    series = []
    for key in keys:
        points = [Point(places[_key(row, column)], float(row["forgetting_nats"]), _said(row)) for row in groups[key][::every]]
        line, band = _law_line(law, drawn, groups[key], column, places)
        is_law = bool(line)
        if not line and len(places) <= MOST_VALUES:
            line = _means(groups[key], column, places)
        series.append(Series(_name(groups[key][0], by), points, line, dashed=is_law, band=band))
    forgotten = [p.y for one in series for p in one.points]
    log = min(forgotten) > 0 and max(forgotten) > LOG_ABOVE * min(forgotten)
    if log:
        series = [dataclasses.replace(one, band=[c for c in one.band if c[1] > 0]) for one in series]
    notes = [f"runs at {held} = {short_count(level)}"] if level is not None else []
    if len(keys) < len(groups):
        notes.append(f"{len(keys)} of {len(groups)} values of {by}")
    if every > 1:
        notes.append(f"one run in {every} is marked")
    if any(one.line for one in series):
        notes.append(
            "dashed: the fitted law with its 95% interval" if series[0].dashed else "lines: means over the runs at a place"
        )
    names = list(places) if column == "p" else []
    plot = chart(
        series,
        x=Axis(title, log=column != "p", names=names, show=None if column == "p" else short_count),
        y=Axis("forgetting (nats per token)", log=log),
        title=f"Forgetting against {title}",
        level=None if log else 0.0,
    )
    return Scatter(f"Against {title}", plot, "; ".join(notes))


def _other_columns(rows: Sequence[Row], column: str) -> tuple[str, str]:
    """The column that tells the series apart, and the one that is held."""
    if column != "p":
        return "p", "D" if column == "N" else "N"
    return ("N", "D") if len({row["N"] for row in rows}) > 1 else ("D", "N")


def _slice(rows: list[Row], column: str) -> tuple[list[Row], float | None]:
    """The runs at one value of a column, that of which there are most; of a continuum, those near its middle. None: there is only one."""
    values = [float(row[column]) for row in rows]
    distinct = sorted(set(values))
    if len(distinct) == 1:
        return rows, None
    if len(distinct) <= MOST_VALUES:
        middle = distinct[len(distinct) // 2]
        level = max(distinct, key=lambda value: (values.count(value), value == middle))
        return [row for row in rows if row[column] == level], level
    level = distinct[len(distinct) // 2]
    return [row for row in rows if abs(math.log(row[column] / level)) < math.log1p(NEAR)], level


def _places(rows: Sequence[Row], column: str) -> dict[Any, float]:
    """Where on the axis each value stands: shares side by side, counts at themselves."""
    if column != "p":
        return {value: float(value) for value in sorted({row[column] for row in rows})}
    ordered = sorted({(round(float(row["p"]), 9), share_text(row)) for row in rows})
    return {name: float(number) for number, name in enumerate(dict.fromkeys(name for _, name in ordered))}


def _name(row: Row, by: str) -> str:
    return f"p = {share_text(row)}" if by == "p" else f"{by} = {short_count(row[by])}"


def _said(row: Row) -> str:
    return (
        f"{row['forgetting_nats']:+.4f} nats: N = {short_count(row['N'])}, D = {short_count(row['D'])}, p = {share_text(row)}, "
        f"seed {row['seed']} (run {row['run']})"
    )


def _means(rows: Sequence[Row], column: str, places: dict[Any, float]) -> list[tuple[float, float]]:
    at: dict[float, list[float]] = {}
    for row in rows:
        at.setdefault(places[_key(row, column)], []).append(float(row["forgetting_nats"]))
    return [(x, float(np.mean(values))) for x, values in sorted(at.items())] if len(at) > 1 else []


def _law_line(
    law: Uncertainty | None, rows: Sequence[Row], part: Sequence[Row], column: str, places: dict[Any, float]
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """The fitted law and its band along an axis, at what the runs of one series have in the middle of the other columns."""
    if law is None or column not in law.fit.law.columns:
        return [], []
    if column == "p":
        at = list(places.values())
        along = [float(np.mean([float(row["p"]) for row in rows if share_text(row) == name])) for name in places]
    else:
        at = along = np.geomspace(min(places.values()), max(places.values()), LINE_POINTS).tolist()
    columns: dict[str, Any] = {"L0": np.full(len(along), float(np.mean([row["L0"] for row in part])))}
    columns |= {name: np.full(len(along), float(np.median([row[name] for row in part]))) for name in ("N", "D", "p")}
    found = predict_intervals(law, columns | {column: np.array(along)}, forgetting=True)
    line = [(x, one.value) for x, one in zip(at, found, strict=True)]
    return line, [(x, one.low, one.high) for x, one in zip(at, found, strict=True) if one.low is not None and one.high is not None]


def fit_plot(one: Fitted) -> Markup:
    """Predicted against measured loss; a perfect law lies on the diagonal."""
    assert one.uncertainty is not None
    fit = one.uncertainty.fit
    measured, predicted = fit.table.columns["loss"], fit.predicted
    every = max(1, math.ceil(len(measured) / MOST_MARKS))
    runs = fit.table.run if fit.table.run is not None else np.arange(len(measured)).astype(str)
    points = [
        Point(x, y, f"measured {x:.4f}, law {y:.4f} (run {run})")
        for x, y, run in zip(measured[::every].tolist(), predicted[::every].tolist(), runs[::every].tolist(), strict=True)
    ]
    low, high = float(min(measured.min(), predicted.min())), float(max(measured.max(), predicted.max()))
    diagonal = Series("a perfect law", (), [(low, low), (high, high)], dashed=True)
    return chart(
        [Series("runs", points), diagonal],
        x=Axis("measured loss (nats per token)"),
        y=Axis("loss of the law (nats per token)"),
        title=f"Measured against fitted: {fit.law.name}, {one.domain}",
        width=420,
    )


def method_plot(trajectories: Sequence[Trajectory]) -> Markup:
    """Pretraining loss against target loss along each run, to its minimum: lower left is better. The first seed of each method."""
    first: dict[str, Trajectory] = {}
    for trajectory in trajectories:
        first.setdefault(trajectory.label, trajectory)
    series = []
    for label, trajectory in first.items():
        best = trajectory.best
        rows = [row for row in trajectory.rows if row["step"] <= best["step"]]
        run_id = trajectory.record["run_id"]
        points = [
            Point(row["target_val_loss"], row["pretrain_val_loss"], f"{label}, step {row['step']:,} (run {run_id})", row is best)
            for row in rows
        ]
        series.append(Series(label, points, [(point.x, point.y) for point in points]))
    return chart(
        series,
        x=Axis("target validation loss (nats per token)"),
        y=Axis("pretraining validation loss (nats per token)"),
        title="Pretraining loss against target loss along each method's run",
        width=760,
        height=420,
        level=float(next(iter(first.values())).rows[0]["pretrain_val_loss"]),
    )
