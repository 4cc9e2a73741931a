"""A fitted law as a thing that answers: values, intervals and distances from the data, in memory or from a fit.json."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from mlx_forget.errors import UserError
from mlx_forget.laws.bootstrap import Widening
from mlx_forget.laws.forms import Array, Law
from mlx_forget.laws.uncertainty import Uncertainty

# The factor outside the data that is not worth a word: subsets of tokens are cut at whole rows.
NEGLIGIBLE = 1.01


@dataclass(frozen=True)
class Predictor:
    """One law with parameters and draws of them.

    Args:
        law: the law.
        params: natural parameters.
        draws: float64[R, k], natural parameters of the refits; R may be 0.
        widening: about the value, which turns the draws' spread into an honest one.
        data_range: {column: (smallest, largest)} of the fitted rows.
        columns: the fitted rows of the law's columns, {column: float64[n]}; may be empty.
        group: the group's name, or "".
        unidentified: {parameter: why it is not determined}.
        noise_nats: standard deviation of one run's loss about the law, nats; NaN where unknown.
    """

    law: Law
    params: Mapping[str, float]
    draws: Array
    widening: Widening
    data_range: Mapping[str, tuple[float, float]]
    columns: Mapping[str, Array] = field(default_factory=dict)
    group: str = ""
    unidentified: Mapping[str, str] = field(default_factory=dict)
    noise_nats: float = float("nan")

    @classmethod
    def from_uncertainty(cls, uncertainty: Uncertainty, group: str = "") -> "Predictor":
        """The predictor of a fit, or of one group of a joint fit."""
        fit = uncertainty.fit
        g = fit.model.groups.index(group) if group in fit.model.groups else 0
        table = fit.table if fit.group is None else fit.table.select(fit.group == g)
        natural = fit.model.natural(fit.u)[g]
        draws = np.empty((0, len(natural)))
        widening = Widening()
        if uncertainty.draws is not None:
            made = uncertainty.draws
            draws = fit.model.natural(made.u[made.converged])[:, g]
            widening = made.widening
        ranges = {name: (float(table.columns[name].min()), float(table.columns[name].max())) for name in (*fit.law.columns, "loss")}
        flags = [(flag.parameters, flag.words) for flag in fit.flags if flag.kind == "unidentified"]
        return cls(
            fit.law,
            dict(zip(fit.law.names, natural.tolist(), strict=True)),
            draws[np.isfinite(draws).all(axis=1)],
            widening,
            ranges,
            {name: table.columns[name] for name in fit.law.columns},
            group,
            reasons_of(flags, group),
            fit.noise_nats,
        )

    def predict(self, columns: Mapping[str, npt.ArrayLike]) -> Array:
        """The law's value [n] at natural columns."""
        return self.law.predict(self.params, self._complete(columns))

    def forgetting(self, columns: Mapping[str, npt.ArrayLike]) -> Array:
        """The law's value less L0, nats, [n]."""
        return self.predict({**columns, "L0": 0.0})

    def sample(self, columns: Mapping[str, npt.ArrayLike], *, level: float = 0.95) -> Array:
        """Draws [R, n] of the law's value, widened for intervals of a level; [1, n] of the value itself where there are no draws."""
        complete = self._complete(columns)
        centre = self.law.predict(self.params, complete)
        if not len(self.draws):
            return centre[None]
        references = dict.fromkeys(self.law.logs, 1.0)
        arrays = {name: np.broadcast_to(np.asarray(complete[name], float), centre.shape) for name in self.law.columns}
        theta = self.law.internal(self.draws, references)
        with np.errstate(all="ignore"):
            value, _ = self.law.evaluate(self.law.features(arrays, references), [theta[:, j, None] for j in range(theta.shape[1])])
        values = np.broadcast_to(value, (len(self.draws), len(centre)))
        values = np.where(np.isfinite(values), values, centre)
        factor = self.widening.at(level)
        if (values > 0).all() and (centre > 0).all():
            return np.asarray(centre * (values / centre) ** factor)
        return np.asarray(centre + factor * (values - centre))

    def interval(self, columns: Mapping[str, npt.ArrayLike], *, level: float = 0.95) -> tuple[Array, Array]:
        """The ends [n] of the interval of the law's value."""
        low, high = np.quantile(self.sample(columns, level=level), [0.5 - level / 2, 0.5 + level / 2], axis=0)
        return low, high

    def run_interval(self, columns: Mapping[str, npt.ArrayLike], *, level: float = 0.95) -> tuple[Array, Array]:
        """The ends [n] of the interval of one new run's loss: the law's own interval and the noise of a run, added as squares.

        Infinite where the fit has no draws, or its noise is unknown.
        """
        centre = self.predict(columns)
        if not len(self.draws) or not np.isfinite(self.noise_nats):
            return np.full_like(centre, -np.inf), np.full_like(centre, np.inf)
        low, high = self.interval(columns, level=level)
        noise = float(ndtri(0.5 + level / 2)) * self.noise_nats
        return np.asarray(centre - np.hypot(centre - low, noise)), np.asarray(centre + np.hypot(high - centre, noise))

    def upper(self, columns: Mapping[str, npt.ArrayLike], *, confidence: float) -> Array:
        """The value [n] that the law stays below with this confidence."""
        return np.asarray(np.quantile(self.sample(columns, level=abs(2 * confidence - 1)), confidence, axis=0))

    def _complete(self, columns: Mapping[str, npt.ArrayLike]) -> Mapping[str, npt.ArrayLike]:
        missing = [name for name in self.law.columns if name not in columns]
        if missing:
            raise UserError(f"{self.law.name} needs {', '.join(missing)} to predict; it reads {', '.join(self.law.columns)}.")
        return columns

    def distance(self, columns: Mapping[str, float]) -> dict[str, float]:
        """How far outside the data a question is, per column: the factor beyond the nearest end of the range; 1 inside.

        A share beyond the largest share seen counts as its ratio to it; L0 is no part of the distance.
        """
        made = {}
        for name in self.law.columns:
            if name == "L0" or name not in columns:
                continue
            low, high = self.data_range[name]
            value = float(columns[name])
            if value > high:
                made[name] = value / high if high > 0 else float("inf")
            elif value < low:
                made[name] = low / value if value > 0 else (1.0 if name in ("p", "r") and low == 0 else float("inf"))
            else:
                made[name] = 1.0
        return made


def reasons_of(flags: Iterable[tuple[Iterable[str], str]], group: str) -> dict[str, str]:
    """{parameter: why it is not determined} of one group, from flags (coordinates, words): shared ones and those of the group."""
    named = ((name.partition("["), words) for names, words in flags for name in names)
    return {bare: words for (bare, bracket, rest), words in named if not bracket or rest == f"{group}]"}


def describe_distance(distance: Mapping[str, float], data_range: Mapping[str, tuple[float, float]]) -> str:
    """The distances of more than a percent in words, or ""."""
    return "; ".join(
        f"{name} is {factor:.3g} times outside the data ({data_range[name][0]:.3g} to {data_range[name][1]:.3g})"
        for name, factor in distance.items()
        if factor > NEGLIGIBLE
    )
