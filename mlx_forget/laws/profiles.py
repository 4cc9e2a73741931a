"""Profiles: how far a parameter, or a prediction, can be pulled before no other parameter wins the objective back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import fdtri

from mlx_forget.laws.bootstrap import law_problem, part_of
from mlx_forget.laws.fitted import Fit, predict_at
from mlx_forget.laws.forms import Array
from mlx_forget.laws.objective import LawProblem
from mlx_forget.laws.solver import CONVERGED, minimise


def critical_fall(fit: Fit, level: float) -> float:
    """How far the objective may rise along a profile: half the noise ratio times the F quantile with 1 and n - k degrees."""
    degrees = max(fit.num_rows - fit.model.num_free, 1)
    return float(0.5 * fit.noise.ratio * fdtri(1, degrees, level))


# Points of a profile, in standard deviations on each side of the fit.
NEAR = np.array([0.6, 1.2, 1.8, 2.4, 3.0])
FAR = np.array([4.0, 6.0, 10.0, 20.0, 50.0])
# Of the logarithm of an amplitude.
_WIDEST = 690.0


@dataclass(frozen=True)
class Interval:
    """An interval of a number; None is an open end, for a number that the data do not bound there.

    Args:
        value: the fit's value.
        low, high: the ends.
        reason: why not to trust it, or "".
    """

    value: float
    low: float | None
    high: float | None
    reason: str = ""


@dataclass(frozen=True)
class Profile:
    """A profile of the objective.

    Args:
        points: float64[m], the held values.
        rise: float64[m], objective above its minimum, in units of the critical rise (1 is the end of the interval).
        low, high: where the rise crosses 1; infinite where it never does within the bounds.
    """

    points: Array
    rise: Array
    low: float
    high: float


def profile_coordinates(fit: Fit, *, level: float, coordinates: tuple[str, ...] | None = None) -> dict[str, Profile]:
    """Profile-F intervals of free coordinates: the values from which no other parameter can win the objective back.

    All coordinates and sides are one batch of points near the fit; sides that do not end there get a batch further out. The ends
    are found by inverse interpolation of the root of the rise, which is about straight, and one more point there.
    """
    names = fit.model.coordinates if coordinates is None else coordinates
    variance = np.diag(np.linalg.pinv(np.atleast_2d(fit.jacobian.T @ fit.jacobian), hermitian=True)) * fit.noise.estimator**2
    width = np.sqrt(np.where(np.isfinite(variance) & (variance > 0), variance, 1.0))
    critical = critical_fall(fit, level)
    sides = [(fit.model.coordinates.index(name), sign) for name in names for sign in (-1.0, 1.0)]
    # Per side: points going outwards, and the rise there in units of the critical one.
    found = {side: (np.empty(0), np.empty(0)) for side in sides}

    def add(wanted: Mapping[tuple[int, float], Array]) -> None:
        values = _profile_values(fit, [(j, points) for (j, _), points in wanted.items()], critical)
        for side, value in zip(wanted, values, strict=True):
            points = np.append(found[side][0], wanted[side])
            rises = np.append(found[side][1], np.maximum(value - fit.value, 0.0) / critical)
            order = np.argsort(np.abs(points - fit.u[side[0]]), kind="stable")
            found[side] = points[order], rises[order]

    def at(side: tuple[int, float], offsets: Array) -> Array:
        j, sign = side
        return np.asarray(np.clip(fit.u[j] + sign * width[j] * offsets, fit.model.low[j], fit.model.high[j]))

    def ends() -> dict[tuple[int, float], float]:
        return {side: _crossing(float(fit.u[side[0]]), *found[side], outwards=side[1]) for side in sides}

    add({side: at(side, NEAR) for side in sides})
    add({side: at(side, FAR) for side, end in ends().items() if not np.isfinite(end)})
    add({side: np.array([end]) for side, end in ends().items() if np.isfinite(end)})
    low_high = ends()
    made = {}
    for name, below, above in zip(names, sides[::2], sides[1::2], strict=True):
        points = np.concatenate([found[below][0][::-1], [fit.u[below[0]]], found[above][0]])
        rises = np.concatenate([found[below][1][::-1], [0.0], found[above][1]])
        made[name] = Profile(points, rises, low_high[below], low_high[above])
    return made


def profile_amplitudes(fit: Fit, *, level: float) -> dict[str, Profile]:
    """Profile-F intervals, as `profile_coordinates`, of the logarithms of natural amplitudes.

    A coordinate is an amplitude where the columns are at their geometric means; with columns that are not divided it is the natural one.
    """
    law, model = fit.law, fit.model
    names = {rule.amplitude for rule in law.rescales if law.parameters[law.index(rule.amplitude)].log}
    moved = {m for m, name in enumerate(model.coordinates) if name.split("[")[0] in names}
    if law.to_natural is not None or not moved:
        return {}
    wide = np.isin(np.arange(model.num_free), list(moved))
    low, high = np.where(wide, -_WIDEST, model.low), np.where(wide, _WIDEST, model.high)
    undivided = replace(model, references=dict.fromkeys(model.references, 1.0), low=low, high=high)
    u = undivided.free(model.natural(fit.u))
    # The change of coordinates is linear: an amplitude's logarithm moves with exponents.
    steps = model.free(undivided.natural(u + np.eye(model.num_free))) - fit.u
    there = replace(fit, model=undivided, u=u, jacobian=fit.jacobian @ steps.T)
    return profile_coordinates(there, level=level, coordinates=tuple(model.coordinates[m] for m in sorted(moved)))


def _crossing(centre: float, points: Array, rise: Array, *, outwards: float) -> float:
    """Where sqrt(rise), going outwards from 0 at the centre, crosses 1; infinite where it does not."""
    roots = np.sqrt(rise)
    above = np.flatnonzero(roots >= 1.0)
    if not len(above):
        return outwards * float("inf")
    i = int(above[0])
    inner, inner_root = (centre, 0.0) if i == 0 else (float(points[i - 1]), float(roots[i - 1]))
    share = (1.0 - inner_root) / max(float(roots[i]) - inner_root, 1e-300)
    return inner + share * (float(points[i]) - inner)


def _profile_values(fit: Fit, requests: list[tuple[int, Array]], critical: float) -> list[Array]:
    """The minimum of the objective with coordinate j held at each point, for every request (j, points[m]), to 0.1% of `critical`."""
    if not requests:
        return []
    tolerance = max(1e-8, 1e-3 * critical / max(fit.value, 1e-300))
    k = fit.model.num_free
    normal = fit.jacobian.T @ fit.jacobian
    starts, held, sizes = [], [], []
    for j, points in requests:
        others = np.arange(k) != j
        # Along a ridge the others follow: their linear response to the held coordinate.
        response = -np.linalg.pinv(normal[np.ix_(others, others)], hermitian=True) @ normal[others, j] if k > 1 else np.zeros(0)
        start = np.tile(fit.u, (len(points), 1))
        start[:, others] += np.clip((points - fit.u[j])[:, None] * response, -5.0, 5.0)
        start[:, j] = points
        starts.append(start)
        mask = np.zeros((len(points), k), dtype=bool)
        mask[:, j] = True
        held.append(mask)
        sizes.append(len(points))
    own = fit.objective.transform(fit.table.columns["loss"])[None]
    total = sum(sizes)
    problem = law_problem(fit, own, np.ones((total, fit.num_rows)))
    low, high = fit.model.low, fit.model.high
    ends = minimise(
        problem,
        np.concatenate(starts),
        low=low,
        high=high,
        held=np.concatenate(held),
        damping=0.1,
        max_steps=150,
        tolerance=tolerance,
    )
    # A start from the fit itself, where following the ridge led nowhere.
    plain = np.concatenate([_held_at(fit.u, j, points) for j, points in requests])
    lost = np.flatnonzero(~np.isfinite(ends.value) | (ends.status != CONVERGED))
    value = ends.value.copy()
    if len(lost):
        again = minimise(
            part_of(problem, lost),
            plain[lost],
            low=low,
            high=high,
            held=np.concatenate(held)[lost],
            max_steps=150,
            tolerance=tolerance,
        )
        value[lost] = np.fmin(value[lost], again.value)
    return np.split(value, np.cumsum(sizes)[:-1])


def _held_at(u: Array, j: int, points: Array) -> Array:
    made = np.tile(u, (len(points), 1))
    made[:, j] = points
    return made


def profile_prediction(fit: Fit, columns: Mapping[str, npt.ArrayLike], *, level: float, group: str | None = None) -> list[Interval]:
    """Profile-F intervals of predictions at points of natural columns [m].

    One extra row at that point pulls the prediction away. Wherever the pulled fit comes to rest, it has the lowest objective of all
    fits with that prediction, so it lies on the profile, and no law needs to be solved for its prediction.
    """
    length = max(np.size(np.asarray(columns[name])) for name in fit.law.columns)
    at = {name: np.broadcast_to(np.asarray(columns[name], float), (length,)) for name in fit.law.columns}
    return [_profile_point(fit, {name: float(values[i]) for name, values in at.items()}, level, group) for i in range(length)]


def _profile_point(fit: Fit, point: Mapping[str, float], level: float, group: str | None) -> Interval:
    centre = float(predict_at(fit, fit.u[None], point, group=group)[0, 0])
    transformed = float(fit.objective.transform(np.array([centre]))[0])
    which, groups = None, None
    if fit.group is not None:
        which = np.array([fit.model.groups.index(str(group))])
        groups = np.append(fit.group, which)
    features = fit.law.features({name: np.array([value]) for name, value in point.items()}, fit.model.references)
    value, partials = fit.model.evaluate(features, which, fit.u[None])
    gradient = np.array([float(np.broadcast_to(p, value.shape)[0, 0]) for p in partials])
    if fit.objective.link == "log":
        gradient = gradient / centre
    inverse = np.linalg.pinv(fit.jacobian.T @ fit.jacobian, hermitian=True)
    width = float(np.sqrt(max(gradient @ inverse @ gradient, 0.0))) * fit.noise.estimator
    if not width > 0:
        return Interval(centre, centre, centre)
    critical = critical_fall(fit, level)
    columns = {name: np.append(fit.table.columns[name], point[name]) for name in fit.law.columns}
    all_features = fit.law.features(columns, fit.model.references)
    direction = inverse @ gradient / max(gradient @ inverse @ gradient, 1e-300)
    # Where the ends would be for a law linear in its parameters, and the pull on the extra row there.
    reach = width * float(np.sqrt(2 * critical / fit.noise.ratio))
    pull = 2 * critical / reach
    delta = fit.objective.delta
    heavy = 20 * pull / (delta if np.isfinite(delta) else reach)
    one_side = np.array([0.4, 0.7, 0.9, 1.05, 1.2, 1.5, 2.0, 3.0, 6.0, 15.0])
    offsets = reach * np.concatenate([-one_side, one_side])
    count = len(offsets)
    own = fit.objective.transform(fit.table.columns["loss"])
    response = np.concatenate([np.tile(own, (count, 1)), transformed + offsets[:, None]], axis=1)
    weights = np.concatenate([np.ones((count, fit.num_rows)), np.full((count, 1), heavy)], axis=1)
    problem = LawProblem(fit.model, fit.objective, all_features, response, weights, group=groups)
    start = fit.u + offsets[:, None] * direction
    low_bound, high_bound = fit.model.low, fit.model.high
    ends = minimise(problem, start, low=low_bound, high=high_bound, damping=0.1, max_steps=80, tolerance=1e-7)
    with np.errstate(all="ignore"):
        residual, _ = problem.residual(np.arange(count), ends.u)
    reached = offsets - residual[:, -1]
    rises = np.maximum(fit.objective.terms(residual[:, :-1]).sum(axis=1) - fit.value, 0.0) / critical
    found = []
    for side, outwards in ((slice(0, len(one_side)), -1.0), (slice(len(one_side), None), 1.0)):
        order = np.argsort(np.abs(reached[side]))
        found.append(_crossing(0.0, reached[side][order], rises[side][order], outwards=outwards))
    low, high = (None if not np.isfinite(end) else float(fit.objective.invert(np.array([transformed + end]))[0]) for end in found)
    return Interval(centre, low, high)
