"""Figures of methods: trajectories of target loss against pretraining loss, and the learning rate's trade-off."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_forget.plots import COLOURS, MARKERS
from mlx_forget.studies.method_comparison import TOLERANCE, Trajectory
from mlx_forget.studies.rate_tradeoff import Point
from mlx_forget.token_counts import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mlx_forget.studies.capacity_slices import Axis, SlicePoint


def draw_methods(trajectories: Sequence[Trajectory], *, title: str) -> "Figure":
    """Whole trajectories on the left, where they end on the right; lower left is better. The first seed of each method is drawn."""
    from matplotlib.figure import Figure

    first: dict[str, Trajectory] = {}
    for trajectory in trajectories:
        first.setdefault(trajectory.label, trajectory)
    drawn = list(first.values())
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    whole, end = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for axis, size in ((whole, 2.5), (end, 4.5)):
        for number, trajectory in enumerate(drawn):
            _draw(axis, trajectory, number, size)
        axis.set_xlabel("target validation loss (nats per token)")
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    start = drawn[0].rows[0]
    # Room for the word below the start, which is the lowest where nothing was unlearnt.
    whole.margins(y=0.12)
    whole.plot(start["target_val_loss"], start["pretrain_val_loss"], "k*", markersize=12)
    whole.annotate(
        "start", (start["target_val_loss"], start["pretrain_val_loss"]), xytext=(-10, -13), textcoords="offset points", ha="right"
    )
    whole.set_ylabel("pretraining validation loss (nats per token)")
    whole.set_title("finetuning, from right to left", fontsize=10)
    _frame_ends(end, drawn)
    handles, labels = end.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_rates(found: Sequence[Point], level: float, *, title: str) -> "Figure":
    """Forgetting at one target loss, and the steps to it, against the learning rate; a line for each method and seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = list(dict.fromkeys(point.label for point in found))
    for key in dict.fromkeys((point.label, point.seed) for point in found):
        line = [point for point in found if (point.label, point.seed) == key]
        rates, number = [point.learning_rate for point in line], labels.index(key[0])
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linewidth": 1.4,
        }
        left.plot(rates, [point.forgetting for point in line], label=key[0] if key[1] == found[0].seed else None, **style)
        right.plot(rates, [point.step for point in line], **style)
    for axis, name in ((left, "forgetting (nats per token)"), (right, "steps")):
        axis.set_xscale("log")
        axis.set_xlabel("learning rate")
        axis.set_title(f"{name} at target loss {level:.3f}", fontsize=11)
        axis.set_ylabel(name)
        axis.grid(alpha=0.25, linewidth=0.6, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    left.axhline(0, color="black", linewidth=0.8, linestyle=":")
    right.set_yscale("log")
    # Steps within one power of ten need labels between its ends, and as plain numbers.
    for set_formatter in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_slices(found: "Sequence[SlicePoint]", axis: "Axis", level: float, *, title: str) -> "Figure":
    """Pretraining loss before, and after with the best coefficient of each method, against size or length of pretraining."""
    from matplotlib.figure import Figure

    from mlx_forget.studies.capacity_slices import AXES

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = list(dict.fromkeys(point.label for point in found))
    start = sorted({(point.x, point.before) for point in found if point.seed == found[0].seed})
    left.plot(*zip(*start, strict=True), color="black", linestyle=":", marker="*", markersize=9, label="before")
    for key in dict.fromkeys((point.label, point.seed) for point in found):
        line = [point for point in found if (point.label, point.seed) == key]
        # Black is the loss before.
        number = 1 + labels.index(key[0])
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linewidth": 1.4,
        }
        places = [point.x for point in line]
        left.plot(
            places, [point.before + point.forgetting for point in line], label=key[0] if key[1] == found[0].seed else None, **style
        )
        right.plot(places, [point.forgetting for point in line], **style)
    shown = sorted({point.x for point in found})
    for panel, name in ((left, "pretraining validation loss (nats per token)"), (right, "forgetting (nats per token)")):
        panel.set_xscale("log")
        # A factor of a few has no power of ten in it: the places themselves are named.
        panel.set_xticks(shown, [short_count(x) if axis == "model-size" else f"{x:.3g}" for x in shown])
        panel.minorticks_off()
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel(name)
        panel.grid(alpha=0.25, linewidth=0.6, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    right.axhline(0, color="black", linewidth=0.8, linestyle=":")
    right.set_title(f"at target loss {level:.3f}", fontsize=11)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw(axis: "Axes", trajectory: Trajectory, number: int, size: float) -> None:
    best = trajectory.best
    rows = [row for row in trajectory.rows if row["step"] <= best["step"]]
    colour = COLOURS[number % len(COLOURS)]
    line: dict[str, Any] = {
        "color": colour,
        "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
        "markersize": size,
        "linewidth": 1.3,
    }
    dashes: Any = "-" if number < len(COLOURS) else "--"
    axis.plot(*_points(rows), linestyle=dashes, label=trajectory.label, **line)
    ring: dict[str, Any] = {
        "marker": "o",
        "markersize": size + 6,
        "markerfacecolor": "none",
        "markeredgecolor": colour,
        "linestyle": "none",
    }
    axis.plot(*_points([best]), **ring)


def _points(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["target_val_loss"] for row in rows], [row["pretrain_val_loss"] for row in rows]


def _frame_ends(axis: "Axes", drawn: Sequence[Trajectory]) -> None:
    """The part where minima lie, with the band of target losses within 1% of plain finetuning's minimum."""
    bests = [t.best for t in drawn]
    low, high = (pick(row["target_val_loss"] for row in bests) for pick in (min, max))
    span = max(high - low, 0.05 * low)
    axis.set_xlim(low - 0.15 * span, high + 0.5 * span)
    shown = [row["pretrain_val_loss"] for t in drawn for row in t.rows if low <= row["target_val_loss"] <= high + 0.5 * span]
    start = drawn[0].rows[0]["pretrain_val_loss"]
    bottom, top = min(start, *shown), max(start, *shown)
    axis.set_ylim(bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom))
    axis.axhline(start, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("nothing forgotten", (0.01, start), xycoords=("axes fraction", "data"), ha="left", va="top", fontsize=8)
    plain = next((t for t in drawn if t.method == "plain"), None)
    if plain is not None:
        floor = plain.best["target_val_loss"]
        axis.axvspan(floor / (1 + TOLERANCE), floor * (1 + TOLERANCE), color="black", alpha=0.06, linewidth=0)
    axis.set_title("where they end (ring: minimum of the target loss; band: within 1% of plain)", fontsize=10)
