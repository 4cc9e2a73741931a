"""Starting points: for every point of a grid of exponents, the best amplitudes by weighted linear least squares.

Given its exponents a law is linear in its amplitudes, and the basis of that linear problem is the law's own gradient, so no law
needs code of its own here. For many weight rows at once the normal equations are one matrix product.
"""

from itertools import product

import numpy as np

from mlx_forget.laws.forms import Array, Features, Law

MAX_GRID = 512
# Starts are for the eye of a Newton method, not for the reader: a rough ridge keeps them finite.
RIDGE = 1e-9


def exponent_grid(law: Law) -> Array:
    """Internal coordinates [S, k] over the product of the parameters' grids, amplitudes one and offsets zero."""
    axes = [parameter.grid or (_neutral(parameter.low, parameter.high),) for parameter in law.parameters]
    axes = [(1.0 if p.log else 0.0,) if p.linear else axis for p, axis in zip(law.parameters, axes, strict=True)]
    size = int(np.prod([len(axis) for axis in axes]))
    if size <= MAX_GRID:
        points = np.array(list(product(*axes)))
    else:
        generator = np.random.default_rng(0)
        points = np.stack([np.resize(generator.permutation(np.resize(axis, MAX_GRID)), MAX_GRID) for axis in axes], axis=1)
    return np.stack([[p.encode(v) for v in points[:, j]] for j, p in enumerate(law.parameters)], axis=1)


def _neutral(low: float, high: float) -> float:
    if np.isfinite(low) and np.isfinite(high):
        return (low + high) / 2
    return low + 1.0 if np.isfinite(low) else high - 1.0 if np.isfinite(high) else 1.0


def projected_starts(law: Law, features: Features, loss: Array, weights: Array, *, count: int) -> Array:
    """The best starts of every weight row.

    Args:
        law: the law; its own `starts` are used where it has them.
        features: arrays [1, n].
        loss: natural losses, float64[n].
        weights: float64[R, n].
        count: starts per row.

    Returns:
        Internal coordinates, float64[R, count or fewer, k], best first.
    """
    if law.starts is not None:
        made = np.asarray(law.starts(features, loss, weights.mean(0)))
        value = law.evaluate(features, [made[:, j, None] for j in range(made.shape[1])])[0]
        misfit = weights @ ((np.broadcast_to(value, (len(made), len(loss))) / loss - 1) ** 2).T
        order = np.argsort(np.where(np.isfinite(misfit), misfit, np.inf), axis=1)[:, :count]
        return made[order]
    grid = exponent_grid(law)
    columns = [j for j, parameter in enumerate(law.parameters) if parameter.linear]
    with np.errstate(all="ignore"):
        value, partials = law.evaluate(features, [grid[:, j, None] for j in range(grid.shape[1])])
    shape = (len(grid), len(loss))
    if not columns:
        misfit = weights @ ((np.broadcast_to(value, shape) / loss - 1) ** 2).T
        return grid[np.argsort(misfit, axis=1)[:, :count]]
    basis = np.stack([np.broadcast_to(partials[j], shape) for j in columns], axis=1)
    # A linear amplitude starts at zero in the grid, a logarithmic one at one: what is left at zero is the offset.
    at_one = np.array([law.parameters[j].log for j in columns])
    offset = np.broadcast_to(value, shape) - basis[:, at_one].sum(axis=1)
    basis, target = basis / loss, 1.0 - offset / loss
    usable = np.isfinite(basis).all(axis=(1, 2)) & np.isfinite(target).all(axis=1)
    grid, basis, target = grid[usable], basis[usable], target[usable]
    m = len(columns)
    upper = np.triu_indices(m)
    products = (basis[:, upper[0]] * basis[:, upper[1]]).reshape(-1, len(loss))
    packed = (weights @ products.T).reshape(len(weights), len(grid), -1)
    right = (weights @ (basis * target[:, None]).reshape(-1, len(loss)).T).reshape(len(weights), len(grid), m)
    normal = np.empty((len(weights), len(grid), m, m))
    normal[:, :, upper[0], upper[1]] = packed
    normal[:, :, upper[1], upper[0]] = packed
    low = np.array([law.parameters[j].low for j in columns])
    high = np.array([law.parameters[j].high for j in columns])
    # A positive amplitude keeps at least a thousandth of the loss, so that its logarithm can still move.
    smallest = np.where(at_one, 1e-3 / np.maximum(np.abs(basis).mean(axis=2), 1e-300), low)
    solved = _bounded_solve(normal, right, np.broadcast_to(smallest, right.shape), high)
    misfit = weights @ (target**2).T - 2 * (right * solved).sum(-1) + np.einsum("rgi,rgij,rgj->rg", solved, normal, solved)
    order = np.argsort(misfit, axis=1)[:, :count]
    picked = np.take_along_axis(solved, order[..., None], axis=1)
    starts = grid[order]
    starts[..., columns] = np.where(at_one, np.log(np.where(at_one, picked, 1.0)), picked)
    return np.asarray(starts)


def _bounded_solve(normal: Array, right: Array, low: Array, high: Array) -> Array:
    """Least squares from normal equations [..., m, m] and [..., m], amplitudes that leave their bounds held there."""
    m = right.shape[-1]
    eye = np.eye(m)
    ridge = RIDGE * np.einsum("...ii->...", normal)[..., None, None] * eye + 1e-300 * eye
    solved = np.linalg.solve(normal + ridge, right[..., None])[..., 0]
    outside = np.zeros(solved.shape, dtype=bool)
    for _ in range(m - 1):
        crossing = (solved < low) | (solved > high)
        if not crossing.any():
            break
        outside |= crossing
        held = np.where(outside, np.clip(solved, low, high), 0.0)
        known = np.where(outside, held, right - np.einsum("...ij,...j->...i", normal, held))
        apart = outside[..., :, None] | outside[..., None, :]
        solved = np.linalg.solve(np.where(apart, eye, normal + ridge), known[..., None])[..., 0]
    return np.clip(solved, low, high)
