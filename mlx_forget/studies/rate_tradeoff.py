"""The learning rate's trade-off: what each rate forgets on the way to one target loss, and how many steps it takes.

All runs are read where they first reach the same target validation loss: the lowest that every run reached. Between evaluations, losses
and steps are interpolated linearly in the target loss.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_forget.errors import UserError
from mlx_forget.studies.method_comparison import Trajectory


@dataclass(frozen=True)
class Point:
    """One run where it first reaches the common target loss.

    Args:
        step: optimiser steps, interpolated.
        forgetting: rise of the pretraining loss since the start, nats per token.
    """

    label: str
    seed: int
    learning_rate: float
    step: float
    forgetting: float


def common_target_loss(trajectories: Sequence[Trajectory]) -> float:
    """The lowest target validation loss that every run reached.

    Raises:
        UserError: a run that learnt nothing.
    """
    level = max(float(t.best["target_val_loss"]) for t in trajectories)
    for t in trajectories:
        if t.rows[0]["target_val_loss"] <= level:
            raise UserError(
                f"{t.label} at a rate of {t.record['learning_rate']:.3g} starts at or below the target loss {level:.4f} that all runs reach: "
                "a run of this sweep learnt nothing."
            )
    return level


def points(trajectories: Sequence[Trajectory]) -> list[Point]:
    """Every run at the common target loss, by method, then by falling rate."""
    level = common_target_loss(trajectories)
    order = {label: number for number, label in enumerate(dict.fromkeys(t.label for t in trajectories))}
    found = [_at(t, level) for t in trajectories]
    return sorted(found, key=lambda point: (order[point.label], point.seed, -point.learning_rate))


def reading_at(trajectory: Trajectory, level: float) -> tuple[float, float]:
    """(step, forgetting in nats) where a run that reaches a target loss, and starts above it, first does."""
    rows = trajectory.rows
    index = next(i for i, row in enumerate(rows) if row["target_val_loss"] <= level)
    before, after = rows[index - 1], rows[index]
    share = (before["target_val_loss"] - level) / (before["target_val_loss"] - after["target_val_loss"])
    forgetting = [trajectory.forgetting(row) for row in (before, after)]
    return before["step"] + share * (after["step"] - before["step"]), forgetting[0] + share * (forgetting[1] - forgetting[0])


def _at(trajectory: Trajectory, level: float) -> Point:
    step, forgetting = reading_at(trajectory, level)
    return Point(
        label=trajectory.label,
        seed=trajectory.seed,
        learning_rate=trajectory.record["learning_rate"],
        step=step,
        forgetting=forgetting,
    )


def point_lines(found: Sequence[Point], level: float) -> list[str]:
    """The points as aligned text."""
    width = max(len(point.label) for point in found)
    lines = [f"{'method':<{width}}  {'seed':>4}  {'rate':>9}  {'steps':>8}  {'forgetting (nats)':>17}"]
    lines += [f"{p.label:<{width}}  {p.seed:>4}  {p.learning_rate:>9.2e}  {p.step:>8,.1f}  {p.forgetting:>+17.4f}" for p in found]
    return [*lines, f"All read where the target validation loss first reaches {level:.4f}."]


def points_as_json(found: Sequence[Point], level: float) -> dict[str, Any]:
    """The points as plain values."""
    return {"target_val_loss": level, "rows": [asdict(point) for point in found]}
