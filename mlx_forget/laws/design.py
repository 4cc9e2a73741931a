"""Which runs to do next: those that shrink the interval of a stated prediction most per FLOP, and the probe
of one model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.laws.forms import Array
from mlx_forget.laws.identify import ASSUMED_NOISE, limits
from mlx_forget.laws.model import bind, reference_points
from mlx_forget.laws.predictor import Predictor

MAX_SWAPS = 40


@dataclass(frozen=True)
class Plan:
    """Runs to do next, in the order to do them.

    Args:
        runs: law columns of each run.
        width: standard deviation of the prediction's logarithm before any of them and after each,
            float64[len(runs) + 1].
        flops: cost of each run by 6 N D (1, where N is unknown).
    """

    runs: tuple[dict[str, float], ...]
    width: Array
    flops: Array


def sensitivity(predictor: Predictor, columns: Mapping[str, npt.ArrayLike], references: Mapping[str, float]) -> Array:
    """Derivatives [n, k] of the log prediction with respect to the centred internal coordinates, at the
    fitted parameters.
    """
    law = predictor.law
    arrays = {name: np.atleast_1d(np.asarray(columns[name], float)) for name in law.columns}
    theta = law.internal(np.array([[predictor.params[name] for name in law.names]]), references)
    with np.errstate(all="ignore"):
        value, partials = law.evaluate(law.features(arrays, references), [theta[:, j, None] for j in range(theta.shape[1])])
    length = max(len(values) for values in arrays.values())
    stacked = np.stack([np.broadcast_to(partial, (1, length))[0] for partial in partials], axis=1)
    return np.asarray(stacked / np.broadcast_to(value, (1, length))[0][:, None])


def run_flops(columns: Mapping[str, npt.ArrayLike]) -> Array:
    """6 N D per pass, with the injected tokens; ones where N is unknown."""
    tokens = np.atleast_1d(np.asarray(columns.get("D", 1.0), float))
    share = np.asarray(columns.get("p", 0.0), float)
    return np.atleast_1d(6.0 * np.asarray(columns.get("N", 1.0), float) * tokens / (1.0 - np.minimum(share, 0.999)))


def next_runs(
    predictor: Predictor,
    question: Mapping[str, float],
    candidates: Mapping[str, npt.ArrayLike],
    *,
    count: int,
    per_flop: bool = True,
    noise: float = ASSUMED_NOISE,
    use_data: bool = True,
) -> Plan:
    """Choose runs greedily, then swap while a swap helps.

    Args:
        predictor: the law as it is known so far; its fitted rows count as done where it has them.
        question: the law columns of the prediction to sharpen.
        candidates: columns [m] of the runs to choose from.
        count: how many to choose.
        per_flop: rank by the fall of the log variance per FLOP, rather than per run.
        noise: standard deviation of a log loss from run to run.
        use_data: count the fitted rows as done.

    Raises:
        UserError: more runs asked for than candidates given.
    """
    law = predictor.law
    arrays = {name: np.atleast_1d(np.asarray(candidates[name], float)) for name in law.columns}
    num = max(len(values) for values in arrays.values())
    arrays = {name: np.array(np.broadcast_to(values, (num,))) for name, values in arrays.items()}
    if not 1 <= count <= num:
        raise UserError(f"Asked for {count} of {num} candidate runs: ask for 1 to {num}.")
    has_data = use_data and bool(predictor.columns)
    base = {name: np.asarray(predictor.columns[name], float) for name in law.columns} if has_data else arrays
    references = reference_points(law, base)
    rows = np.nan_to_num(sensitivity(predictor, arrays, references)) / noise
    goal = sensitivity(predictor, {name: question[name] for name in law.columns}, references)[0]
    # What is known before any run: parameters somewhere within their useful range.
    information = np.diag(1.0 / limits(bind(law, base), np.ones(1)) ** 2)
    if has_data:
        done = sensitivity(predictor, base, references) / noise
        information = information + done.T @ done
    price = run_flops(arrays) if per_flop and "N" in law.columns else np.ones(num)
    picked: list[int] = []
    inverse = np.linalg.inv(information)
    widths = [float(np.sqrt(goal @ inverse @ goal))]
    free = np.ones(num, dtype=bool)
    for _ in range(count):
        projected = rows @ inverse
        fall = (projected @ goal) ** 2 / (1.0 + np.einsum("ij,ij->i", projected, rows))
        gain = -np.log1p(-np.minimum(fall / (goal @ inverse @ goal), 1 - 1e-12)) / price
        best = int(np.argmax(np.where(free, gain, -np.inf)))
        picked.append(best)
        free[best] = False
        inverse = inverse - np.outer(projected[best], projected[best]) / (1.0 + projected[best] @ rows[best])
        widths.append(float(np.sqrt(goal @ inverse @ goal)))
    if not per_flop:
        picked = _swap(information, rows, goal, picked)
        widths = [widths[0]]
        growing = information.copy()
        for index in picked:
            growing = growing + np.outer(rows[index], rows[index])
            widths.append(float(np.sqrt(goal @ np.linalg.solve(growing, goal))))
    runs = tuple({name: float(arrays[name][i]) for name in law.columns} for i in picked)
    return Plan(runs, np.array(widths), run_flops(arrays)[picked] if "N" in law.columns else np.ones(count))


def _swap(information: Array, rows: Array, goal: Array, picked: list[int]) -> list[int]:
    """Replace a chosen run by another while that shrinks the variance: greedy choices regret their first
    ones.
    """
    chosen = list(picked)
    for _ in range(MAX_SWAPS):
        total = information + rows[chosen].T @ rows[chosen]
        now = float(goal @ np.linalg.solve(total, goal))
        best: tuple[float, int, int] = (now * (1 - 1e-6), -1, -1)
        for position, out in enumerate(chosen):
            inverse = np.linalg.inv(total - np.outer(rows[out], rows[out]))
            projected = rows @ inverse
            variance = goal @ inverse @ goal - (projected @ goal) ** 2 / (1.0 + np.einsum("ij,ij->i", projected, rows))
            variance[chosen] = np.inf
            index = int(np.argmin(variance))
            if variance[index] < best[0]:
                best = (float(variance[index]), position, index)
        if best[1] < 0:
            return chosen
        chosen[best[1]] = best[2]
    return chosen


def probe_runs(tokens: float, count: int) -> list[dict[str, float]]:
    """The short runs that someone with one model and no law should do, as {D, p}.

    In F = A D^beta (1 + B p)^-alpha the effects of D and p multiply, so p can be probed at a tenth of the
    tokens; two runs without replay give the slope in D. Three runs answer at their own D only; four determine
    the law exactly, without an interval; six leave two degrees of freedom for one.

    Args:
        tokens: D of the run that is planned.
        count: 3 to 6.

    Raises:
        UserError: another count, or no positive D.
    """
    if not 3 <= count <= 6:
        raise UserError(f"A probe has 3 to 6 runs, not {count}.")
    if not tokens > 0:
        raise UserError(f"A probe needs the planned D (tokens), a positive number, and it is {tokens:g}.")
    if count == 3:
        return [{"D": tokens, "p": share} for share in (0.0, 0.005, 0.05)]
    short, middle = tokens / 10, tokens / 3
    plan = [(short, 0.0), (middle, 0.0), (short, 0.005), (short, 0.05), (middle, 0.01), (short, 0.001)]
    return [{"D": d, "p": p} for d, p in plan[:count]]


def describe_plan(plan: Plan) -> Sequence[str]:
    """One line per run: its columns, its cost and the width of the prediction after it."""
    lines = []
    for run, flops, width in zip(plan.runs, plan.flops.tolist(), plan.width[1:].tolist(), strict=True):
        columns = ", ".join(f"{name}={value:.4g}" for name, value in run.items() if name != "L0")
        lines.append(f"{columns}  ({flops:.2g} FLOPs)  then within {100 * 1.96 * width:.2g}%")
    return lines
