"""Figures of fitted laws: predicted against measured, curves over data, residuals, profiles, bands, advice.

Colours are Okabe and Ito's, told apart by colour-blind readers; every series also has its own marker.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mlx_forget.durable_files import replacing
from mlx_forget.laws.advise import Advice
from mlx_forget.laws.fitted import Fit
from mlx_forget.laws.predictor import Predictor
from mlx_forget.laws.profiles import Profile, profile_coordinates
from mlx_forget.laws.uncertainty import Uncertainty

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIZE = (6.4, 4.6)
CURVE_POINTS = 60
# Up to this many sizes each gets its curve; of a continuum, five do, with the points within 15% of them.
MOST_LEVELS = 6
NEAR = 0.15
# A column with more values than this is a continuum.
MOST_VALUES = 12
AXIS_NAMES = {
    "N": "parameters N",
    "D": "unique tokens D",
    "p": "share of pretraining data p",
    "P": "trainable parameters P",
    "steps": "update steps",
    "R": "share R",
    "r": "share r",
    "L_ft": "finetuning loss",
}
matplotlib.rcParams["svg.hashsalt"] = "mlx-forget"


def _new(width: float = SIZE[0], height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25, linewidth=0.6)


def _save(figure: Figure, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=140, metadata={"Software": "mlx-forget"})
    return path


def plot_fits(fits: Mapping[str, Uncertainty], folder: str | Path) -> list[Path]:
    """Every figure of the fits of one law into a folder: overviews of all groups, and per group curves with bands and profiles."""
    target = Path(folder)
    made = [plot_predicted(fits, target), plot_residuals(fits, target)]
    if len(fits) > 1:
        made.append(plot_parameters(fits, target))
    for group, uncertainty in fits.items():
        suffix = f"-{_file_name(group)}" if group else ""
        made.append(plot_curves(uncertainty, target, group=group, name=f"curves{suffix}"))
        if uncertainty.fit.group is None and not any(flag.kind == "data" for flag in uncertainty.fit.flags):
            made.append(plot_profiles(uncertainty, target, group=group, name=f"profiles{suffix}"))
    return made


def _file_name(group: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in group)


def _rows(fit: Fit, group: str) -> np.ndarray:
    return np.ones(fit.num_rows, bool) if fit.group is None else fit.group == fit.model.groups.index(group)


def plot_predicted(fits: Mapping[str, Uncertainty], folder: str | Path, *, name: str = "predicted-measured") -> Path:
    """Predicted against measured loss, all groups; the diagonal is a perfect law."""
    figure, axes = _new(5.6, 5.2)
    low, high = np.inf, -np.inf
    for i, (group, uncertainty) in enumerate(fits.items()):
        rows = _rows(uncertainty.fit, group)
        measured, predicted = uncertainty.fit.table.columns["loss"][rows], uncertainty.fit.predicted[rows]
        low, high = min(low, measured.min(), predicted.min()), max(high, measured.max(), predicted.max())
        axes.plot(
            measured,
            predicted,
            MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            ms=4,
            alpha=0.75,
            mew=0,
            label=group or None,
        )
    axes.plot([low, high], [low, high], color="black", lw=0.9, zorder=0)
    error = np.mean([uncertainty.fit.mre for uncertainty in fits.values()])
    first = next(iter(fits.values())).fit
    axes.set(
        xlabel="measured loss (nats per token)",
        ylabel="predicted loss (nats per token)",
        title=f"{first.law.name}: mean relative error {100 * error:.2g}%",
    )
    _legend(axes, len(fits))
    return _save(figure, Path(folder), name)


def _legend(axes: Axes, count: int) -> None:
    if count > 6:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif count > 1:
        axes.legend(fontsize=7, frameon=False)


def plot_residuals(fits: Mapping[str, Uncertainty], folder: str | Path, *, name: str = "residuals") -> Path:
    """Relative residuals against the prediction: a pattern here is what the law misses."""
    figure, axes = _new()
    for i, (group, uncertainty) in enumerate(fits.items()):
        rows = _rows(uncertainty.fit, group)
        measured, predicted = uncertainty.fit.table.columns["loss"][rows], uncertainty.fit.predicted[rows]
        axes.plot(
            predicted,
            100 * (measured / predicted - 1),
            MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            ms=4,
            alpha=0.75,
            mew=0,
            label=group or None,
        )
    axes.axhline(0, color="black", lw=0.9)
    axes.set(
        xlabel="predicted loss (nats per token)",
        ylabel="measured / predicted - 1 (%)",
        title=f"{next(iter(fits.values())).fit.law.name}: residuals",
    )
    _legend(axes, len(fits))
    return _save(figure, Path(folder), name)


def plot_parameters(fits: Mapping[str, Uncertainty], folder: str | Path, *, name: str = "parameters") -> Path:
    """Every parameter of every group with its interval; an arrow where the data leave an end open."""
    first = next(iter(fits.values())).fit
    names = [parameter for parameter in first.law.names if parameter not in first.constraints.fixed]
    groups = list(fits)
    figure = Figure(figsize=(1.2 + 2.1 * len(names), 1.4 + 0.26 * len(groups)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for parameter, axes in zip(names, panels, strict=True):
        _tidy(axes)
        is_log = first.law.parameters[first.law.index(parameter)].log
        for row, (group, uncertainty) in enumerate(fits.items()):
            interval = uncertainty.params.get(parameter) or uncertainty.params[f"{parameter}[{group}]"]
            colour, marker = COLOURS[row % len(COLOURS)], MARKERS[(row + row // len(COLOURS)) % len(MARKERS)]
            if interval.low is not None and interval.high is not None:
                axes.plot([interval.low, interval.high], [row, row], color=colour, lw=1.6)
            else:
                axes.annotate("open", (interval.value, row), xytext=(6, 0), textcoords="offset points", fontsize=6, va="center")
            face = colour if not interval.reason else "white"
            axes.plot([interval.value], [row], marker, color=colour, markerfacecolor=face, ms=5)
        if is_log:
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(parameter, fontsize=10)
        axes.tick_params(labelsize=7)
    panels[0].set_yticks(range(len(groups)), groups, fontsize=7)
    panels[0].invert_yaxis()
    level = next(iter(fits.values())).level
    figure.suptitle(f"{first.law.name}: parameters with {100 * level:g}% intervals (hollow: not to be trusted)", fontsize=10)
    return _save(figure, Path(folder), name)


def plot_curves(uncertainty: Uncertainty, folder: str | Path, *, group: str = "", name: str = "curves") -> Path:
    """The law over data, one curve with its band per size (or share), and the measured points; a second panel over p where it varies.

    A law of forgetting is drawn as loss - L0. The other columns stand still at their most frequent value; only rows that have it
    are drawn.
    """
    predictor = Predictor.from_uncertainty(uncertainty, group)
    loss = uncertainty.fit.table.columns["loss"][_rows(uncertainty.fit, group)]
    known = [column for column in ("D", "steps", "N", "R", "r", "L_ft", "P", "p") if column in predictor.law.columns]
    known = [column for column in known if len(np.unique(predictor.columns[column])) > 1] or known[:1]
    shown = known[:1] + ["p"] * ("p" in known[1:])
    figure = Figure(figsize=(SIZE[0] * (1.0 if len(shown) == 1 else 1.7), SIZE[1]), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        _tidy(axes)
        _draw_curves(axes, predictor, loss, axis, level=uncertainty.level)
    last = figure.get_axes()[-1]
    for axes in figure.get_axes():
        labels = axes.get_legend_handles_labels()[1]
        if labels and (axes is last or labels != last.get_legend_handles_labels()[1]):
            axes.legend(fontsize=8, frameon=False)
    what = "forgetting" if "L0" in predictor.law.columns else "loss"
    figure.get_axes()[0].set_ylabel(f"{what} (nats per token)")
    figure.suptitle(f"{predictor.law.name}{' ' + group if group else ''}", fontsize=11)
    return _save(figure, Path(folder), name)


def _draw_curves(axes: Axes, predictor: Predictor, loss: npt.NDArray[np.float64], axis: str, *, level: float) -> None:
    data = dict(predictor.columns)
    rest = [name for name in ("N", "p", "r", "P", "D") if name in predictor.law.columns and name != axis]
    splitter = next((name for name in rest if len(np.unique(data[name])) > 1), None)
    still = {column: _usual(data[column], column) for column in predictor.law.columns if column not in (axis, splitter, "L0")}
    keep = np.ones(len(loss), bool)
    for column, value in still.items():
        keep &= (data[column] == value) | (len(np.unique(data[column])) > MOST_VALUES)
    base = data.get("L0", np.zeros(len(loss)))
    levels = [np.nan] if splitter is None else _levels(data[splitter])
    is_grid = splitter is None or len(np.unique(data[splitter])) <= MOST_LEVELS
    x = _abscissa(axes, data[axis], axis)
    for i, value in enumerate(levels):
        member = keep.copy()
        columns: dict[str, npt.ArrayLike] = {axis: x, **still, **({"L0": 0.0} if "L0" in data else {})}
        label = None
        if splitter is not None:
            distance = np.abs(np.log(np.maximum(data[splitter], 1e-12) / max(value, 1e-12)))
            member &= distance <= (0.5 * _gap(levels) if is_grid else min(NEAR, 0.5 * _gap(levels)))
            columns[splitter] = value
            label = f"{splitter} = {_number(splitter, value)}"
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, predictor.predict(columns), color=colour, lw=1.4, label=label)
        if len(predictor.draws):
            low, high = predictor.interval(columns, level=level)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        axes.plot(data[axis][member], (loss - base)[member], marker, color=colour, ms=4, mew=0)
    held = ", ".join(f"{column} = {_number(column, value)}" for column, value in still.items())
    axes.set_xlabel(AXIS_NAMES.get(axis, axis) + (f"   (at {held})" if held else ""))


def _abscissa(axes: Axes, values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
    """Points along the data's range, on the scale that suits the column, which the axes are given."""
    low, high = float(values.min()), float(values.max())
    if name == "p":
        smallest = float(values[values > 0].min(initial=high)) / 2
        distinct = np.unique(values)
        _share_axis(axes, smallest, high, distinct if len(distinct) <= MOST_LEVELS else None)
        return np.concatenate([np.linspace(0.0, smallest, 12), np.geomspace(smallest, high, CURVE_POINTS)])
    if name in ("L_ft", "r", "R") or low <= 0:
        return np.linspace(low, high, CURVE_POINTS)
    axes.set_xscale("log")
    return np.geomspace(low, high, CURVE_POINTS)


def _share_axis(axes: Axes, smallest: float, high: float, ticks: npt.NDArray[np.float64] | None = None) -> None:
    """Logarithmic above the smallest share, and down to 0 below it; ticks at 0 and the decades unless others are given."""
    axes.set_xscale("asinh", linear_width=smallest)
    if ticks is None:
        decades = 10.0 ** np.arange(np.ceil(np.log10(3 * smallest)), np.log10(high) + 1e-9)
        ticks = np.array([0.0, *decades])
    axes.set_xticks(ticks, [_number("p", float(tick)) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _usual(values: npt.NDArray[np.float64], name: str) -> float:
    """The most frequent value; of several the smallest share, or the middle one of anything else. The median of a continuum."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) > MOST_VALUES:
        return float(np.median(values))
    usual = distinct[counts == counts.max()]
    return float(usual[0] if name in ("p", "r", "R") else usual[len(usual) // 2])


def _number(name: str, value: float) -> str:
    return f"{100 * value:.3g}%" if name in ("p", "r", "R") else f"{value:.3g}"


def _levels(values: np.ndarray) -> list[float]:
    distinct = np.unique(values)
    if len(distinct) <= MOST_LEVELS:
        return [float(value) for value in distinct]
    return [float(value) for value in np.geomspace(max(distinct[0], 1e-12), distinct[-1], 5)]


def _gap(levels: list[float]) -> float:
    """The smallest distance between levels, in log: points nearer than half of it belong to a level."""
    logs = np.log(np.maximum(levels, 1e-12))
    return float(np.min(np.diff(logs))) if len(logs) > 1 else np.inf


def plot_profiles(uncertainty: Uncertainty, folder: str | Path, *, group: str = "", name: str = "profiles") -> Path:
    """The rise of the objective along each free coordinate; a curve that never reaches the line is not identified."""
    profiles: Mapping[str, Profile] = uncertainty.profiles or profile_coordinates(uncertainty.fit, level=uncertainty.level)
    columns = 2 if len(profiles) == 4 else min(len(profiles), 3)
    lines = -(-len(profiles) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.5 * lines), layout="constrained")
    fit = uncertainty.fit
    centred = {rule.amplitude for rule in fit.law.rescales if fit.model.references[rule.column] != 1.0}
    for i, (coordinate, profile) in enumerate(profiles.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        _tidy(axes)
        shown = profile.rise < 4
        axes.plot(profile.points[shown], profile.rise[shown], ".-", color=COLOURS[0], ms=4, lw=1.2)
        axes.axhline(1.0, color=COLOURS[1], lw=1.0, ls="--")
        for end in (profile.low, profile.high):
            if np.isfinite(end):
                axes.axvline(end, color=COLOURS[1], lw=0.8, ls=":")
        bare = coordinate.split("[")[0]
        text = f"log {coordinate}" if fit.law.parameters[fit.law.index(bare)].log else coordinate
        is_term = bare in centred or bare in fit.law.mixed
        axes.set_xlabel(f"{text}, at the middle of the data" if is_term else text, fontsize=8)
        axes.tick_params(labelsize=7)
        if i % columns == 0:
            axes.set_ylabel(f"rise / {100 * uncertainty.level:g}% limit", fontsize=8)
    figure.suptitle(f"{fit.law.name}{' ' + group if group else ''}: profiles of the objective", fontsize=10)
    return _save(figure, Path(folder), name)


def plot_advice(predictor: Predictor, advice: Advice, budget: float, confidence: float, folder: str | Path) -> Path:
    """Forgetting over the column that was solved for, with the budget and the answer."""
    name = advice.unknown
    low, high = predictor.data_range[name]
    figure, axes = _new()
    best = advice.answer if advice.answer is not None else float(advice.columns[name])
    if name == "p":
        smallest = min(1e-4, best / 3) if best > 0 else 1e-4
        x = np.concatenate([np.linspace(0.0, smallest, 12), np.geomspace(smallest, max(high, 2 * best), CURVE_POINTS)])
        _share_axis(axes, smallest, float(x[-1]))
    else:
        x = np.geomspace(min(low, best), max(high, best), CURVE_POINTS)
        axes.set_xscale("log")
    columns: dict[str, npt.ArrayLike] = {**advice.columns, name: x, "L0": 0.0}
    axes.plot(x, predictor.predict(columns), color=COLOURS[0], lw=1.6, label="expected")
    axes.plot(
        x,
        predictor.upper(columns, confidence=confidence),
        color=COLOURS[1],
        lw=1.4,
        ls="--",
        label=f"{100 * confidence:g}% stay below",
    )
    axes.axhline(budget, color="black", lw=1.0, ls=":", label=f"budget {budget:g} nats")
    if advice.answer is not None:
        axes.plot(
            [best],
            [advice.upper],
            "D",
            color=COLOURS[2],
            ms=8,
            label=f"{name} = {100 * best:.3g}%" if name == "p" else f"{name} = {best:.3g}",
        )
    others = ", ".join(f"{key} = {value:.3g}" for key, value in advice.columns.items() if key not in (name, "L0"))
    axes.set(
        xlabel=AXIS_NAMES.get(name, name),
        ylabel="forgetting (nats per token)",
        title=f"Forgetting at {others}",
        ylim=(0, None),
    )
    axes.legend(fontsize=8, frameon=False)
    return _save(figure, Path(folder), "advice")
