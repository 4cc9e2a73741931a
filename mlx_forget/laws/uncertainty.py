"""Intervals that hold what they promise: bootstraps over independent runs, profiles, and their small-sample
corrections.

A resample is a row of weights over one shared design. All resamples first move along the tangent of the law
at the fit, which costs matrix products only, and finish on the law itself.

Which interval is the default (measured coverage: `tests/laws/coverage.py`):
- rows independent and fewer than 40: profile-F, since a case bootstrap of 12 rows is far too wide and a
  residual one too narrow;
- 20 clusters or more, or 40 independent rows or more: percentile bootstrap over clusters, stretched about the
  fit by sqrt(G / (G - 1)) t / z, because a resample of G clusters varies less than G new clusters would;
- fewer than 20 clusters: t with G - 1 degrees of freedom on the bootstrap's spread, and a warning.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.stats import f as fisher
from scipy.stats import norm
from scipy.stats import t as student

from mlx_forget.errors import UserError
from mlx_forget.laws.clusters import AUTO, Clusters, cluster_rows
from mlx_forget.laws.fit import Fit, predict_at
from mlx_forget.laws.forms import Array
from mlx_forget.laws.objective import LawProblem, TangentProblem
from mlx_forget.laws.solver import CONVERGED, Solution, minimise
from mlx_forget.laws.starts import projected_starts

METHODS = ("auto", "cluster", "profile", "residual", "bayesian")
PROFILE_BELOW = 40
# Of the objective: a resample is a draw, and its fifth digit is noise already.
REFIT_TOLERANCE = 1e-9
FEW_CLUSTERS = 20
# Where resamples are small, one start per resample misses a better optimum in up to 0.7% of them: measured at
# 28 to 35 rows.
EXTRA_STARTS_BELOW = 60


@dataclass(frozen=True)
class BootstrapOptions:
    """The one source of the bootstrap's defaults.

    Args:
        num_resamples: resamples; 0 leaves them out.
        method: one of METHODS.
        cluster: which rows are one observation: "auto" or one of `clusters.LEVELS`.
        level: coverage promised by the intervals.
        seed: of the resampling.
    """

    num_resamples: int = 1000
    method: str = "auto"
    cluster: str = AUTO
    level: float = 0.95
    seed: int = 0


DEFAULTS = BootstrapOptions()


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
class Draws:
    """Refits of resampled data.

    Args:
        fit: the fit they belong to.
        u: float64[R, K], free coordinates.
        converged: bool[R].
        weights: float64[R, n], weights of the rows; None for a residual bootstrap.
        method: "cluster", "bayesian" or "residual".
        num_clusters: independent observations that were drawn from.
    """

    fit: Fit
    u: Array
    converged: npt.NDArray[np.bool_]
    weights: Array | None
    method: str
    num_clusters: int

    @property
    def share_converged(self) -> float:
        return float(np.mean(self.converged))

    @cached_property
    def out_of_bag_mre(self) -> float:
        """The bootstrapped mean relative error: of each resample's fit over the rows it did not see; NaN
        without weights.
        """
        if self.weights is None or self.method == "bayesian":
            return float("nan")
        loss = self.fit.table.columns["loss"]
        group = self.fit.group
        predicted = self.fit.model.predict(self.u, self.fit.table.columns, group)
        unseen = (self.weights == 0) & np.isfinite(predicted)
        error = np.where(unseen, np.abs(predicted - loss) / loss, 0.0)
        counts = unseen.sum(axis=1)
        return float(np.mean(error.sum(axis=1)[counts > 0] / counts[counts > 0])) if (counts > 0).any() else float("nan")


def cluster_weights(clusters: Clusters, count: int, *, seed: int, bayesian: bool = False) -> Array:
    """Weights float64[count, n]: how often each row's cluster was drawn, or its exponential weight (Bayesian bootstrap)."""
    generator = np.random.default_rng(seed)
    num = clusters.num
    if bayesian:
        drawn = generator.dirichlet(np.ones(num), size=count) * num
    else:
        drawn = generator.multinomial(num, np.full(num, 1.0 / num), size=count).astype(np.float64)
    return np.asarray(drawn[:, clusters.index])


def law_problem(fit: Fit, response: Array, weights: Array) -> LawProblem:
    """The batch of refits of a fit's law to other responses [1 or R, n] or weights [R, n]."""
    columns = fit.table.columns
    return LawProblem(
        fit.model,
        fit.objective,
        fit.law.features(columns, fit.model.references),
        response,
        weights,
        group=fit.group,
    )


def refit(fit: Fit, response: Array, weights: Array, *, extra_starts: bool = False) -> Solution:
    """Refit a law to R weightings or responses, from the fit's own optimum.

    Args:
        fit: the fit to start from.
        response: transformed losses, float64[1 or R, n].
        weights: float64[R, n].
        extra_starts: also try the best start of each resample, and keep the better end.
    """
    problem = law_problem(fit, response, weights)
    count, k = len(weights), fit.model.num_free
    own = fit.objective.transform(fit.table.columns["loss"])[None]
    predicted = own - fit.residual
    tangent = TangentProblem(fit.objective, response - predicted, fit.jacobian.T.copy(), weights)
    model = fit.model
    # The law's bounds, seen from the fit: a tangent step must not leave them either.
    step = minimise(
        tangent,
        np.zeros((count, k)),
        low=model.low - fit.u,
        high=model.high - fit.u,
        damping=0.1,
        tolerance=1e-6,
        max_steps=60,
    )
    start = fit.u + np.where(np.isfinite(step.u), np.clip(step.u, -2.0, 2.0), 0.0)
    ends = minimise(problem, start, low=model.low, high=model.high, damping=1e-3, tolerance=REFIT_TOLERANCE)
    left = np.flatnonzero((ends.status != CONVERGED) | ~np.isfinite(ends.value))
    if len(left):
        again = minimise(
            _part(problem, left),
            np.tile(fit.u, (len(left), 1)),
            low=model.low,
            high=model.high,
            max_steps=300,
        )
        ends = _better(ends, again, left)
    if extra_starts and model.is_plain and len(response) == 1:
        features = fit.law.features(fit.table.columns, model.references)
        starts = projected_starts(fit.law, features, fit.table.columns["loss"], weights, count=1)[:, 0]
        again = minimise(problem, starts, low=model.low, high=model.high)
        ends = _better(ends, again, np.arange(count))
    return ends


def _part(problem: LawProblem, rows: npt.NDArray[np.int64]) -> LawProblem:
    return replace(
        problem,
        weights=problem.weights[rows],
        response=problem.response if len(problem.response) == 1 else problem.response[rows],
    )


def _better(ends: Solution, again: Solution, rows: npt.NDArray[np.int64]) -> Solution:
    """`ends` with the rows that `again` ended lower on, or ended at all."""
    old = ends.take(rows)
    better = (again.value < old.value) | (
        (again.status == CONVERGED) & (old.status != CONVERGED) & (again.value <= old.value * (1 + 1e-9))
    )
    u, value, status = ends.u.copy(), ends.value.copy(), ends.status.copy()
    decrement, steps = ends.decrement.copy(), ends.steps.copy()
    chosen = rows[better]
    u[chosen], value[chosen], status[chosen] = again.u[better], again.value[better], again.status[better]
    decrement[chosen] = again.decrement[better]
    steps[rows] += again.steps
    return Solution(u, value, status, decrement, steps)


def bootstrap(
    fit: Fit,
    *,
    num_resamples: int = DEFAULTS.num_resamples,
    method: str = "cluster",
    clusters: Clusters | None = None,
    seed: int = DEFAULTS.seed,
) -> Draws:
    """Refit to resampled data.

    Args:
        fit: the fit.
        num_resamples: how many.
        method: "cluster" draws independent observations with replacement, "bayesian" gives them exponential weights, "residual"
            keeps the design and draws inflated residuals.
        clusters: the independent observations; None finds them.
        seed: of the resampling.
    """
    clusters = cluster_rows(fit.table, fit.law, group=fit.group) if clusters is None else clusters
    if method not in ("cluster", "bayesian", "residual"):
        raise UserError(f"Unknown bootstrap {method!r}: it is 'cluster', 'bayesian' or 'residual'.")
    own = fit.objective.transform(fit.table.columns["loss"])[None]
    extra = fit.num_rows < EXTRA_STARTS_BELOW
    if method == "residual":
        generator = np.random.default_rng(seed)
        free = max(fit.num_rows - fit.model.num_free, 1)
        drawn = generator.choice(fit.residual, size=(num_resamples, fit.num_rows)) * np.sqrt(fit.num_rows / free)
        ends = refit(fit, own - fit.residual + drawn, np.ones((num_resamples, fit.num_rows)))
        return Draws(fit, ends.u, ends.status == CONVERGED, None, method, clusters.num)
    weights = cluster_weights(clusters, num_resamples, seed=seed, bayesian=method == "bayesian")
    ends = refit(fit, own, weights, extra_starts=extra)
    return Draws(fit, ends.u, ends.status == CONVERGED, weights, method, clusters.num)


Quantity = Callable[[Array], Array]


def stretch(num_clusters: int, level: float) -> float:
    """By how much percentile intervals are widened about the fit: sqrt(G / (G - 1)) t / z with G - 1 degrees
    of freedom.

    Measured over 500 simulations of 20 and 25 runs with 6 checkpoints each: unwidened intervals cover 93 to
        96%, widened by sqrt(G / (G - k)) they cover up to 99%, by this 95 to 98%.
    """
    degrees = max(num_clusters - 1, 1)
    upper = 0.5 + level / 2
    return float(np.sqrt(num_clusters / degrees) * student.ppf(upper, degrees) / norm.ppf(upper))


def draws_interval(draws: Draws, quantity: Quantity, *, level: float = DEFAULTS.level) -> tuple[Array, Array]:
    """Ends of the intervals of quantities from draws.

    Args:
        draws: refits.
        quantity: from free coordinates [R, K] to values [R, m], on a scale where they are about normal.
        level: coverage.

    Returns:
        (low[m], high[m]).
    """
    fit = draws.fit
    centre = quantity(fit.u[None])[0]
    values = quantity(draws.u[draws.converged])
    num = draws.num_clusters
    if num < FEW_CLUSTERS and draws.method != "residual":
        spread = np.std(values, axis=0, ddof=1) * np.sqrt(num / max(num - 1, 1))
        half = student.ppf(0.5 + level / 2, max(num - 1, 1)) * spread
        return centre - half, centre + half
    ends = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    factor = stretch(num, level)
    return centre + factor * np.minimum(ends[0] - centre, 0.0), centre + factor * np.maximum(ends[1] - centre, 0.0)


# ------------------------------------------------------------------------------------------------ profiles


def critical_fall(fit: Fit, level: float) -> float:
    """How far the objective may rise along a profile: half the noise ratio times the F quantile with 1 and
    n - k degrees.
    """
    degrees = max(fit.num_rows - fit.model.num_free, 1)
    return float(0.5 * fit.noise.ratio * fisher.ppf(level, 1, degrees))


@dataclass(frozen=True)
class Profile:
    """A profile of the objective.

    Args:
        points: float64[m], the held values.
        rise: float64[m], objective above its minimum, in units of the critical rise (1 is the end of the
            interval).
        low, high: where the rise crosses 1; infinite where it never does within the bounds.
    """

    points: Array
    rise: Array
    low: float
    high: float


def profile_coordinates(
    fit: Fit, *, level: float = DEFAULTS.level, coordinates: tuple[str, ...] | None = None
) -> dict[str, Profile]:
    """Profile-F intervals of free coordinates: the values from which no other parameter can win the objective
    back.

    All coordinates, sides and points are one batch; the ends are found by inverse interpolation of the root
    of the rise, which is about straight, and one refinement.
    """
    names = fit.model.coordinates if coordinates is None else coordinates
    indices = [fit.model.coordinates.index(name) for name in names]
    variance = np.diag(np.linalg.pinv(np.atleast_2d(fit.jacobian.T @ fit.jacobian), hermitian=True)) * fit.noise.estimator**2
    width = np.sqrt(np.where(np.isfinite(variance) & (variance > 0), variance, 1.0))
    critical = critical_fall(fit, level)
    offsets = np.array([0.25, 0.6, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 20.0, 50.0])

    def evaluate(requests: list[tuple[int, Array]]) -> list[Array]:
        return _profile_values(fit, requests)

    requests = []
    for j in indices:
        for side in (-1.0, 1.0):
            requests.append((j, np.clip(fit.u[j] + side * width[j] * offsets, fit.model.low[j], fit.model.high[j])))
    values = evaluate(requests)
    ends, refine = [], []
    for (j, points), value in zip(requests, values, strict=True):
        rise = np.maximum(value - fit.value, 0.0) / critical
        end, window = _crossing(float(fit.u[j]), points, rise)
        ends.append(end)
        refine.append((j, np.array([end]) if np.isfinite(end) else points[:1], window))
    second = evaluate([(j, points) for j, points, _ in refine])
    for i, ((_, points, window), value) in enumerate(zip(refine, second, strict=True)):
        if np.isfinite(ends[i]):
            over = float(np.maximum(value[0] - fit.value, 0.0) / critical)
            ends[i] = _refined(float(points[0]), over, window)
    made = {}
    for i, j in enumerate(indices):
        below, above = requests[2 * i][1], requests[2 * i + 1][1]
        points = np.concatenate([below[::-1], [fit.u[j]], above])
        rises = np.concatenate([values[2 * i][::-1] - fit.value, [0.0], values[2 * i + 1] - fit.value]) / critical
        made[names[i]] = Profile(points, np.maximum(rises, 0.0), ends[2 * i], ends[2 * i + 1])
    return made


def _crossing(centre: float, points: Array, rise: Array) -> tuple[float, tuple[float, float, float, float]]:
    """Where sqrt(rise) crosses 1 going outwards, and the bracket (inner point, inner root, outer point,
    outer root).
    """
    roots = np.sqrt(rise)
    above = np.flatnonzero(roots >= 1.0)
    if not len(above):
        return (float("-inf") if points[-1] < centre else float("inf")), (0.0, 0.0, 0.0, 0.0)
    i = int(above[0])
    inner, inner_root = (centre, 0.0) if i == 0 else (float(points[i - 1]), float(roots[i - 1]))
    outer, outer_root = float(points[i]), float(roots[i])
    share = (1.0 - inner_root) / max(outer_root - inner_root, 1e-300)
    return inner + share * (outer - inner), (inner, inner_root, outer, outer_root)


def _refined(point: float, rise: float, window: tuple[float, float, float, float]) -> float:
    inner, inner_root, outer, outer_root = window
    root = float(np.sqrt(rise))
    if root >= 1.0:
        outer, outer_root = point, root
    else:
        inner, inner_root = point, root
    share = (1.0 - inner_root) / max(outer_root - inner_root, 1e-300)
    return inner + min(max(share, 0.0), 1.0) * (outer - inner)


def _profile_values(fit: Fit, requests: list[tuple[int, Array]]) -> list[Array]:
    """The minimum of the objective with coordinate j held at each point, for every request (j, points[m])."""
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
        tolerance=1e-8,
    )
    # A start from the fit itself, where following the ridge led nowhere.
    plain = np.concatenate([_held_at(fit.u, j, points) for j, points in requests])
    lost = np.flatnonzero(~np.isfinite(ends.value) | (ends.status != CONVERGED))
    value = ends.value.copy()
    if len(lost):
        again = minimise(
            _part(problem, lost),
            plain[lost],
            low=low,
            high=high,
            held=np.concatenate(held)[lost],
            max_steps=150,
            tolerance=1e-8,
        )
        value[lost] = np.fmin(value[lost], again.value)
    return np.split(value, np.cumsum(sizes)[:-1])


def _held_at(u: Array, j: int, points: Array) -> Array:
    made = np.tile(u, (len(points), 1))
    made[:, j] = points
    return made


def profile_prediction(
    fit: Fit, columns: Mapping[str, npt.ArrayLike], *, level: float = DEFAULTS.level, group: str | None = None
) -> list[Interval]:
    """Profile-F intervals of predictions at points of natural columns [m].

    One extra row at that point pulls the prediction away. Wherever the pulled fit comes to rest, it has the
    lowest objective of all fits with that prediction, so it lies on the profile, and no law needs to be
    solved for its prediction.
    """
    length = max(np.size(np.asarray(columns[name])) for name in fit.law.columns)
    at = {name: np.broadcast_to(np.asarray(columns[name], float), (length,)) for name in fit.law.columns}
    return [_profile_point(fit, {name: float(values[i]) for name, values in at.items()}, level, group) for i in range(length)]


def _profile_point(fit: Fit, point: Mapping[str, float], level: float, group: str | None) -> Interval:
    centre = float(predict_at(fit, fit.u[None], point, group=group)[0, 0])
    transformed = float(fit.objective.transform(np.array([centre]))[0])
    which = None if fit.group is None else np.array([fit.model.groups.index(str(group))])
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
    groups = None if fit.group is None or which is None else np.append(fit.group, which)
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
    for side in (slice(0, len(one_side)), slice(len(one_side), None)):
        order = np.argsort(np.abs(reached[side]))
        found.append(_crossing(0.0, reached[side][order], rises[side][order])[0])
    low, high = (None if not np.isfinite(end) else float(fit.objective.invert(np.array([transformed + end]))[0]) for end in found)
    return Interval(centre, low, high)


# ------------------------------------------------------------------------------------------------ what the
# user reads


@dataclass(frozen=True)
class Uncertainty:
    """Intervals of a fit.

    Args:
        fit: the fit.
        clusters: its independent observations.
        method: "cluster bootstrap", "t on the cluster bootstrap", "profile-F", "residual bootstrap" or
            "Bayesian bootstrap".
        level: coverage promised.
        params: intervals of natural parameters, named like `Fit.params`.
        draws: the refits; None where there are none.
        profiles: profiles of the free coordinates, where they gave the intervals.
        warnings: sentences to print.
    """

    fit: Fit
    clusters: Clusters
    method: str
    level: float
    params: Mapping[str, Interval]
    draws: Draws | None
    profiles: Mapping[str, Profile]
    warnings: tuple[str, ...]


def assess(fit: Fit, options: BootstrapOptions = DEFAULTS) -> Uncertainty:
    """The intervals of a fit's parameters, by the default method for its number of independent runs or by the
    one asked for.

    Raises:
        UserError: unknown method.
    """
    if options.method not in METHODS:
        raise UserError(f"Unknown interval method {options.method!r}: it is one of {', '.join(METHODS)}.")
    clusters = cluster_rows(fit.table, fit.law, group=fit.group, level=options.cluster)
    num, clustered = clusters.num, clusters.is_clustered
    method = options.method
    if method == "auto":
        method = "profile" if not clustered and num < PROFILE_BELOW else "cluster"
    warnings = [clusters.caution] if clusters.caution else []
    if num < FEW_CLUSTERS and (clustered or method == "cluster"):
        warnings.append(
            f"only {clusters.describe()}: intervals use t with {max(num - 1, 1)} degrees of freedom and may still be too narrow; "
            f"{FEW_CLUSTERS} or more make them dependable"
        )
    draws = None
    if options.num_resamples and num > 1:
        kind = {"profile": "residual", "cluster": "cluster"}.get(method, method)
        if method == "profile" and clustered:
            kind = "cluster"
        draws = bootstrap(fit, num_resamples=options.num_resamples, method=kind, clusters=clusters, seed=options.seed)
        if draws.share_converged < 0.995:
            warnings.append(
                f"{100 * (1 - draws.share_converged):.1f}% of the resamples did not converge: the law "
                "is barely identified on these data"
            )
    profiles: dict[str, Profile] = {}
    exact = fit.num_rows <= fit.model.num_free or fit.value <= 1e-20 * fit.num_rows
    if fit.num_rows <= fit.model.num_free:
        ends = dict.fromkeys(fit.model.coordinates, (-np.inf, np.inf))
        name_of_method = "none (as many parameters as rows)"
        draws = None
    elif method == "profile" and not exact:
        profiles = profile_coordinates(fit, level=options.level)
        ends = {name: (made.low, made.high) for name, made in profiles.items()}
        name_of_method = "profile-F"
    elif draws is not None:
        low, high = draws_interval(draws, lambda u: u, level=options.level)
        ends = {name: (float(a), float(b)) for name, a, b in zip(fit.model.coordinates, low, high, strict=True)}
        few = num < FEW_CLUSTERS and draws.method != "residual"
        name_of_method = {
            "cluster": "cluster bootstrap",
            "bayesian": "Bayesian bootstrap",
            "residual": "residual bootstrap",
        }[draws.method]
        name_of_method = f"t on the {name_of_method}" if few else name_of_method
    else:
        half = student.ppf(0.5 + options.level / 2, max(num - fit.model.num_free, 1)) * np.sqrt(
            np.maximum(np.diag(fit.covariance), 0.0)
        )
        ends = {name: (float(v - h), float(v + h)) for name, v, h in zip(fit.model.coordinates, fit.u, half, strict=True)}
        name_of_method = "curvature"
    return Uncertainty(
        fit,
        clusters,
        name_of_method,
        options.level,
        _natural_intervals(fit, ends, draws, options.level),
        draws,
        profiles,
        tuple(warnings),
    )


def _natural_intervals(fit: Fit, ends: Mapping[str, tuple[float, float]], draws: Draws | None, level: float) -> dict[str, Interval]:
    """Intervals of natural parameters: a coordinate's own ends where it is one, the draws' where it mixes
    several.
    """
    unidentified = {name: flag.words for flag in fit.flags if flag.kind == "unidentified" for name in flag.parameters}
    on_bound = {name: flag.words for flag in fit.flags if flag.kind == "bound" for name in flag.parameters}
    made: dict[str, Interval] = {}
    mixed: list[str] = []
    names = {rule.amplitude for rule in fit.law.rescales if fit.model.references[rule.column] != 1.0}
    # A natural amplitude is the coordinate times reference^exponent: it is no better known than its exponent.
    follows: dict[str, set[str]] = {name: set(unidentified) for name in fit.law.mixed}
    for rule in fit.law.rescales:
        if rule.amplitude in names and rule.power is not None:
            follows.setdefault(rule.amplitude, set()).add(rule.power)
    for display, value in fit.params.items():
        bare = display.split("[")[0]
        suffix = display[len(bare) :]
        if bare in fit.constraints.fixed:
            made[display] = Interval(value, value, value, "fixed by the user, not estimated")
            continue
        leader = fit.constraints.tied.get(bare, bare)
        coordinate = leader if leader in fit.model.coordinates else leader + suffix
        if coordinate in unidentified:
            made[display] = Interval(value, None, None, unidentified[coordinate])
            continue
        lost = [name for name in unidentified if name.split("[")[0] in follows.get(bare, ())]
        if lost:
            made[display] = Interval(value, None, None, unidentified[lost[0]])
            continue
        if bare in names or fit.law.to_natural is not None:
            mixed.append(display)
            made[display] = Interval(value, None, None)
            continue
        low, high = ends[coordinate]
        m = fit.model.coordinates.index(coordinate)
        parameter = fit.law.parameters[fit.law.index(bare)]
        open_low, open_high = (
            not np.isfinite(low) or low <= fit.model.low[m],
            not np.isfinite(high) or high >= fit.model.high[m],
        )
        decode = np.exp if parameter.log else (lambda x: x)
        at_floor = parameter.low if np.isfinite(parameter.low) and not parameter.log and np.isfinite(low) else None
        made[display] = Interval(
            value,
            at_floor if open_low else float(decode(low)),
            None if open_high else float(decode(high)),
            on_bound.get(coordinate, "the interval reaches a bound: it is one-sided" if open_low or open_high else ""),
        )
    if mixed:
        ends_of_mixed = _mixed_ends(fit, ends, draws, mixed, level)
        for display, (low_end, high_end) in ends_of_mixed.items():
            made[display] = replace(made[display], low=low_end, high=high_end)
    return {name: made[name] for name in fit.params}


def _mixed_ends(
    fit: Fit, ends: Mapping[str, tuple[float, float]], draws: Draws | None, names: list[str], level: float
) -> dict[str, tuple[float | None, float | None]]:
    """Ends of natural amplitudes, which mix a coordinate with exponents: from the draws, on the logarithm
    where positive.
    """
    if draws is None or not draws.converged.any():
        return dict.fromkeys(names, (None, None))
    made: dict[str, tuple[float | None, float | None]] = {}
    for name in names:
        bare, _, rest = name.partition("[")
        g = fit.model.groups.index(rest[:-1]) if rest else 0
        j = fit.law.index(bare)
        is_log = fit.law.parameters[j].log

        def quantity(u: Array, g: int = g, j: int = j, is_log: bool = is_log) -> Array:
            natural = fit.model.natural(u)[:, g, j : j + 1]
            return np.log(np.maximum(natural, 1e-300)) if is_log else natural

        low, high = draws_interval(draws, quantity, level=level)
        pair = (float(np.exp(low[0])), float(np.exp(high[0]))) if is_log else (float(low[0]), float(high[0]))
        made[name] = pair if np.isfinite(pair).all() else (None, None)
    return made


def predict_intervals(
    uncertainty: Uncertainty,
    columns: Mapping[str, npt.ArrayLike],
    *,
    group: str | None = None,
    forgetting: bool = False,
) -> list[Interval]:
    """Intervals of the law's mean at natural columns [m], by the method of the fit's own intervals.

    Args:
        uncertainty: from `assess`.
        columns: natural columns, [m] or scalars.
        group: for joint fits.
        forgetting: give loss - L0 instead of the loss (L0 as given, exactly known).
    """
    fit = uncertainty.fit
    shift = np.asarray(columns["L0"], float) if forgetting and "L0" in columns else np.array(0.0)
    length = max(np.size(np.asarray(columns[name])) for name in fit.law.columns)
    shifts = np.broadcast_to(shift, (length,))
    if uncertainty.method == "profile-F":
        made = profile_prediction(fit, columns, level=uncertainty.level, group=group)
    elif uncertainty.draws is None or uncertainty.method.startswith("none"):
        made = [Interval(float(v), None, None) for v in fit.predict(columns, group=group)]
    else:

        def quantity(u: Array) -> Array:
            return fit.objective.transform(np.maximum(predict_at(fit, u, columns, group=group), 1e-300))

        low, high = (fit.objective.invert(ends) for ends in draws_interval(uncertainty.draws, quantity, level=uncertainty.level))
        values = fit.predict(columns, group=group)
        made = [Interval(float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]
    reason = "; ".join(flag.words for flag in fit.flags if flag.kind == "unidentified")
    return [
        Interval(i.value - s, None if i.low is None else i.low - s, None if i.high is None else i.high - s, reason)
        for i, s in zip(made, shifts.tolist(), strict=True)
    ]
