"""A law bound to a table: references, constraints and groups, as one affine map from free coordinates to the law's.

Fixing, tying and sharing parameters are all affine in internal coordinates, so one evaluation serves every fit: for the groups g of
a joint fit, theta_g = M_g u + t_g.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.laws.forms import Array, Features, Law


@dataclass(frozen=True)
class Constraints:
    """What a fit holds.

    Args:
        fixed: parameters held at a natural value.
        tied: parameters that equal another one, {follower: leader}.
        shared: parameters that are one number for all groups; the others are fitted per group.
    """

    fixed: Mapping[str, float] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    @property
    def touched(self) -> set[str]:
        return {*self.fixed, *self.tied, *self.tied.values(), *self.shared}


FREE = Constraints()


@dataclass(frozen=True)
class Model:
    """A law with references, constraints and groups.

    Args:
        law: the law.
        references: what each logarithmic column was divided by.
        matrix: float64[G, k, K], and offset float64[G, k]: theta_g = matrix[g] @ u + offset[g].
        low, high: float64[K], bounds of the free coordinates u.
        coordinates: name of each free coordinate: "alpha", or "alpha[math]" where it belongs to one group.
        groups: names of the groups; one unnamed group for an ordinary fit.
    """

    law: Law
    references: Mapping[str, float]
    matrix: Array
    offset: Array
    low: Array
    high: Array
    coordinates: tuple[str, ...]
    groups: tuple[str, ...] = ("",)

    @property
    def num_free(self) -> int:
        return len(self.coordinates)

    @property
    def is_plain(self) -> bool:
        """Whether u is theta: one group and nothing held."""
        return len(self.groups) == 1 and self.num_free == len(self.law.parameters)

    def theta(self, u: Array) -> Array:
        """Internal coordinates [..., G, k] of free coordinates [..., K]."""
        if self.is_plain:
            return u[..., None, :]
        return np.asarray(np.einsum("gkm,...m->...gk", self.matrix, u) + self.offset)

    def natural(self, u: Array) -> Array:
        """Natural parameters [..., G, k] of free coordinates [..., K]."""
        return self.law.natural(self.theta(u), self.references)

    def free(self, natural: Array) -> Array:
        """Free coordinates [..., K] nearest to natural parameters [..., G, k]."""
        theta = self.law.internal(natural, self.references) - self.offset
        flat = self.matrix.reshape(-1, self.num_free)
        return np.asarray(theta.reshape(*theta.shape[:-2], -1) @ np.linalg.pinv(flat).T)

    def evaluate(self, features: Features, group: npt.NDArray[np.int64] | None, u: Array) -> tuple[Array, list[Array | float]]:
        """The law's value [R, n] and its derivatives with respect to each free coordinate, for u [R, K].

        `group` is the group of each row, int[n], or None where there is only one.
        """
        if self.is_plain:
            value, partials = self.law.evaluate(features, [u[:, j, None] for j in range(u.shape[1])])
            return value, list(partials)
        theta = self.theta(u)
        columns = [theta[:, 0, j, None] if group is None else theta[:, group, j] for j in range(theta.shape[2])]
        value, raw = self.law.evaluate(features, columns)
        partials_of_free: list[Array | float] = []
        for m in range(self.num_free):
            total: Array | float = 0.0
            for j in np.flatnonzero(np.any(self.matrix[:, :, m] != 0, axis=0)).tolist():
                weight = self.matrix[0, j, m] if group is None else self.matrix[group, j, m]
                total = total + raw[j] * weight
            partials_of_free.append(total)
        return value, partials_of_free

    def predict(self, u: Array, columns: Mapping[str, npt.ArrayLike], group: npt.NDArray[np.int64] | None = None) -> Array:
        """Predictions [R, n] for free coordinates [R, K] and natural columns of shape [n]."""
        if group is not None and len(self.groups) == 1:
            group = None
        features = self.law.features(columns, self.references)
        with np.errstate(over="ignore", invalid="ignore"):
            value, _ = self.evaluate(features, group, u)
        length = max(feature.shape[-1] for feature in features.values())
        return np.array(np.broadcast_to(value, (len(u), length)))


def reference_points(law: Law, columns: Mapping[str, Array]) -> dict[str, float]:
    """The geometric mean of each logarithmic column."""
    return {column: float(np.exp(np.mean(np.log(columns[column])))) for column in law.logs}


def bind(law: Law, columns: Mapping[str, Array], *, constraints: Constraints = FREE, groups: Sequence[str] = ("",)) -> Model:
    """The model of a law for these columns.

    Raises:
        UserError: a constraint names an unknown parameter, contradicts another, or cannot be held.
    """
    for name in constraints.touched:
        law.index(name)
    if law.to_natural is not None and {*constraints.fixed, *constraints.tied, *constraints.shared}:
        if law.plain is None:
            raise UserError(
                f"{law.name} has coordinates of its own and no plain ones, so that nothing in it can be fixed, tied or shared."
            )
        law = law.plain
    for follower, leader in constraints.tied.items():
        if follower in constraints.fixed or leader in constraints.tied or follower == leader:
            raise UserError(f"{law.name}: cannot tie {follower!r} to {leader!r}: one of them is held already.")
        if law.parameters[law.index(follower)].log != law.parameters[law.index(leader)].log:
            raise UserError(
                f"{law.name}: cannot tie {follower!r} to {leader!r}: an amplitude and an exponent are different things."
            )
        if (follower in constraints.shared) != (leader in constraints.shared) and leader not in constraints.fixed:
            raise UserError(f"{law.name}: {follower!r} is tied to {leader!r}: share both of them, or neither.")
    for name, value in constraints.fixed.items():
        parameter = law.parameters[law.index(name)]
        if not (np.isfinite(value) and parameter.low <= value <= parameter.high):
            raise UserError(f"{law.name}: {name}={value:g} is outside {parameter.low:g}..{parameter.high:g}.")

    references = reference_points(law, columns)
    for rule in law.rescales:
        # A held amplitude is held in natural units, which only an undivided column keeps.
        is_shared_with_its_exponent = (
            rule.amplitude in constraints.shared
            and rule.amplitude not in constraints.fixed
            and rule.amplitude not in {*constraints.tied, *constraints.tied.values()}
            and (rule.power is None or rule.power in constraints.shared or rule.power in constraints.fixed)
        )
        if rule.amplitude in constraints.touched and not is_shared_with_its_exponent:
            references[rule.column] = 1.0

    num_groups, k = len(groups), len(law.parameters)
    blocks: list[tuple[str, npt.NDArray[np.bool_], int]] = []
    for j, parameter in enumerate(law.parameters):
        if parameter.name in constraints.fixed or parameter.name in constraints.tied:
            continue
        everywhere = np.ones(num_groups, dtype=bool)
        if num_groups == 1 or parameter.name in constraints.shared:
            blocks.append((parameter.name, everywhere, j))
        else:
            blocks.extend((f"{parameter.name}[{group}]", np.arange(num_groups) == g, j) for g, group in enumerate(groups))
    if not blocks:
        raise UserError(f"{law.name}: every parameter is fixed, so there is nothing to fit.")
    matrix = np.zeros((num_groups, k, len(blocks)))
    offset = np.zeros((num_groups, k))
    low, high = np.empty(len(blocks)), np.empty(len(blocks))
    for m, (_, member, j) in enumerate(blocks):
        matrix[member, j, m] = 1.0
        low[m], high[m] = law.parameters[j].internal_low, law.parameters[j].internal_high
    for name, value in constraints.fixed.items():
        offset[:, law.index(name)] = law.parameters[law.index(name)].encode(value)
    for follower, leader in constraints.tied.items():
        follower_index, leader_index = law.index(follower), law.index(leader)
        matrix[:, follower_index] = matrix[:, leader_index]
        offset[:, follower_index] = offset[:, leader_index]
        driven = np.any(matrix[:, follower_index] != 0, axis=0)
        low[driven] = np.maximum(low[driven], law.parameters[follower_index].internal_low)
        high[driven] = np.minimum(high[driven], law.parameters[follower_index].internal_high)
    return Model(law, references, matrix, offset, low, high, tuple(name for name, _, _ in blocks), tuple(groups))
