"""The report as one self-contained HTML page."""

from collections.abc import Sequence
from typing import Any

from mlx_forget.pages.chart import short_count
from mlx_forget.pages.templates import render_page
from mlx_forget.report.contents import Report
from mlx_forget.report.curves import Panel, share_text
from mlx_forget.report.fits import RESPONSES
from mlx_forget.report.plots import curve_plots, fit_plot, method_plot, scatters
from mlx_forget.runs.rows import METHODS_OF_THE_LAWS, Row

# A table of more runs than this is folded away, and its cells are not drawn until they are looked at.
MOST_OPEN_ROWS = 300
# Values of a key, and names of folders, that are written out.
MOST_VALUES = 12


def render(report: Report) -> str:
    """The page."""
    described = [row for row in report.finetunes if row["method"] in METHODS_OF_THE_LAWS]
    return render_page(
        "report/page.html.jinja",
        report=report,
        headlines=headlines(report.panels),
        warnings=warnings(report),
        axes=[(key, _values(key, values, report.finetunes)) for key, values in report.recipe.axes.items()],
        bases=bases(report.runs.rows),
        panels=[(panel, curve_plots(panel)) for panel in report.panels],
        scatters=scatters(described or report.finetunes, report.fits),
        fits=[(one, RESPONSES[one.response], fit_plot(one) if one.uncertainty is not None else None) for one in report.fits],
        method_plot=method_plot(report.methods.trajectories) if report.methods is not None and report.methods.rows else None,
        rows=sorted(report.runs.rows, key=_order),
        confidence=report.confidence,
        undetermined=undetermined(report),
        many_devices=len(report.distinct("device")) > 1 or len(report.distinct("backend")) > 1,
        is_open=len(report.runs.rows) <= MOST_OPEN_ROWS,
        short=short_count,
        share=share_text,
        few=few,
    )


def headlines(panels: Sequence[Panel]) -> list[str]:
    """What the panels say in a sentence each; of many the first and the last."""
    lines = [line for panel in panels if (line := headline(panel))]
    return lines if len(lines) < 3 else [lines[0], lines[-1]]


def headline(panel: Panel) -> str:
    """What a panel says in a sentence: what is forgotten without injection, and with the most of it."""
    if not panel.by_share or len(panel.curves) < 2 or panel.curves[0].p != 0:
        return ""
    without, most = panel.readings[0].forgetting, panel.readings[-1].forgetting
    text = (
        f"{panel.name}: without injection the pretraining loss rises by {without.mean:.3f} nats at the minimum of the target loss; "
    )
    text += f"with {panel.names[-1]} by {most.mean:.3f}"
    return text + (f", {1 - most.mean / without.mean:.0%} less." if 0 < most.mean < without.mean else ".")


def warnings(report: Report) -> list[str]:
    """What a reader should know before trusting a number."""
    made = []
    for name, problem in report.runs.problems.items():
        made.append(f"{name}: {problem}, and left out.")
    if len(made) > MOST_VALUES:
        made = [*made[:MOST_VALUES], f"{len(report.runs.problems) - MOST_VALUES} more records cannot be read."]
    if report.runs.begun:
        made.append(f"{_number(report.runs.begun, 'run was', 'runs were')} begun and left no record: {few(report.runs.begun)}.")
    if report.runs.copies:
        made.append(
            f"{_number(report.runs.copies, 'folder is', 'folders are')} copies of others, and left out: {few(report.runs.copies)}."
        )
    if report.runs.diverged:
        ids = [str(row["run"]) for row in report.runs.diverged]
        made.append(f"{_number(ids, 'run', 'runs')} diverged, and stand in the table of runs only: {few(ids)}.")
    for column, what in (
        ("versions", "versions of libraries"),
        ("device", "devices"),
        ("precision", "precisions"),
        ("backend", "backends"),
    ):
        found = report.distinct(column)
        if len(found) > 1:
            made.append(f"These runs are of {len(found)} {what}: {few([str(value) for value in found], 4)}.")
    if False in report.distinct("same_as_published"):
        made.append("Some runs learnt built-in corpora that differ from those of the published numbers.")
    return made


def undetermined(report: Report) -> list[tuple[str, str]]:
    """Parameters of the laws that give advice which the runs do not determine, by domain."""
    made = []
    for one in report.fits:
        predictor = one.predictor if one.response == "pretraining" else None
        if predictor is not None and predictor.unidentified and "p" in predictor.law.columns:
            made.append((one.domain, ", ".join(predictor.unidentified)))
    return made


def bases(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The base models: their sizes, their losses before finetuning, and how many runs started from each."""
    made: dict[Any, dict[str, Any]] = {}
    for row in rows:
        if row["base"] == "scratch" or row["forgetting_nats"] is None:
            continue
        one = made.setdefault(row["base"], {"id": str(row["base"]), "N": row["N"], "L0": row["L0"], "num_runs": 0})
        one["num_runs"] += 1
    return sorted(made.values(), key=lambda one: (one["N"], one["id"]))


def few(names: Sequence[str], most: int = MOST_VALUES) -> str:
    """Names in a row, of many the first."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _number(things: Sequence[Any], one: str, several: str) -> str:
    return f"{len(things):,} {one if len(things) == 1 else several}"


def _values(key: str, values: Sequence[Any], rows: Sequence[Row]) -> str:
    texts = ["none" if value is None else str(value) for value in values]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(values) > MOST_VALUES and len(numbers) == len(values):
        return f"{len(values):,} values from {min(numbers):g} to {max(numbers):g}"
    return few(texts)


def _order(row: Row) -> tuple[Any, ...]:
    return (
        row["base"] != "scratch",
        row["domain"],
        row["N"],
        row["D"] or 0.0,
        row["method"],
        row["p"] or 0.0,
        row["seed"] or 0,
        str(row["run"]),
    )
