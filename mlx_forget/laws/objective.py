"""The objective: a weighted sum of Huber losses of residuals in the log (or plain) loss, with its gradient and curvature."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.laws.forms import Array
from mlx_forget.laws.model import Model

Rows = npt.NDArray[np.int64]
# Elements of one Jacobian block: 512 KiB, so that it stays in a small L2 cache between its creation and the products.
BLOCK = 1 << 16


@dataclass(frozen=True)
class Objective:
    """What a fit minimises: sum over rows of weight x huber(link(loss) - link(prediction)).

    Args:
        link: "log" (relative errors) or "linear" (nats).
        delta: where the Huber loss turns from square to straight, in units of the residual; infinity is least squares.
    """

    link: str = "log"
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if self.link not in ("log", "linear"):
            raise UserError(f"Unknown link {self.link!r}: it is 'log' or 'linear'.")
        if not self.delta > 0:
            raise UserError(f"delta must be positive (inf for least squares), and it is {self.delta:g}.")

    @property
    def name(self) -> str:
        return "least squares" if np.isinf(self.delta) else "huber"

    def describe(self, num_rows: int) -> str:
        """The full objective in words: link, delta, reduction, n."""
        residual = "log loss" if self.link == "log" else "loss"
        kind = "half squares" if np.isinf(self.delta) else f"Huber terms (delta {self.delta:g})"
        return f"sum over {num_rows} rows of {kind} of the residual in {residual}"

    def transform(self, loss: Array) -> Array:
        return np.log(loss) if self.link == "log" else np.asarray(loss, dtype=np.float64)

    def invert(self, value: Array) -> Array:
        return np.exp(value) if self.link == "log" else value

    def terms(self, residual: Array) -> Array:
        """The Huber loss of each residual; infinite where the residual is not a number."""
        bounded = np.clip(residual, -self.delta, self.delta)
        value = bounded * (residual - 0.5 * bounded)
        return np.where(np.isfinite(value), value, np.inf)


@dataclass(frozen=True)
class Curvature:
    """The objective at a batch of points.

    Args:
        value: float64[R].
        gradient: float64[R, K].
        inner: float64[R, K, K], J'WJ over the rows in the square part: Newton's matrix.
        outer: float64[R, K, K], J'WJ with every row, weighted delta/|residual| in the straight part: the majoriser's matrix.
    """

    value: Array
    gradient: Array
    inner: Array
    outer: Array


class Problem(Protocol):
    """A batch of minimisations that differ in weights, responses or features."""

    def __call__(self, rows: Rows, u: Array) -> Curvature:
        """The objective of problems `rows` at u, float64[len(rows), K]."""
        ...


def _curve(objective: Objective, residual: Array, jacobian: Array, weights: Array) -> Curvature:
    """Residual [r, n], its negated Jacobian [r, K, n], weights [r, n]."""
    absolute = np.abs(residual)
    if np.isinf(objective.delta):
        pull = residual * weights
        value = 0.5 * np.einsum("rn,rn->r", pull, residual)
        outer = np.matmul(jacobian * weights[:, None], jacobian.transpose(0, 2, 1))
        inner = outer
    else:
        bounded = np.clip(residual, -objective.delta, objective.delta)
        pull = weights * bounded
        value = np.einsum("rn,rn->r", pull, residual - 0.5 * bounded)
        np.maximum(absolute, objective.delta, out=absolute)
        outer_weights = weights * (objective.delta / absolute)
        inner_weights = weights * (absolute <= objective.delta)
        k = jacobian.shape[1]
        both = np.empty((len(residual), 2 * k, jacobian.shape[2]))
        np.multiply(jacobian, inner_weights[:, None], out=both[:, :k])
        np.multiply(jacobian, outer_weights[:, None], out=both[:, k:])
        products = np.matmul(both, jacobian.transpose(0, 2, 1))
        inner, outer = products[:, :k], products[:, k:]
    gradient = -np.matmul(jacobian, pull[:, :, None])[:, :, 0]
    return Curvature(np.where(np.isfinite(value), value, np.inf), gradient, inner, outer)


@dataclass(frozen=True)
class LawProblem:
    """The nonlinear problem: one law, a batch of weights, responses and, where they differ, features.

    Args:
        model: the law with its constraints.
        objective: the loss.
        features: from `Law.features`; arrays [1, n], or [S, n] for S data sets.
        response: transformed losses, float64[1 or R, n].
        weights: float64[R, n]; zero leaves a row out.
        group: the group of each row for joint fits, int[n].
        dataset: which of the S data sets each problem reads, int[R]; None where S is 1.
    """

    model: Model
    objective: Objective
    features: Mapping[str, Array]
    response: Array
    weights: Array
    group: Rows | None = None
    dataset: Rows | None = None

    def residual(self, rows: Rows, u: Array) -> tuple[Array, Array]:
        """The residual [r, n] in the link, and the derivatives of the prediction in the link [r, K, n]."""
        features = self.features if self.dataset is None else {k: _take(v, self.dataset[rows]) for k, v in self.features.items()}
        response = self.response if len(self.response) == 1 else self.response[rows]
        value, partials = self.model.evaluate(features, self.group, u)
        jacobian = np.empty((len(u), self.model.num_free, self.weights.shape[1]))
        if self.objective.link == "log":
            inverse = 1.0 / value
            for j, partial in enumerate(partials):
                np.multiply(partial, inverse, out=jacobian[:, j])
            return response - np.log(value), jacobian
        for j, partial in enumerate(partials):
            jacobian[:, j] = partial
        return response - value, jacobian

    def __call__(self, rows: Rows, u: Array) -> Curvature:
        block = max(1, BLOCK // (self.weights.shape[1] * self.model.num_free))
        made = []
        with np.errstate(all="ignore"):
            for start in range(0, len(rows), block):
                part = rows[start : start + block]
                residual, jacobian = self.residual(part, u[start : start + block])
                made.append(_curve(self.objective, residual, jacobian, self.weights[part]))
        if len(made) == 1:
            return made[0]
        return Curvature(
            *(np.concatenate(pieces) for pieces in zip(*((m.value, m.gradient, m.inner, m.outer) for m in made), strict=True))
        )


def _take(values: Array, rows: Rows) -> Array:
    return values if len(values) == 1 else values[rows]


@dataclass(frozen=True)
class TangentProblem:
    """The law replaced by its tangent at one point: a linear robust regression, made of matrix products alone.

    It carries all resamples close to their optima for a fraction of the cost of evaluating the law.

    Args:
        objective: the loss.
        residual: at the point, float64[1 or R, n].
        jacobian: of the prediction in the link at the point, float64[K, n].
        weights: float64[R, n].
    """

    objective: Objective
    residual: Array
    jacobian: Array
    weights: Array

    def __post_init__(self) -> None:
        k = len(self.jacobian)
        upper = np.triu_indices(k)
        object.__setattr__(self, "_upper", upper)
        object.__setattr__(self, "_products", np.ascontiguousarray((self.jacobian[upper[0]] * self.jacobian[upper[1]]).T))
        object.__setattr__(self, "_columns", np.ascontiguousarray(self.jacobian.T))

    def __call__(self, rows: Rows, u: Array) -> Curvature:
        block = max(1, BLOCK // self.weights.shape[1])
        pieces = [self._block(rows[s : s + block], u[s : s + block]) for s in range(0, len(rows), block)]
        if len(pieces) == 1:
            return pieces[0]
        return Curvature(*(np.concatenate(p) for p in zip(*((m.value, m.gradient, m.inner, m.outer) for m in pieces), strict=True)))

    def _block(self, rows: Rows, step: Array) -> Curvature:
        delta = self.objective.delta
        residual = (self.residual if len(self.residual) == 1 else self.residual[rows]) - step @ self.jacobian
        weights = self.weights[rows]
        products: Array = self._products  # type: ignore[attr-defined]
        columns: Array = self._columns  # type: ignore[attr-defined]
        if np.isinf(delta):
            pull = weights * residual
            value = 0.5 * np.einsum("rn,rn->r", pull, residual)
            outer = inner = self._square(weights @ products)
        else:
            bounded = np.clip(residual, -delta, delta)
            pull = weights * bounded
            value = np.einsum("rn,rn->r", pull, residual - 0.5 * bounded)
            absolute = np.maximum(np.abs(residual), delta)
            outer = self._square((weights * (delta / absolute)) @ products)
            inner = self._square((weights * (absolute <= delta)) @ products)
        return Curvature(value, -(pull @ columns), inner, outer)

    def _square(self, packed: Array) -> Array:
        k = len(self.jacobian)
        rows, columns = self._upper  # type: ignore[attr-defined]
        full = np.empty((len(packed), k, k))
        full[:, rows, columns] = packed
        full[:, columns, rows] = packed
        return full
