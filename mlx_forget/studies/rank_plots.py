"""The figure of a rank study: forgetting against finetuning loss, and against the step, for each target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_forget.plots import COLOURS, MARKERS
from mlx_forget.studies.rank_study import Joint, Line, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_study(points: Sequence[Point], lines: Sequence[Line], joint: Sequence[Joint], *, title: str) -> "Figure":
    """Two panels a target: on the left the line, on the right forgetting over the run with the law in (P, steps) dashed.

    Hollow are runs that the fits leave out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.3 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), 2, squeeze=False)
    arms = list(dict.fromkeys(p.arm for p in points))
    for row, line in zip(axes, lines, strict=True):
        own = [p for p in points if p.target == line.target]
        for number, arm in enumerate(arms):
            runs = dict.fromkeys(p.run for p in own if p.arm == arm)
            for k, run in enumerate(runs):
                _draw_run(row, [p for p in own if p.run == run], number, arm if k == 0 else None)
        _draw_line(row[0], own, line)
        for fit in joint:
            if fit.target == line.target and fit.response == "L_f":
                _draw_law(row[1], own, fit, arms)
        row[1].axhline(line.floor, color="black", linewidth=0.8, linestyle=":")
        row[1].annotate(
            "nothing forgotten", (0.99, line.floor), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
        for axis in row:
            axis.set_ylabel("$L_f$, cross-entropy to the base (nats)")
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_xlabel("$L_{ft}$, target validation loss (nats)")
        row[1].set_xlabel("finetuning step")
        row[0].set_title(
            f"{line.target}: $L_f$ = {line.intercept.value:.3f} − {line.slope.value:.3f} $L_{{ft}}$, $R^2$ = {line.r_squared.value:.3f}",
            fontsize=11,
        )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_run(row: Any, run: Sequence[Point], number: int, label: str | None) -> None:
    style: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)],
        "fillstyle": "full" if run[0].on_all else "none",
        "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
        "markersize": 4,
    }
    fitted = [p for p in run if p.fitted]
    row[0].plot([p.L_ft for p in fitted], [p.L_f for p in fitted], linestyle="none", label=label, **style)
    row[1].plot([p.step for p in run], [p.L_f for p in run], linewidth=0.8, **style)


def _draw_line(axis: "Axes", own: Sequence[Point], line: Line) -> None:
    ends = [pick(p.L_ft for p in own if p.fitted) for pick in (min, max)]
    axis.plot(ends, [line.intercept.value - line.slope.value * x for x in ends], color="black", linewidth=1.2, linestyle="--")


def _draw_law(axis: "Axes", own: Sequence[Point], fit: Joint, arms: Sequence[str]) -> None:
    import numpy as np

    from mlx_forget.laws.forms import get_law

    law = get_law("kalajdzievski-forgetting")
    for params, arm in {p.P: p.arm for p in own if p.on_all}.items():
        steps = np.linspace(min(p.step for p in own if p.fitted), max(p.step for p in own), 50)
        predicted = law.predict(fit.params, {"P": np.full(50, float(params)), "steps": steps})
        axis.plot(steps, predicted, color=COLOURS[arms.index(arm) % len(COLOURS)], linewidth=0.9, linestyle="--")
