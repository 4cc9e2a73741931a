"""What Figure 1 of Bethune et al. (2025) shows, from the runs of a sweep over p: curves, and what is read at the U-curve's minimum.

Everything is read at the evaluation with the lowest target validation loss. Standard errors are over evaluation windows; differences
between runs are paired by window, because all runs share the same frozen windows.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.durable_files import write_text
from mlx_forget.errors import UserError
from mlx_forget.evaluate import Estimate, Losses, estimate, paired_difference
from mlx_forget.history import read_history
from mlx_forget.pipeline.mixture import parse_share
from mlx_forget.records import Run

CSV_COLUMNS = ("p", "step", "tokens", "target_train_loss", "target_val_loss", "pretrain_val_loss")


@dataclass(frozen=True)
class Curve:
    """One run of the figure.

    Args:
        p: the share asked for.
        label: p as the user wrote it.
        rows: its history, one mapping per evaluation.
        best: index of the row with the lowest target validation loss.
    """

    p: Fraction
    label: str
    seed: int
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    best: int

    @property
    def at_best(self) -> dict[str, Any]:
        return self.rows[self.best]

    def windows(self, name: str, row: int | None = None) -> Losses:
        """Per-window losses, float64[num_windows], at a row (default: the minimum)."""
        return np.array(self.rows[self.best if row is None else row][f"{name}_windows"])


@dataclass(frozen=True)
class Row:
    """One line of the table: everything at the minimum of the target validation loss.

    Args:
        forgetting: pretraining loss there minus at the start, paired.
        less_than_previous: how much less is forgotten than with the next smaller p, paired; None for the smallest.
        ratio: forgetting over that of p = 0; None without such a run.
        rise: target validation loss of the last evaluation over the minimum.
    """

    curve: Curve
    target: Estimate
    pretrain: Estimate
    forgetting: Estimate
    less_than_previous: Estimate | None
    ratio: float | None
    rise: float


def load_curves(runs: Sequence[Run], seed: int | None = None) -> list[Curve]:
    """The finetuning runs as curves, ordered by p.

    Raises:
        UserError: no finished finetuning runs, several seeds and none chosen, or two runs of one p.
    """
    finetunes = [run for run in runs if run.record["forgetting_nats"] is not None]
    if not finetunes:
        raise UserError("There are no finished finetuning runs here that measured a pretraining loss.")
    seeds = sorted({run.record["seed"] for run in finetunes})
    if seed is None and len(seeds) > 1:
        raise UserError(f"The runs have several seeds ({', '.join(map(str, seeds))}): choose one with --seed.")
    curves = []
    for run in finetunes:
        if seed is not None and run.record["seed"] != seed:
            continue
        rows = read_history(run.history).to_pylist()
        best = next(i for i, row in enumerate(rows) if row["step"] == run.record["losses"]["best"]["step"])
        asked = str(run.record["config"]["p"])
        curves.append(Curve(parse_share(asked), _percent(asked), run.record["seed"], run.record, rows, best))
    curves.sort(key=lambda curve: curve.p)
    if len({curve.p for curve in curves}) != len(curves):
        raise UserError("Two runs have the same p: Figure 1 needs runs that differ in p alone.")
    return curves


def table(curves: Sequence[Curve]) -> list[Row]:
    """One row per p, in rising order."""
    rows = []
    without = next((curve for curve in curves if curve.p == 0), None)
    for number, curve in enumerate(curves):
        forgetting = paired_difference(curve.windows("pretrain_val"), curve.windows("pretrain_val", 0))
        previous = curves[number - 1] if number else None
        less = paired_difference(previous.windows("pretrain_val"), curve.windows("pretrain_val")) if previous else None
        rows.append(
            Row(
                curve=curve,
                target=estimate(curve.windows("target_val")),
                pretrain=estimate(curve.windows("pretrain_val")),
                forgetting=forgetting,
                less_than_previous=less,
                ratio=forgetting.mean / _forgetting(without) if without is not None else None,
                rise=curve.rows[-1]["target_val_loss"] - curve.at_best["target_val_loss"],
            )
        )
    return rows


def write_csv(curves: Sequence[Curve], path: Path) -> None:
    """Every evaluation of every run, columns `CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for curve in curves:
        for row in curve.rows:
            writer.writerow([float(curve.p), *(row[column] for column in CSV_COLUMNS[1:])])
    write_text(path, text.getvalue())


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table as plain values."""
    return [
        {
            "p": float(row.curve.p),
            "run_id": row.curve.record["run_id"],
            "seed": row.curve.seed,
            "step_of_minimum": row.curve.at_best["step"],
            "num_steps": row.curve.rows[-1]["step"],
            "target_val_loss": row.target.mean,
            "target_val_stderr": row.target.stderr,
            "pretrain_val_loss": row.pretrain.mean,
            "pretrain_val_stderr": row.pretrain.stderr,
            "forgetting_nats": row.forgetting.mean,
            "forgetting_stderr": row.forgetting.stderr,
            "progress_lost": row.curve.record["progress_lost"],
            "ratio_to_p0": row.ratio,
            "less_than_previous": None if row.less_than_previous is None else row.less_than_previous.mean,
            "less_than_previous_stderr": None if row.less_than_previous is None else row.less_than_previous.stderr,
            "rise_after_minimum": row.rise,
        }
        for row in rows
    ]


def _forgetting(curve: Curve) -> float:
    return float(curve.at_best["pretrain_val_loss"] - curve.rows[0]["pretrain_val_loss"])


def _percent(asked: str) -> str:
    share = float(parse_share(asked)) * 100
    return f"{share:g}%"
