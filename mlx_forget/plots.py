"""Figures, drawn with matplotlib in a palette that colour-blind readers can tell apart, each line also marked by its own shape."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_forget.durable_files import replacing
from mlx_forget.history import read_history
from mlx_forget.records import Run
from mlx_forget.studies.figure1 import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too faint on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_PANELS = (
    ("target_val_loss", "target validation loss"),
    ("target_train_loss", "target train loss"),
    ("pretrain_val_loss", "pretraining validation loss"),
)


def draw_figure1(curves: Sequence[Curve], *, title: str) -> "Figure":
    """Three panels against the step: target validation, target train and pretraining loss, a colour per p, the minima marked.

    Of several seeds, the first has the heavier lines.
    """
    return _draw_panels(curves, [f"p = {curve.label}" for curve in curves], title=title)


def _draw_panels(curves: Sequence[Curve], names: Sequence[str], *, title: str) -> "Figure":
    """Curves of one name have one colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.9), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True)
    told = list(dict.fromkeys(names))
    for axis, (column, name) in zip(axes, _PANELS, strict=True):
        for number, curve in enumerate(curves):
            place, is_first = told.index(names[number]), names[number] not in names[:number]
            shown = [row for row in curve.rows if row[column] is not None]
            axis.plot(
                [row["step"] for row in shown],
                [row[column] for row in shown],
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                markersize=3.5 if is_first else 2,
                linewidth=1.4 if is_first else 0.7,
                label=names[number] if is_first else None,
            )
            axis.plot(
                curve.at_best["step"],
                curve.at_best[column],
                marker="o",
                markersize=9 if is_first else 6,
                markerfacecolor="none",
                markeredgecolor="black",
                markeredgewidth=1.6 if is_first else 0.8,
                linestyle="none",
                label="minimum of the target validation loss" if number == len(curves) - 1 else None,
            )
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("finetuning step")
        axis.set_ylabel("loss (nats per token)")
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_histories(runs: Sequence[Run]) -> "Figure":
    """Runs side by side, in the panels of Figure 1: one line per run, its minimum marked, its beginning id as its name."""
    curves = []
    for run in runs:
        rows = read_history(run.history).to_pylist()
        best = next((i for i, row in enumerate(rows) if row["step"] == run.record["losses"]["best"]["step"]), 0)
        curves.append(Curve(Fraction(0), run.record["run_id"][:12], run.record["seed"], run.record, rows, best))
    return _draw_panels(curves, [curve.label for curve in curves], title="")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure in the format of the path's suffix, aside first."""
    # Without dates, the same runs give the same files.
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=160, metadata=metadata)
