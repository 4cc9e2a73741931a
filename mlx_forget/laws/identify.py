"""What a design can and cannot tell: before a fit from the columns alone, after it from the curvature, in words.

A coordinate is *unidentified* when the data leave it free over more than a useful range: a factor of e^2 each way for an amplitude
or B, half a unit for an exponent, half the loss for an offset. Directions are named by the coordinates that move together, and the
run that would break the tie is searched among the neighbours of the runs that exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import stdtrit

from mlx_forget.laws.forms import Array, Law
from mlx_forget.laws.model import FREE, Constraints, Model, bind
from mlx_forget.laws.noise import Noise
from mlx_forget.laws.table import Table, check_columns

LOG_LIMIT = 2.0
EXPONENT_LIMIT = 0.5
OFFSET_SHARE = 0.5
# A direction this flat, relative to the steepest and after scaling, is flat to rounding.
STRUCTURAL = 1e-8
SMALLEST_NOISE = 1e-6
# Below this exponent, with a free offset, a power of (1 + B p) and its logarithm are the same curve.
LOG_LIMIT_ALPHA = 0.15
# Relative noise assumed before any fit: what seeds do to a validation loss.
ASSUMED_NOISE = 0.004
SHARE_MENUS = {
    "p": (0.0, 0.002, 0.01, 0.05, 0.25),
    "r": (0.002, 0.01, 0.05, 0.25, 0.5, 1.0),
    "R": (0.002, 0.01, 0.05, 0.25, 0.5, 1.0),
}
COUNT_MENU = {
    "N": (0.1, 0.25, 4.0, 10.0),
    "D": (0.03, 0.1, 10.0, 30.0),
    "P": (0.125, 8.0),
    "steps": (0.125, 8.0),
}


@dataclass(frozen=True)
class Flag:
    """One reason not to trust a number.

    Args:
        kind: "unidentified" (the data leave a direction free), "bound" (a parameter ended on a bound), or "data".
        parameters: the free coordinates concerned.
        words: what is wrong.
        remedy: the run that would help, or "".
    """

    kind: str
    parameters: tuple[str, ...]
    words: str
    remedy: str = ""


def limits(model: Model, loss: Array) -> Array:
    """How far each free coordinate may be uncertain and still count as known, float64[K]."""
    made = np.empty(model.num_free)
    for m in range(model.num_free):
        parameter = model.law.parameters[int(np.argmax(np.any(model.matrix[:, :, m] != 0, axis=0)))]
        if parameter.log:
            made[m] = LOG_LIMIT
        elif parameter.linear:
            made[m] = OFFSET_SHARE * float(np.median(np.abs(loss)))
        else:
            made[m] = EXPONENT_LIMIT
    return made


def ridges(jacobian: Array, limit: Array, noise: float, *, degrees: int) -> tuple[Array, Array]:
    """Half-widths of 95% intervals along the principal directions, in units of `limit`, and the directions.

    Args:
        jacobian: float64[n, K], of the prediction in the link.
        limit: float64[K].
        noise: the estimator's scale tau.
        degrees: residual degrees of freedom.

    Returns:
        (extent[K], widest first, infinite where flat to rounding; direction[K, K], rows in units of `limit`).
    """
    scaled = jacobian * limit
    norms = np.linalg.norm(scaled, axis=0)
    k = scaled.shape[1]
    if len(scaled) < k:
        scaled = np.concatenate([scaled, np.zeros((k - len(scaled), k))])
    _, sizes, directions = np.linalg.svd(scaled, full_matrices=False)
    # Flatness to rounding is judged column by column scaled, so that a large parameter does not hide a small one.
    unit = scaled / np.where(norms > 0, norms, 1.0)
    _, unit_sizes, _ = np.linalg.svd(unit, full_matrices=False)
    num_flat = int(np.sum(unit_sizes <= STRUCTURAL * max(unit_sizes[0], 1e-300)))
    quantile = float(stdtrit(max(degrees, 1), 0.975))
    with np.errstate(divide="ignore"):
        extents = quantile * max(noise, SMALLEST_NOISE) / sizes
    if num_flat:
        extents[k - num_flat :] = np.inf
    return extents[::-1], directions[::-1]


def fit_flags(model: Model, u: Array, jacobian: Array, noise: Noise, table: Table, at_bounds: tuple[str, ...]) -> tuple[Flag, ...]:
    """The flags of a fit: free directions with the run that would break the tie, bounds, and degenerate data."""
    loss = table.columns["loss"]
    limit = limits(model, loss)
    found = list(_data_flags(model, table))
    degrees = table.num_rows - model.num_free
    known = {name for flag in found for name in flag.parameters}
    extents, directions = ridges(np.where(np.isfinite(jacobian), jacobian, 0.0), limit, noise.estimator, degrees=degrees)
    for extent, direction in zip(extents, directions, strict=True):
        if not extent > 1:
            break
        names = _names(model.coordinates, direction)
        if set(names) <= known:
            continue
        remedy = _remedy(model, u, jacobian * limit, limit, table)
        found.append(Flag("unidentified", names, _words(model, u, names, direction, extent, limit), remedy))
        known |= set(names)
    for name in at_bounds:
        found.append(Flag("bound", (name,), _bound_words(model, u, name)))
    if degrees < 1:
        found.append(
            Flag(
                "data",
                (),
                f"{table.num_rows} rows for {model.num_free} free parameters: the law passes through "
                "them, and no interval is possible",
            )
        )
    return tuple(found)


def design_flags(law: Law, table: Table, *, constraints: Constraints = FREE, noise: float = ASSUMED_NOISE) -> tuple[Flag, ...]:
    """What the columns of a table, before any loss is measured, will leave undetermined.

    The law's sensitivity is taken at a spread of plausible parameters; a direction counts only where it is free at most of them.
    The table needs no `loss`.

    Raises:
        UserError: a column of the law is missing, or its values cannot be what its name says.
    """
    check_columns(table, law.columns)
    model = bind(law, table.columns, constraints=constraints)
    found = list(_data_flags(model, table))
    known = {name for flag in found for name in flag.parameters}
    features = law.features(table.columns, model.references)
    collected: list[tuple[float, Array, Array, Array]] = []
    for u in _plausible(model):
        with np.errstate(all="ignore"):
            value, partials = model.evaluate(features, None, u[None])
        shape = (1, table.num_rows)
        raw = np.stack([np.broadcast_to(partial, shape)[0] for partial in partials], axis=1)
        jacobian = raw / np.maximum(np.abs(np.broadcast_to(value, shape)[0]), 1e-3)[:, None]
        limit = limits(model, np.broadcast_to(value, shape)[0])
        extents, directions = ridges(jacobian, limit, noise, degrees=max(table.num_rows - model.num_free, 1))
        collected.append((float(extents[0]), directions[0], u, jacobian * limit))
    collected.sort(key=lambda item: item[0])
    extent, direction, u, scaled = collected[len(collected) // 2]
    if extent > 1:
        names = _names(model.coordinates, direction)
        if not set(names) <= known:
            limit = limits(model, np.ones(1))
            words = _words(model, u, names, direction, extent, limit)
            found.append(Flag("unidentified", names, words, _remedy(model, u, scaled, limit, table)))
    return tuple(found)


def _plausible(model: Model) -> list[Array]:
    """Free coordinates of plausible truths: amplitudes of one nat in the middle of the data, two values per other parameter."""
    axes = []
    for parameter in model.law.parameters:
        if parameter.linear:
            axes.append([0.0] if parameter.log else [1.0 if not np.isfinite(parameter.low) or parameter.low < 1 else parameter.low])
        elif parameter.grid:
            middle = len(parameter.grid) // 2
            axes.append([parameter.encode(value) for value in parameter.grid[max(middle - 1, 0) : middle + 1]])
        else:
            axes.append([parameter.encode(1.0) if parameter.log else 0.3])
    points = np.array(list(product(*axes)))
    if len(points) > 64:
        points = points[:: len(points) // 64]
    if model.is_plain:
        return list(points)
    flat = model.matrix.reshape(-1, model.num_free)
    return list((points - model.offset[0]) @ np.linalg.pinv(flat).T)


def _data_flags(model: Model, table: Table) -> list[Flag]:
    found = []
    names = model.law.names
    p = table.columns.get("p")
    if p is not None and "p" in model.law.columns and "B" in names and bool(np.all(p == 0)):
        coordinates = tuple(name for name in model.coordinates if name.split("[")[0] == "B")
        if coordinates:
            found.append(
                Flag(
                    "unidentified",
                    coordinates,
                    "every p is 0, so B has no effect on any row and nothing says what replay would do",
                    "one run with p = 1% (and better a second with p = 5%) at a size and D that exist already",
                )
            )
    return found


def _names(coordinates: tuple[str, ...], direction: Array) -> tuple[str, ...]:
    order = np.argsort(-np.abs(direction))
    strongest = abs(direction[order[0]])
    return tuple(coordinates[j] for j in order[:4] if abs(direction[j]) > 0.15 * strongest)


def _words(model: Model, u: Array, names: tuple[str, ...], direction: Array, extent: float, limit: Array) -> str:
    spans = []
    for name in names:
        m = model.coordinates.index(name)
        if np.isinf(extent):
            continue
        half = extent * abs(direction[m]) * limit[m]
        parameter = model.law.parameters[int(np.argmax(np.any(model.matrix[:, :, m] != 0, axis=0)))]
        spans.append(f"{name} by a factor {np.exp(min(half, 99.0)):.3g}" if parameter.log else f"{name} by {half:.2g}")
    joined = " and ".join(names) if len(names) < 3 else ", ".join(names[:-1]) + " and " + names[-1]
    if len(names) == 1:
        text = f"the data do not determine {joined}"
    else:
        text = f"the data do not tell {joined} apart: they can move together and leave every prediction at these rows as it is"
    if spans:
        text += f" (each way: {', '.join(spans)})"
    if _is_log_limit(model, u, names):
        text += (
            "; alpha runs to 0, where the law becomes logarithmic in (1 + B p): fit the log limit instead of reading these numbers"
        )
    return text


def _is_log_limit(model: Model, u: Array, names: tuple[str, ...]) -> bool:
    if "E" not in names or "alpha" not in model.coordinates or "p" not in model.law.columns:
        return False
    return bool(u[model.coordinates.index("alpha")] < LOG_LIMIT_ALPHA)


def _bound_words(model: Model, u: Array, name: str) -> str:
    m = model.coordinates.index(name)
    bare = name.split("[")[0]
    side = "lower" if u[m] <= model.low[m] else "upper"
    # Of an amplitude, in natural units: within a fit it is relative to typical columns.
    group = next((g for g, one in enumerate(model.groups) if name == f"{bare}[{one}]"), 0)
    value = float(model.natural(u)[group, model.law.index(bare)])
    reason = {
        "E": "these data show no floor, and the interval is one-sided",
        "alpha": "these data show no effect of capacity",
        "beta": "these data show no effect of the amount of data",
        "B": "replay shows no effect" if side == "lower" else "any replay at all removes the forgetting",
        "A": "the term has vanished",
    }.get(bare, "the interval is one-sided")
    return f"{name} ended on its {side} bound {value:g}: {reason}"


def candidate_runs(law: Law, table: Table) -> list[dict[str, float]]:
    """Neighbours of the runs of a table: the middle and extreme rows with one column changed."""
    columns = {name: table.columns[name] for name in law.columns}
    order = np.lexsort([columns[name] for name in law.columns])
    bases = [
        {name: float(values[row]) for name, values in columns.items()}
        for row in {int(order[0]), int(order[-1]), int(order[len(order) // 2])}
    ]
    made: list[dict[str, float]] = []
    for base in bases:
        for name in law.columns:
            if name in SHARE_MENUS:
                options = list(SHARE_MENUS[name])
            elif name in COUNT_MENU:
                options = [base[name] * factor for factor in COUNT_MENU[name]]
            elif name == "L_ft":
                options = [base[name] * factor for factor in (0.8, 1.25)]
            else:
                continue
            made.extend({**base, name: value} for value in options if value != base[name])
    return made


def describe_run(run: Mapping[str, float]) -> str:
    """A run in words: `N = 1.27e+09, D = 3e+06, p = 1%`."""
    parts = [
        f"{name} = {value:.3g}" if name not in ("p", "r", "R") else f"{name} = {100 * value:g}%"
        for name, value in run.items()
        if name != "L0"
    ]
    return ", ".join(parts)


def _remedy(model: Model, u: Array, scaled: Array, limit: Array, table: Table) -> str:
    """The runs, at most three, that raise the flattest direction most; "" where no neighbour helps."""
    if len(model.groups) > 1:
        return ""
    candidates = candidate_runs(model.law, table)
    if not candidates:
        return ""
    columns = {name: np.array([run[name] for run in candidates]) for name in model.law.columns}
    with np.errstate(all="ignore"):
        value, partials = model.evaluate(model.law.features(columns, model.references), None, u[None])
        shape = (1, len(candidates))
        raw = np.stack([np.broadcast_to(partial, shape)[0] for partial in partials], axis=1)
        rows = (
            np.nan_to_num(
                raw / np.maximum(np.abs(np.broadcast_to(value, shape)[0]), 1e-3)[:, None],
                posinf=0.0,
                neginf=0.0,
            )
            * limit
        )
    gram = np.nan_to_num(scaled).T @ np.nan_to_num(scaled)
    picked: list[int] = []
    first = float(np.linalg.eigvalsh(gram)[0])
    for _ in range(3):
        gains = np.linalg.eigvalsh(gram + rows[:, :, None] * rows[:, None, :])[:, 0]
        best = int(np.argmax(gains))
        picked.append(best)
        gram = gram + np.outer(rows[best], rows[best])
        if gains[best] > max(10 * first, 1e-4 * float(np.trace(gram)) / len(gram)):
            break
    return "; ".join(f"a run at {describe_run(candidates[i])}" for i in dict.fromkeys(picked))
