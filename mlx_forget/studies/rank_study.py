"""Forgetting against finetuning loss, over ranks and steps (Kalajdzievski 2024), from runs that were compared with their start model.

Every evaluation after the warm-up is a point: L_ft is the target validation loss, L_f the cross-entropy to the start model's distribution on
the pretraining windows, P the number of trained parameters. The line L_f = s - c L_ft is fitted by least squares to the runs whose adapters
sit on all linear maps; the others (attention only, all weights) are held against it. Evaluations of one run are not independent: intervals
are t times the spread over resampled runs, as those of `forget fit`.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget.adapters import ALL_LINEAR
from mlx_forget.durable_files import write_text
from mlx_forget.errors import UserError
from mlx_forget.history import read_history
from mlx_forget.records import Run
from mlx_forget.studies.method_comparison import ADAPTERS

# The first steps, while the rate warms up, are no part of the fits: 50 of 260 in the paper.
WARMUP_SHARE = 50 / 260
_RESAMPLES = 2000
_LEVEL = 0.95
CSV_COLUMNS = ("target", "arm", "seed", "run", "P", "step", "L_ft", "L_f", "L_f_hard", "kl", "agreement", "pretrain_val")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One evaluation: losses in nats per token.

    Args:
        arm: how the run was finetuned, in words.
        on_all: the run's adapters sit on all linear maps.
        rank: of the adapters; None without.
        fitted: it lies after the warm-up.
    """

    target: str
    arm: str
    on_all: bool
    rank: int | None
    seed: int
    run: str
    P: int
    step: int
    L_ft: float
    L_f: float
    L_f_hard: float
    kl: float
    agreement: float
    pretrain_val: float
    fitted: bool


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval over resampled runs; ends are None where there are fewer than three runs."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Line:
    """L_f = intercept - slope L_ft on one target's points.

    Args:
        floor: the start model's entropy, the L_f of a model that has forgotten nothing.
    """

    target: str
    slope: Interval
    intercept: Interval
    r_squared: Interval
    num_runs: int
    num_points: int
    floor: float


@dataclass(frozen=True)
class Beside:
    """Runs that the line was not fitted to.

    Args:
        r_squared: of the line on their points; below 0 where their mean says more.
        excess: what they have forgotten beyond the line, nats, on average.
    """

    target: str
    arm: str
    num_points: int
    r_squared: float
    excess: float


@dataclass(frozen=True)
class Joint:
    """The shifted power law in (P, steps), fitted to the points of the line.

    Args:
        response: `L_f` or `L_ft`.
        r_squared: of its predictions, in nats.
        status: how the fit ended.
        flags: what the data do not determine.
    """

    target: str
    response: str
    params: dict[str, float]
    r_squared: float
    status: str
    flags: list[str]


def load_points(runs: Sequence[Run], seed: int | None = None) -> list[Point]:
    """Every evaluation of the runs that were compared with their start model, targets and arms in order.

    Raises:
        UserError: there is none.
    """
    points = []
    for run in runs:
        record, config = run.record, run.record["config"]
        if "forgetting_ce" not in record["losses"]["start"] or (seed is not None and record["seed"] != seed):
            continue
        adapted = config["fine_tune_type"] != "full"
        modules, last = config["lora_target_modules"], config.get("lora_num_layers")
        place = modules if last is None else f"{modules} of the last {last} blocks"
        whole = "all weights" if last is None else f"weights of the last {last} blocks"
        rank = None if config["fine_tune_type"] in ("full", "ia3") else config["lora_rank"]
        ranked = ADAPTERS[config["fine_tune_type"]] + (f" r = {rank}, {place}" if rank is not None else "") if adapted else ""
        arm = ranked or whole
        warmup = WARMUP_SHARE * record["num_steps"]
        for row in read_history(run.history).to_pylist():
            points.append(
                Point(
                    target=config["target"],
                    arm=arm,
                    on_all=rank is not None and place == ALL_LINEAR,
                    rank=rank,
                    seed=record["seed"],
                    run=record["run_id"],
                    P=record["num_trainable_params"],
                    step=row["step"],
                    L_ft=row["target_val_loss"],
                    L_f=row["forgetting_ce"],
                    L_f_hard=row["forgetting_ce_hard"],
                    kl=row["forgetting_kl"],
                    agreement=row["start_agreement"],
                    pretrain_val=row["pretrain_val_loss"],
                    fitted=row["step"] > warmup,
                )
            )
    if not points:
        raise UserError("None of these runs was compared with its start model: train them with --compare-to-start.")
    return sorted(points, key=lambda p: (p.target, not p.on_all, p.P, p.arm, p.seed, p.step))


def fit_lines(points: Sequence[Point]) -> list[Line]:
    """The line of each target.

    Raises:
        UserError: a target without three evaluations after the warm-up.
    """
    from scipy.special import stdtrit

    lines = []
    for target in dict.fromkeys(p.target for p in points):
        own = _described(points, target)
        if len(own) < 3:
            raise UserError(f"The runs on {target} have {len(own)} evaluations after their warm-up; a line needs three.")
        x, y = np.array([p.L_ft for p in own]), np.array([p.L_f for p in own])
        names = list(dict.fromkeys(p.run for p in own))
        members = [np.flatnonzero([p.run == name for p in own]) for name in names]
        value = _line(x, y)
        ends: list[tuple[float | None, float | None]] = [(None, None)] * 3
        if len(names) >= 3:
            rng = np.random.default_rng(0)
            draws = [np.concatenate([members[k] for k in rng.integers(0, len(names), len(names))]) for _ in range(_RESAMPLES)]
            reach = stdtrit(len(names) - 1, (1 + _LEVEL) / 2) * np.std([_line(x[rows], y[rows]) for rows in draws], axis=0, ddof=1)
            ends = [(float(v - r), float(v + r)) for v, r in zip(value, reach, strict=True)]
        slope, intercept, r_squared = (Interval(float(v), *end) for v, end in zip(value, ends, strict=True))
        floor = float(np.mean([p.L_f - p.kl for p in points if p.target == target]))
        lines.append(Line(target, slope, intercept, r_squared, len(names), len(own), floor))
    return lines


def hold_beside(points: Sequence[Point], lines: Sequence[Line]) -> list[Beside]:
    """The arms that a target's line was not fitted to, against it."""
    found = []
    for line in lines:
        described = {p.run for p in _described(points, line.target)}
        others = [p for p in points if p.target == line.target and p.fitted and p.run not in described]
        for arm in dict.fromkeys(p.arm for p in others):
            own = [p for p in others if p.arm == arm]
            x, y = np.array([p.L_ft for p in own]), np.array([p.L_f for p in own])
            predicted = line.intercept.value - line.slope.value * x
            found.append(Beside(line.target, arm, len(own), _r_squared(y, predicted), float(np.mean(y - predicted))))
    return found


def fit_joint(points: Sequence[Point]) -> list[Joint]:
    """The laws of both losses in (P, steps), for each target; none where the runs have one P."""
    from mlx_forget.laws.fit import FitOptions, fit_law
    from mlx_forget.laws.table import Table

    found = []
    for target in dict.fromkeys(p.target for p in points):
        own = _described(points, target)
        if len({p.P for p in own}) < 2:
            continue
        columns: dict[str, Any] = {"P": [p.P for p in own], "steps": [p.step for p in own]}
        responses: tuple[tuple[str, str, Callable[[Point], float]], ...] = (
            ("L_ft", "kalajdzievski-finetuning", lambda p: p.L_ft),
            ("L_f", "kalajdzievski-forgetting", lambda p: p.L_f),
        )
        for response, law, measure in responses:
            values = np.array([measure(p) for p in own])
            table = Table.of(run=[p.run for p in own], loss=values, **columns)
            fit = fit_law(table, law, options=FitOptions(allow_units=True))
            predicted = fit.predict(table.columns)
            flags = [str(flag) for flag in fit.flags]
            found.append(Joint(target, response, dict(fit.params), _r_squared(values, predicted), fit.certificate.status, flags))
    return found


def study_lines(lines: Sequence[Line], beside: Sequence[Beside], joint: Sequence[Joint]) -> list[str]:
    """The fits as text."""
    text = []
    for line in lines:
        text.append(
            f"{line.target}: L_f = {_shown(line.intercept)} - {_shown(line.slope)} L_ft, R^2 {_shown(line.r_squared)} "
            f"({line.num_points} evaluations of {line.num_runs} runs; nothing forgotten is L_f = {line.floor:.4f})"
        )
        for other in beside:
            if other.target == line.target:
                text.append(
                    f"  {other.arm}: {other.excess:+.4f} nats beyond the line, R^2 of the line {other.r_squared:.3f} ({other.num_points} evaluations)"
                )
        for fit in joint:
            if fit.target == line.target:
                params = ", ".join(f"{name} {value:.4g}" for name, value in fit.params.items())
                text.append(f"  {fit.response} in (P, steps): R^2 {fit.r_squared:.4f} ({fit.status}; {params})")
    text.append(
        "Brackets: 95% intervals over resampled runs. The paper: slope 1.73, R^2 0.945 on OpenOrca; 1.06, 0.974 on News (7B parameters)."
    )
    return text


def as_json(lines: Sequence[Line], beside: Sequence[Beside], joint: Sequence[Joint]) -> dict[str, Any]:
    """The fits as plain values."""
    return {"lines": [asdict(x) for x in lines], "beside": [asdict(x) for x in beside], "joint": [asdict(x) for x in joint]}


def write_csv(points: Sequence[Point], path: Path) -> None:
    """Every evaluation, columns `CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for point in points:
        writer.writerow([getattr(point, column) for column in CSV_COLUMNS])
    write_text(path, text.getvalue())


def _described(points: Sequence[Point], target: str) -> list[Point]:
    """The points that a target's fits are made of: of adapters on all linear maps, or of whatever there is without such."""
    own = [p for p in points if p.target == target and p.fitted]
    return [p for p in own if p.on_all] or own


def _line(x: Floats, y: Floats) -> tuple[float, float, float]:
    """Slope c, intercept s and R^2 of y = s - c x."""
    spread = ((x - x.mean()) ** 2).sum()
    slope = 0.0 if spread == 0 else float(-((x - x.mean()) * (y - y.mean())).sum() / spread)
    intercept = float(y.mean() + slope * x.mean())
    return slope, intercept, _r_squared(y, intercept - slope * x)


def _r_squared(measured: Floats, predicted: Floats) -> float:
    spread = float(((measured - measured.mean()) ** 2).sum())
    return 1.0 - float(((measured - predicted) ** 2).sum()) / spread if spread else float("nan")


def _shown(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:.4f}"
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
