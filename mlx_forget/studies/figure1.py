"""What Figure 1 of Bethune et al. (2025) shows, from the runs of a sweep over p: curves, and what is read at the U-curve's minimum.

Everything is read at the evaluation with the lowest target validation loss. Standard errors are over evaluation windows; differences
between runs are paired by window, because all runs share the same frozen windows.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from mlx_forget.studies.seeds import deviation_text, mean_and_sd

CSV_COLUMNS = ("p", "seed", "step", "tokens", "target_train_loss", "target_val_loss", "pretrain_val_loss")


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
    """One run, one line of the table: everything at the minimum of the target validation loss.

    Args:
        forgetting: pretraining loss there minus at the start, paired.
        less_than_previous: how much less is forgotten than with the next smaller p of its seed, paired; None for the smallest.
        ratio: forgetting over that of p = 0 with its seed; None without such a run.
        rise: target validation loss of the last evaluation over the minimum.
    """

    curve: Curve
    target: Estimate
    pretrain: Estimate
    forgetting: Estimate
    less_than_previous: Estimate | None
    ratio: float | None
    rise: float


@dataclass(frozen=True)
class Spread:
    """One p over its seeds: means, and standard deviations over seeds (None for one seed).

    Args:
        step: of the minimum, mean.
        ratio, ratio_sd: over the seeds that have a run of p = 0; None where none has.
    """

    p: Fraction
    label: str
    seeds: list[int]
    step: float
    target: float
    target_sd: float | None
    forgetting: float
    forgetting_sd: float | None
    ratio: float | None
    ratio_sd: float | None


def load_curves(runs: Sequence[Run], seed: int | None = None) -> list[Curve]:
    """The finetuning runs as curves, ordered by p, then seed.

    Args:
        seed: the only one that is read; None reads all.

    Raises:
        UserError: no finished finetuning runs, or two runs of one p and seed.
    """
    finetunes = [run for run in runs if run.record["forgetting_nats"] is not None]
    if not finetunes:
        raise UserError("There are no finished finetuning runs here that measured a pretraining loss.")
    curves = []
    for run in finetunes:
        if seed is not None and run.record["seed"] != seed:
            continue
        rows = read_history(run.history).to_pylist()
        best = next(i for i, row in enumerate(rows) if row["step"] == run.record["losses"]["best"]["step"])
        asked = str(run.record["config"]["p"])
        curves.append(Curve(parse_share(asked), _percent(asked), run.record["seed"], run.record, rows, best))
    if not curves:
        seeds = ", ".join(str(value) for value in sorted({run.record["seed"] for run in finetunes}))
        raise UserError(f"There are no runs of seed {seed} here, but of {seeds}.")
    curves.sort(key=lambda curve: (curve.p, curve.seed))
    if len({(curve.p, curve.seed) for curve in curves}) != len(curves):
        raise UserError("Two runs have the same p and seed: Figure 1 needs runs that differ in nothing else.")
    return curves


def table(curves: Sequence[Curve]) -> list[Row]:
    """One row per run, in the order of the curves; differences and ratios are within a seed."""
    rows = []
    without: dict[int, Curve] = {}
    for curve in curves:
        if curve.p == 0:
            without.setdefault(curve.seed, curve)
    last: dict[int, Curve] = {}
    for curve in curves:
        forgetting = paired_difference(curve.windows("pretrain_val"), curve.windows("pretrain_val", 0))
        previous, base = last.get(curve.seed), without.get(curve.seed)
        less = paired_difference(previous.windows("pretrain_val"), curve.windows("pretrain_val")) if previous else None
        rows.append(
            Row(
                curve=curve,
                target=estimate(curve.windows("target_val")),
                pretrain=estimate(curve.windows("pretrain_val")),
                forgetting=forgetting,
                less_than_previous=less,
                # Where a run without injection was best at its start, nothing was forgotten to compare with.
                ratio=forgetting.mean / _forgetting(base) if base is not None and _forgetting(base) else None,
                rise=curve.rows[-1]["target_val_loss"] - curve.at_best["target_val_loss"],
            )
        )
        last[curve.seed] = curve
    return rows


def over_seeds(rows: Sequence[Row]) -> list[Spread]:
    """One line per p, in rising order; none where all runs have one seed."""
    if len({row.curve.seed for row in rows}) < 2:
        return []
    found = []
    for p in sorted({row.curve.p for row in rows}):
        group = [row for row in rows if row.curve.p == p]
        target, target_sd = mean_and_sd([row.target.mean for row in group])
        forgetting, forgetting_sd = mean_and_sd([row.forgetting.mean for row in group])
        ratios = [row.ratio for row in group if row.ratio is not None]
        ratio, ratio_sd = mean_and_sd(ratios) if ratios else (None, None)
        found.append(
            Spread(
                p=p,
                label=group[0].curve.label,
                seeds=[row.curve.seed for row in group],
                step=float(np.mean([row.curve.at_best["step"] for row in group])),
                target=target,
                target_sd=target_sd,
                forgetting=forgetting,
                forgetting_sd=forgetting_sd,
                ratio=ratio,
                ratio_sd=ratio_sd,
            )
        )
    return found


def write_csv(curves: Sequence[Curve], path: Path) -> None:
    """Every evaluation of every run, columns `CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for curve in curves:
        for row in curve.rows:
            writer.writerow([float(curve.p), curve.seed, *(row[column] for column in CSV_COLUMNS[2:])])
    write_text(path, text.getvalue())


def as_json(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """The table as plain values: rows, one per run, and over_seeds, one per p, which is empty where all runs have one seed."""
    spread = [{**asdict(one), "p": float(one.p)} for one in over_seeds(rows)]
    return {"rows": [_row_as_json(row) for row in rows], "over_seeds": spread}


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Plain aligned text: it goes into logs and papers."""
    spread = over_seeds(rows)
    header = (
        f"{'p':>6}  {'seed  ' if spread else ''}{'minimum at':>13}  {'target val':>15}  {'pretraining val':>15}  {'forgetting (nats)':>17}  "
        f"{'to p=0':>6}  {'progress lost: loss, tokens':>27}  {'less than smaller p':>19}  {'rise at end':>11}"
    )
    lines = [header]
    for row in rows:
        best, lost = row.curve.at_best, row.curve.record["progress_lost"]
        seed = f"{row.curve.seed:>4}  " if spread else ""
        steps = f"{best['step']:,}/{row.curve.rows[-1]['step']:,}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        shares = ", ".join("?" if value is None else f"{value:.1%}" for value in (lost["loss_fraction"], lost["token_equivalent"]))
        less = row.less_than_previous
        fall = "" if less is None else f"{less.mean:+.4f}±{less.stderr:.4f}"
        lines.append(
            f"{row.curve.label:>6}  {seed}{steps:>13}  {row.target.mean:>8.4f}±{row.target.stderr:.4f}  "
            f"{row.pretrain.mean:>8.4f}±{row.pretrain.stderr:.4f}  {row.forgetting.mean:>+10.4f}±{row.forgetting.stderr:.4f}  {ratio:>6}  "
            f"{shares:>27}  {fall:>19}  {row.rise:>+11.4f}"
        )
    lines.append("± is one standard error over evaluation windows; differences are paired by window, within a seed.")
    if spread:
        lines += ["", f"{'p':>6}  {'seeds':>5}  {'minimum at':>10}  {'target val':>15}  {'forgetting (nats)':>17}  {'to p=0':>9}"]
        for one in spread:
            ratio = "" if one.ratio is None else f"{one.ratio:.2f}{'' if one.ratio_sd is None else f'±{one.ratio_sd:.2f}'}"
            lines.append(
                f"{one.label:>6}  {len(one.seeds):>5}  {one.step:>10,.0f}  {one.target:>8.4f}{deviation_text(one.target_sd):>7}  "
                f"{one.forgetting:>+10.4f}{deviation_text(one.forgetting_sd):>7}  {ratio:>9}"
            )
        lines.append("Means over seeds; ± is the standard deviation over seeds.")
    return lines


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
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


def _forgetting(curve: Curve) -> float:
    return float(curve.at_best["pretrain_val_loss"] - curve.rows[0]["pretrain_val_loss"])


def _percent(asked: str) -> str:
    share = float(parse_share(asked)) * 100
    return f"{share:g}%"
