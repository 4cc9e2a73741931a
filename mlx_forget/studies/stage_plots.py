"""The figures of continual learning: each data set's loss after every stage, and the toy's right answers along its tasks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_forget.plots import COLOURS, MARKERS
from mlx_forget.studies.loss_matrix import LossMatrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_forget.studies.toy_continual import Outcome


def draw_stages(matrices: Sequence[LossMatrix], *, title: str) -> "Figure":
    """A panel for each data set; where the stage that learns it ended, a dotted line stands."""
    from matplotlib.figure import Figure

    columns = matrices[0].columns
    figure = Figure(figsize=(max(7.0, 3.1 * len(columns)), 3.9), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for column, axis in enumerate(panels):
        for number, matrix in enumerate(matrices):
            losses = [matrix.loss(row, column) for row in range(len(matrix.rows))]
            # Side by side: chains that do alike would hide one another.
            aside = 0.1 * (number - (len(matrices) - 1) / 2) / max(1, len(matrices) - 1)
            axis.errorbar(
                [row + aside for row in range(len(losses))],
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


def draw_exact_match(outcome: "Outcome", *, title: str) -> "Figure":
    """A panel for each task: the share of right answers along all tasks, one line for each arm; the task is learnt where it is grey."""
    from matplotlib.figure import Figure

    tasks, steps = outcome.spec.tasks, outcome.spec.steps
    figure = Figure(figsize=(max(7.0, 3.1 * len(tasks)), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for stage, (axis, task) in enumerate(zip(panels, tasks, strict=True)):
        axis.axvspan(stage * steps, (stage + 1) * steps, color="black", alpha=0.07, linewidth=0)
        for number, (arm, readings) in enumerate(outcome.arms.items()):
            axis.plot(
                [row["step"] for row in readings],
                [100 * row["exact_match"][task] for row in readings],
                color=COLOURS[(0, 4)[number]],
                marker=MARKERS[number],
                markersize=3.5,
                linewidth=1.4,
                label=arm,
            )
        axis.set_xlim(0, len(tasks) * steps)
        axis.set_ylim(-4, 104)
        axis.set_title(task, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("answers that match exactly (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure
