"""A fitted law, how its fit ended, and what it predicts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.laws.forms import Array, Law
from mlx_forget.laws.identify import Flag
from mlx_forget.laws.model import Constraints, Model
from mlx_forget.laws.noise import Noise
from mlx_forget.laws.objective import Objective
from mlx_forget.laws.table import Table


@dataclass(frozen=True)
class Certificate:
    """How a fit ended.

    Args:
        status: "converged", "stalled" or "iteration limit".
        reason: the same in a sentence.
        num_starts: starts carried to the end, and num_agree of them that ended within 1e-6 of the best objective.
        excess: how far the objective can still be above its local minimum, relative, by the majoriser.
        gradient_norm: the gradient's norm in the majoriser's metric, relative to the objective.
        at_bounds: free coordinates that ended on a bound.
        steps: evaluations of the winning start.
    """

    status: str
    reason: str
    num_starts: int
    num_agree: int
    excess: float
    gradient_norm: float
    at_bounds: tuple[str, ...]
    steps: int


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Args:
        law: the law.
        model: the law bound to its references, constraints and groups.
        objective: what was minimised.
        constraints: what was held.
        table: the rows that were fitted.
        group: the group of each row for a joint fit, int[n]; None for an ordinary fit.
        u: float64[K], the free coordinates.
        value: the objective at u.
        residual: float64[n], link(loss) - link(prediction).
        jacobian: float64[n, K], of the prediction in the link.
        noise: scales of the residuals.
        certificate: how it ended.
        flags: what not to trust, and why.
    """

    law: Law
    model: Model
    objective: Objective
    constraints: Constraints
    table: Table
    group: npt.NDArray[np.int64] | None
    u: Array
    value: float
    residual: Array
    jacobian: Array
    noise: Noise
    certificate: Certificate
    flags: tuple[Flag, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.table.num_rows

    @property
    def params(self) -> dict[str, float]:
        """Natural parameters by name; those of a joint fit are named `alpha[group]`, shared ones plainly."""
        natural = self.model.natural(self.u)
        if len(self.model.groups) == 1:
            return dict(zip(self.law.names, natural[0].tolist(), strict=True))
        made: dict[str, float] = {}
        for j, name in enumerate(self.law.names):
            if name in self.constraints.shared or name in self.constraints.fixed:
                made[name] = float(natural[0, j])
            else:
                made |= {f"{name}[{g}]": float(natural[i, j]) for i, g in enumerate(self.model.groups)}
        return made

    @property
    def predicted(self) -> Array:
        """Predictions at the fitted rows, nats, float64[n]."""
        return np.asarray(self.objective.invert(self.objective.transform(self.table.columns["loss"]) - self.residual))

    @property
    def mre(self) -> float:
        """The mean relative error over the fitted rows."""
        loss = self.table.columns["loss"]
        return float(np.mean(np.abs(self.predicted - loss) / loss))

    @property
    def noise_nats(self) -> float:
        """The standard deviation of one run's loss about the law, nats; where the link is the logarithm, at the mean loss."""
        scale = float(np.mean(self.table.columns["loss"])) if self.objective.link == "log" else 1.0
        return self.noise.residual * scale

    @property
    def data_range(self) -> dict[str, tuple[float, float]]:
        """The smallest and largest value of every column of the law, and of the loss."""
        columns = self.table.columns
        return {name: (float(columns[name].min()), float(columns[name].max())) for name in (*self.law.columns, "loss")}

    @property
    def covariance(self) -> Array:
        """The estimator's asymptotic covariance of the free coordinates, for independent rows; infinite on ridges."""
        return sandwich(self.jacobian, self.noise)

    def predict(self, columns: Mapping[str, npt.ArrayLike], *, group: str | None = None) -> Array:
        """Predicted losses [n] for natural columns [n] or scalars."""
        return np.asarray(predict_at(self, self.u[None], columns, group=group)[0])


def predict_at(fit: Fit, u: Array, columns: Mapping[str, npt.ArrayLike], *, group: str | None = None) -> Array:
    """Predictions [R, n] of a fit's law at free coordinates [R, K].

    Raises:
        UserError: a column of the law is missing, or the group is unknown.
    """
    for name in fit.law.columns:
        if name not in columns:
            raise UserError(f"{fit.law.name} needs {name!r} to predict; it reads {', '.join(fit.law.columns)}.")
    length = max(np.size(np.asarray(columns[name])) for name in fit.law.columns)
    arrays = {name: np.broadcast_to(np.asarray(columns[name], float), (length,)) for name in fit.law.columns}
    which = None
    if len(fit.model.groups) > 1:
        if group not in fit.model.groups:
            raise UserError(f"This fit has the groups {', '.join(fit.model.groups)}; name one of them, not {group!r}.")
        which = np.full(length, fit.model.groups.index(group))
    return fit.model.predict(u, arrays, which)


def sandwich(jacobian: Array, noise: Noise) -> Array:
    """tau^2 (J'J)^-1 for J [n, K], through a scaled singular value decomposition that leaves ridges huge, not lost."""
    norms = np.linalg.norm(jacobian, axis=0)
    scale = np.where(norms > 0, norms, 1.0)
    _, sizes, directions = np.linalg.svd(jacobian / scale, full_matrices=False)
    if len(sizes) < jacobian.shape[1]:
        return np.full((jacobian.shape[1], jacobian.shape[1]), np.inf)
    weighted = directions / np.maximum(sizes, 1e-14)[:, None] / scale
    return np.asarray(noise.estimator**2 * weighted.T @ weighted)
