"""Intervals that hold what they promise: which method, its small-sample correction, and what is not to be trusted.

Which interval is the default (measured coverage: `tests/laws/coverage.py`):
- rows independent and fewer than 40: profile-F, since a case bootstrap of 12 rows is far too wide and a residual one too narrow;
- 20 clusters or more, or 40 independent rows or more: percentile bootstrap over clusters, stretched about the fit by sqrt(G / (G -
  1)) t / z, because a resample of G clusters varies less than G new clusters would;
- fewer than 20 clusters: t with G - 1 degrees of freedom on the bootstrap's spread, and a warning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from mlx_forget.errors import UserError
from mlx_forget.laws.bootstrap import FEW_CLUSTERS, Draws, Quantity, bootstrap, draws_interval
from mlx_forget.laws.clusters import AUTO, Clusters, cluster_rows
from mlx_forget.laws.fitted import Fit, predict_at
from mlx_forget.laws.forms import Array
from mlx_forget.laws.profiles import Interval, Profile, profile_amplitudes, profile_coordinates, profile_prediction

METHODS = ("auto", "cluster", "profile", "residual", "bayesian")
PROFILE_BELOW = 40


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
class Uncertainty:
    """Intervals of a fit.

    Args:
        fit: the fit.
        clusters: its independent observations.
        method: "cluster bootstrap", "t on the cluster bootstrap", "profile-F", "residual bootstrap" or "Bayesian bootstrap".
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
    """The intervals of a fit's parameters, by the default method for its number of independent runs or by the one asked for.

    Raises:
        UserError: unknown method.
    """
    if options.method not in METHODS:
        raise UserError(f"Unknown interval method {options.method!r}: it is one of {', '.join(METHODS)}.")
    clusters = cluster_rows(fit.table, fit.law, group=fit.group, level=options.cluster)
    num, clustered = clusters.num, clusters.is_clustered
    degrees = max(num - fit.model.num_free, 1)
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
    amplitudes: dict[str, Profile] = {}
    exact = fit.num_rows <= fit.model.num_free or fit.value <= 1e-20 * fit.num_rows
    if fit.num_rows <= fit.model.num_free:
        ends = dict.fromkeys(fit.model.coordinates, (-np.inf, np.inf))
        name_of_method = "none (as many parameters as rows)"
        draws = None
    elif method == "profile" and not exact:
        profiles = profile_coordinates(fit, level=options.level)
        amplitudes = profile_amplitudes(fit, level=options.level)
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
        half = stdtrit(degrees, 0.5 + options.level / 2) * np.sqrt(np.maximum(np.diag(fit.covariance), 0.0))
        ends = {name: (float(v - h), float(v + h)) for name, v, h in zip(fit.model.coordinates, fit.u, half, strict=True)}
        name_of_method = "curvature"
    if clustered and name_of_method in ("profile-F", "curvature", "residual bootstrap"):
        warnings.append(
            f"{name_of_method} takes all {fit.num_rows} rows for independent, and they are {clusters.describe()}: too narrow"
        )
    return Uncertainty(
        fit,
        clusters,
        name_of_method,
        options.level,
        _natural_intervals(fit, ends, amplitudes, draws, options.level, degrees),
        draws,
        profiles,
        tuple(warnings),
    )


def _natural_intervals(
    fit: Fit,
    ends: Mapping[str, tuple[float, float]],
    amplitudes: Mapping[str, Profile],
    draws: Draws | None,
    level: float,
    degrees: int,
) -> dict[str, Interval]:
    """Intervals of natural parameters: a coordinate's own ends where it is one; where it mixes several, its profile's or the draws'."""
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
        if leader in fit.constraints.fixed:
            made[display] = Interval(value, value, value, f"tied to {leader}, which is fixed by the user")
            continue
        coordinate = leader if leader in fit.model.coordinates else leader + suffix
        if coordinate in unidentified:
            made[display] = Interval(value, None, None, unidentified[coordinate])
            continue
        lost = [name for name in unidentified if name.split("[")[0] in follows.get(bare, ())]
        if lost:
            made[display] = Interval(value, None, None, unidentified[lost[0]])
            continue
        if bare in names and coordinate in amplitudes:
            with np.errstate(over="ignore"):
                low, high = (float(np.exp(end)) for end in (amplitudes[coordinate].low, amplitudes[coordinate].high))
            is_open = low <= 0 or not np.isfinite(high)
            reason = "the interval reaches a bound: it is one-sided" if is_open else ""
            made[display] = Interval(value, low, high if np.isfinite(high) else None, on_bound.get(coordinate, reason))
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
        for display, (low_end, high_end) in _mixed_ends(fit, draws, mixed, level, degrees).items():
            made[display] = replace(made[display], low=low_end, high=high_end)
    return {name: made[name] for name in fit.params}


def _mixed_ends(
    fit: Fit, draws: Draws | None, names: list[str], level: float, degrees: int
) -> dict[str, tuple[float | None, float | None]]:
    """Ends of natural amplitudes, which mix a coordinate with exponents, on the logarithm where positive: from the draws, or from the
    curvature where there are none.
    """
    made: dict[str, tuple[float | None, float | None]] = {}
    if fit.num_rows <= fit.model.num_free:
        return dict.fromkeys(names, (None, None))
    for name in names:
        bare, _, rest = name.partition("[")
        g = fit.model.groups.index(rest[:-1]) if rest else 0
        j = fit.law.index(bare)
        is_log = fit.law.parameters[j].log

        def quantity(u: Array, g: int = g, j: int = j, is_log: bool = is_log) -> Array:
            natural = fit.model.natural(u)[:, g, j : j + 1]
            return np.log(np.maximum(natural, 1e-300)) if is_log else natural

        if draws is not None and draws.converged.any():
            low, high = (float(end[0]) for end in draws_interval(draws, quantity, level=level))
        else:
            centre = float(quantity(fit.u[None])[0, 0])
            half = float(stdtrit(degrees, 0.5 + level / 2)) * _deviation(fit, quantity)
            low, high = centre - half, centre + half
        pair = (float(np.exp(low)), float(np.exp(high))) if is_log else (low, high)
        made[name] = pair if np.isfinite(pair).all() else (None, None)
    return made


def _deviation(fit: Fit, quantity: Quantity) -> float:
    """The standard deviation of a quantity by the curvature of the objective; its gradient by central differences."""
    steps = 1e-4 * np.eye(len(fit.u))
    gradient = (quantity(fit.u + steps) - quantity(fit.u - steps))[:, 0] / 2e-4
    return float(np.sqrt(max(float(gradient @ fit.covariance @ gradient), 0.0)))


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
