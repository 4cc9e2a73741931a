"""A batched semismooth Newton method: every start, resample, group and profile point is one row of one batch.

The step solves (inner + damping x outer) step = -gradient. `inner` is Newton's matrix on the rows in the square part of the Huber
loss, `outer` the majoriser's: damping 1 is at least the majorise-minimise step, which always descends, and damping 0 is Newton on
the inliers, which finishes. Both matrices scale with the parameters, so the step does not care how an amplitude and its exponent
are confounded. Plain reweighting stalls here, because the usual delta of 1e-3 is far below the residuals and makes the loss nearly
absolute.

Bounds are an active set: a coordinate on its bound whose gradient pushes outwards is held, and a step that would cross a bound is
cut there and solved again for the others.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.laws.forms import Array
from mlx_forget.laws.objective import Problem

CONVERGED, STALLED, OUT_OF_STEPS = 0, 1, 2
STATUS_NAMES = ("converged", "stalled", "iteration limit")
MAX_STEP = 3.0
DIAGONAL_SHARE = 1e-5
TOLERANCE = 1e-11
# Squared residuals below this are rounding: a fit of exact data has arrived.
ROUNDING = 1e-28


@dataclass(frozen=True)
class Solution:
    """The ends of a batch.

    Args:
        u: float64[R, K], the free coordinates.
        value: float64[R], the objective.
        status: int[R], index into STATUS_NAMES.
        decrement: float64[R], what the majoriser says the objective could still fall by, relative to it.
        steps: int[R], evaluations used.
    """

    u: Array
    value: Array
    status: npt.NDArray[np.int64]
    decrement: Array
    steps: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.int64]) -> "Solution":
        return Solution(self.u[rows], self.value[rows], self.status[rows], self.decrement[rows], self.steps[rows])


def solve_small(matrices: Array, vectors: Array) -> Array:
    """x of M x = v for a batch of symmetric positive definite M [R, K, K] and v [R, K]; a zero pivot gives zero.

    Cholesky across the batch: for many small systems it beats a LAPACK call per system.
    """
    count, k = vectors.shape
    if k > 12 or count < 32:
        diagonal = np.arange(k)
        padded = matrices.copy()
        padded[:, diagonal, diagonal] *= 1 + 1e-15
        try:
            return np.asarray(np.linalg.solve(padded, vectors[:, :, None])[:, :, 0])
        except np.linalg.LinAlgError:
            padded[:, diagonal, diagonal] += 1e-12
            return np.asarray(np.linalg.solve(padded, vectors[:, :, None])[:, :, 0])
    m = np.array(matrices.transpose(1, 2, 0), order="C")
    x = np.array(vectors.T, order="C")
    inverse = np.empty((k, count))
    for j in range(k):
        if j:
            m[j:, j] -= np.einsum("icr,cr->ir", m[j:, :j], m[j, :j])
        pivot = m[j, j]
        inverse[j] = np.where(pivot > 1e-15, 1.0 / np.sqrt(np.where(pivot > 1e-15, pivot, 1.0)), 0.0)
        m[j:, j] *= inverse[j]
        x[j] *= inverse[j]
        if j + 1 < k:
            x[j + 1 :] -= m[j + 1 :, j] * x[j]
    for j in range(k - 1, -1, -1):
        x[j] *= inverse[j]
        if j:
            x[:j] -= m[j, :j] * x[j]
    return x.T


def _step(matrix: Array, gradient: Array, held: npt.NDArray[np.bool_], damping: Array) -> Array:
    """The step of (matrix) step = -gradient with held coordinates at zero, after scaling to a unit diagonal.

    Where columns are collinear, no multiple of `outer` regularises: a trace of the damping goes on the diagonal as well.
    """
    k = gradient.shape[1]
    diagonal = np.arange(k)
    size = matrix[:, diagonal, diagonal]
    scale = np.where(held | ~(size > 0), 0.0, 1.0 / np.sqrt(np.where(size > 0, size, 1.0)))
    scaled = matrix * scale[:, :, None] * scale[:, None, :]
    scaled[:, diagonal, diagonal] = 1.0 + 1e-14 + DIAGONAL_SHARE * damping[:, None] * (scale != 0)
    return -solve_small(scaled, gradient * scale) * scale


def minimise(
    problem: Problem,
    start: Array,
    *,
    low: Array,
    high: Array,
    held: npt.NDArray[np.bool_] | None = None,
    damping: float = 1.0,
    max_steps: int = 100,
    tolerance: float = TOLERANCE,
    floor: float = ROUNDING,
) -> Solution:
    """Minimise every problem of a batch from its start.

    Args:
        problem: gives value, gradient and curvature for any subset of the batch.
        start: float64[R, K].
        low, high: float64[K], bounds; infinite where there is none.
        held: bool[R, K] or [1, K], coordinates that stay at their start (profiles).
        damping: first damping; small where the start is nearly the end.
        max_steps: evaluations per row at most.
        tolerance: stop when two steps in a row can lower the objective by no more than this, relative.
        floor: stop when the objective is below this.
    """
    u = np.clip(np.array(start, dtype=np.float64), low, high)
    count, k = u.shape
    held_all = np.zeros((count, k), bool) if held is None else np.broadcast_to(held, (count, k))
    everyone = np.arange(count)
    here = problem(everyone, u)
    value, gradient, inner, outer = here.value, here.gradient, here.inner.copy(), here.outer.copy()
    lam = np.full(count, damping)
    quiet = np.zeros(count, np.int64)
    steps = np.ones(count, np.int64)
    status = np.full(count, OUT_OF_STEPS)
    decrement = np.full(count, np.inf)
    has_bounds = bool(np.isfinite(low).any() or np.isfinite(high).any())
    active = everyone
    for _ in range(max_steps):
        g, ua = gradient[active], u[active]
        hold = held_all[active]
        if has_bounds:
            hold = hold | ((ua <= low) & (g > 0)) | ((ua >= high) & (g < 0))
        matrix = inner[active] + lam[active, None, None] * outer[active]
        d = _step(matrix, g, hold, lam[active])
        d = np.where(np.isfinite(d), d, 0.0)
        np.clip(d, -MAX_STEP, MAX_STEP, out=d)
        if has_bounds:
            crossing = ((ua + d < low) | (ua + d > high)) & ~hold
            if crossing.any():
                some = np.flatnonzero(crossing.any(axis=1))
                cut = np.where(crossing[some], np.clip(ua[some] + d[some], low, high) - ua[some], 0.0)
                shifted = g[some] + np.einsum("rij,rj->ri", matrix[some], cut)
                again = _step(matrix[some], shifted, hold[some] | crossing[some], lam[active][some])
                again = np.clip(np.where(np.isfinite(again), again, 0.0), -MAX_STEP, MAX_STEP)
                d[some] = np.clip(ua[some] + again + cut, low, high) - ua[some]
        expected = -(g * d).sum(1) - 0.5 * np.einsum("ri,rij,rj->r", d, matrix, d)
        trial = np.clip(ua + d, low, high)
        there = problem(active, trial)
        steps[active] += 1
        with np.errstate(invalid="ignore"):
            fall = np.where(np.isfinite(there.value), value[active] - there.value, -np.inf)
        accepted = fall > 0
        ratio = fall / np.maximum(expected, 1e-300)
        moved = active[accepted]
        scale = np.maximum(np.minimum(value[active], np.where(accepted, there.value, np.inf)), floor)
        u[moved], gradient[moved] = trial[accepted], there.gradient[accepted]
        inner[moved], outer[moved], value[moved] = (
            there.inner[accepted],
            there.outer[accepted],
            there.value[accepted],
        )
        was = lam[active]
        lam[active] = np.clip(
            np.where(
                ~accepted,
                was * 6 + 1e-4,
                np.where(ratio > 0.7, was * 0.1, np.where(ratio < 0.25, was * 3, was)),
            ),
            1e-10,
            1e9,
        )
        decrement[active] = np.maximum(np.abs(expected), np.where(accepted, fall, 0.0)) / scale
        is_quiet = decrement[active] < tolerance
        quiet[active] = np.where(is_quiet, quiet[active] + 1, 0)
        # One quiet step is enough where it was an undamped one that kept its promise.
        arrived = (quiet[active] >= 2) | (value[active] <= floor) | (is_quiet & accepted & (was < 1e-3) & (ratio > 0.5))
        stuck = (lam[active] > 1e7) & ~arrived
        status[active[arrived]] = CONVERGED
        # No representable step descends any more: at the optimum to rounding, or at a point where the model is wrong.
        status[active[stuck]] = np.where(decrement[active[stuck]] < 1e-9, CONVERGED, STALLED)
        active = active[~(arrived | stuck)]
        if not len(active):
            break
    return Solution(u, value, status, np.where(value <= floor, 0.0, decrement), steps)
