"""The figure of continual learning: each data set's loss after every stage, one line for each chain."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_forget.loss_matrix import LossMatrix
from mlx_forget.plots import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_stages(matrices: Sequence[LossMatrix], *, title: str) -> "Figure":
    """A panel for each data set; where the stage that learns it ended, a dotted line stands."""
    from matplotlib.figure import Figure

    columns = matrices[0].columns
    figure = Figure(figsize=(max(7.0, 3.1 * len(columns)), 3.9), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for column, axis in enumerate(panels):
        for number, matrix in enumerate(matrices):
            losses = [matrix.loss(row, column) for row in range(len(matrix.rows))]
            axis.errorbar(
                range(len(losses)),
                [loss.mean for loss in losses],
                yerr=[loss.stderr for loss in losses],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle="-" if number < len(COLOURS) else "--",
                markersize=4,
                linewidth=1.4,
                capsize=2,
                label=matrix.label or "stages",
            )
        learnt = column - matrices[0].first_stage + 1
        if learnt > 0:
            axis.axvline(learnt, color="black", linewidth=0.8, linestyle=":")
        longest = max(matrices, key=lambda matrix: len(matrix.rows))
        axis.set_xticks(range(len(longest.rows)), longest.rows, rotation=30, ha="right", fontsize=8)
        axis.set_title(f"loss on {columns[column]}", fontsize=11)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss (nats per token)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure
