"""Estimates from documents: a function of sums over documents, with a jackknife standard error and a t interval.

Documents are the independent draws; the tokens of one are not. Everything that an audit reports is a smooth function of sums over
documents (mean losses are ratios of two), so one rule serves all: leave each document out once. Before and after are read on the same
tokens, so differences are paired.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, and its 95% interval; the last three are nan for fewer than two documents."""

    value: float
    stderr: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval: differences smaller than this cannot be told from none."""
        return (self.high - self.low) / 2


def jackknife(sums: Floats, statistic: Callable[[Floats], Floats]) -> Estimate:
    """The estimate of a function of sums over documents.

    Args:
        sums: float64[D, ...], the sums of each document.
        statistic: maps totals float64[K, ...] to K values.
    """
    total = sums.sum(axis=0)
    value = float(statistic(total[None])[0])
    num = len(sums)
    if num < 2:
        return Estimate(value, math.nan, math.nan, math.nan)
    left_out = statistic(total - sums)
    stderr = math.sqrt((num - 1) / num * float(((left_out - left_out.mean()) ** 2).sum()))
    half = t_quantile(num - 1) * stderr
    return Estimate(value, stderr, value - half, value + half)


def t_quantile(degrees: int) -> float:
    """The factor between a standard error and half of a 95% interval."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, degrees))


def ratio(numerator: int, denominator: int) -> Callable[[Floats], Floats]:
    """One sum over another; 0 over 0 is nan."""

    def statistic(totals: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(totals[:, numerator] / totals[:, denominator], np.float64)

    return statistic
