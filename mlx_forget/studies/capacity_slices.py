"""What capacity does to forgetting: the least that is forgotten on the way to one target loss, by model size or by length of pretraining.

After Marek et al. (2026, experiments model_size and pretrain_length): of all coefficients with which a method reaches the target loss, the
one that has forgotten least counts; runs that do not reach it are left out, and how many did is said. Between evaluations, losses are
interpolated linearly in the target loss.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_forget.config import TrainConfig
from mlx_forget.config_layers import from_layers
from mlx_forget.errors import UserError
from mlx_forget.studies.method_comparison import Trajectory, describe
from mlx_forget.studies.rate_tradeoff import common_target_loss, reading_at

Axis = Literal["model-size", "pretrain-length"]
AXES: dict[Axis, str] = {"model-size": "parameters", "pretrain-length": "pretraining tokens per parameter"}


@dataclass(frozen=True)
class SlicePoint:
    """The least that a method forgets at one size or length.

    Args:
        x: parameters, or pretraining tokens per parameter.
        before: the pretraining loss at the start, nats per token.
        learnt: what the target loss had to fall by, nats per token: a base that knows more of the target has less to learn.
        forgetting: its rise where the target loss is first reached, with the best coefficient.
        coefficient: that one; None is the method's default.
        num_reached, num_runs: runs that reached the target loss, of how many.
    """

    label: str
    seed: int
    x: float
    before: float
    learnt: float
    forgetting: float
    coefficient: float | None
    num_reached: int
    num_runs: int


def target_loss(trajectories: Sequence[Trajectory]) -> float:
    """The target loss at which runs are read: that which they all were to stop at, else the lowest that every run reached.

    Raises:
        UserError: a run starts at or below it.
    """
    asked = {t.record["config"].get("stop_target_loss") for t in trajectories}
    level = asked.pop() if len(asked) == 1 else None
    if level is None:
        return common_target_loss(trajectories)
    for t in trajectories:
        if t.rows[0]["target_val_loss"] <= level:
            raise UserError(
                f"{t.label} starts at or below the target loss {level:g}: it has nothing to learn there; ask for a lower one."
            )
    return float(level)


def slice_points(trajectories: Sequence[Trajectory], axis: Axis, level: float) -> list[SlicePoint]:
    """The points by method, seed and place on the axis; none where no coefficient reached the target loss.

    Raises:
        UserError: no run reached it.
    """
    groups: dict[tuple[str, int, float], list[Trajectory]] = {}
    for t in trajectories:
        groups.setdefault((describe(t.record["config"], with_strength=False), t.seed, _place(t, axis)), []).append(t)
    found = []
    for (label, seed, x), group in groups.items():
        reached = [t for t in group if t.best["target_val_loss"] <= level]
        if reached:
            best = min(reached, key=lambda t: reading_at(t, level)[1])
            found.append(
                SlicePoint(
                    label=label,
                    seed=seed,
                    x=x,
                    before=best.rows[0]["pretrain_val_loss"],
                    learnt=best.rows[0]["target_val_loss"] - level,
                    forgetting=reading_at(best, level)[1],
                    coefficient=best.record["config"].get("coefficient"),
                    num_reached=len(reached),
                    num_runs=len(group),
                )
            )
    if not found:
        raise UserError(f"No run reached the target loss {level:g}: train longer, or ask for a higher one.")
    order = {label: number for number, label in enumerate(dict.fromkeys(label for label, _, _ in groups))}
    return sorted(found, key=lambda point: (order[point.label], point.seed, point.x))


def _place(trajectory: Trajectory, axis: Axis) -> float:
    record = trajectory.record
    if axis == "model-size":
        return float(record["num_params"])
    base = from_layers(TrainConfig, record["config"]).base_config()
    if base.tokens_per_param is not None:
        return base.tokens_per_param
    # Rows of the run itself are as long as its base's.
    served = sum(source["tokens_seen"] for source in record["data"].values() if source["role"] != "replay")
    row_length = base.max_seq_length or served / (record["num_steps"] * record["config"]["batch_size"])
    return base.iters * base.batch_size * row_length / float(record["num_params"])


def slice_lines(found: Sequence[SlicePoint], axis: Axis, level: float) -> list[str]:
    """The points as aligned text."""
    width = max(len(point.label) for point in found)
    lines = [
        f"{'method':<{width}}  {'seed':>4}  {AXES[axis]:>32}  {'loss before':>11}  {'learnt':>6}  {'forgetting (nats)':>17}  "
        f"{'per nat learnt':>14}  {'coefficient':>11}  reached"
    ]
    for p in found:
        coefficient = "" if p.coefficient is None else f"{p.coefficient:g}"
        rate = f"{p.forgetting / p.learnt:+.3f}" if p.learnt > 0 else ""
        place = f"{p.x:,.0f}" if axis == "model-size" else f"{p.x:.4g}"
        lines.append(
            f"{p.label:<{width}}  {p.seed:>4}  {place:>32}  {p.before:>11.4f}  {p.learnt:>6.3f}  {p.forgetting:>+17.4f}  "
            f"{rate:>14}  {coefficient:>11}  {p.num_reached} of {p.num_runs}"
        )
    return [
        *lines,
        f"Read where the target validation loss first reaches {level:.4f}, with the coefficient that has forgotten least there; "
        "learnt: what the target loss fell by to that.",
    ]


def slices_as_json(found: Sequence[SlicePoint], axis: Axis, level: float) -> dict[str, Any]:
    """The points as plain values."""
    return {"axis": axis, "target_val_loss": level, "rows": [asdict(point) for point in found]}
