"""How large the noise is, as an estimator sees it: the scale that turns curvature into variance and falls into F ratios."""

from dataclasses import dataclass

import numpy as np
from scipy.special import erf

from mlx_forget.laws.forms import Array
from mlx_forget.laws.objective import Objective

NORMAL_MEDIAN = 0.6744897501960817


@dataclass(frozen=True)
class Noise:
    """Scales of a fit's residuals, in the link.

    Args:
        residual: the standard deviation of a residual, from its median: robust, and corrected for the fitted parameters.
        estimator: tau, with covariance of the estimate = tau^2 (J'J)^-1. Residual scale for least squares, about 1.25 times that
            for a nearly absolute loss under normal noise.
        ratio: what one degree of freedom adds to twice the objective, E psi^2 / E psi'; chi-squared ratios divide by it.
    """

    residual: float
    estimator: float
    ratio: float


def estimate_noise(residual: Array, objective: Objective, num_free: int) -> Noise:
    """The noise scales of residuals [n] of a fit with `num_free` free coordinates.

    The slope E psi' of a nearly absolute loss is the density of residuals at zero. Counting residuals within delta would count the
    rows that the fit runs through (one per parameter), so the density is that of a normal law whose scale is the median of the
    other residuals.
    """
    n = len(residual)
    degrees = max(n - num_free, 1)
    sizes = np.sort(np.abs(residual))[min(num_free, n - 1) :]
    scale = float(np.median(sizes)) / NORMAL_MEDIAN
    if np.isinf(objective.delta):
        scale = float(np.sqrt(np.sum(residual**2) / degrees))
        return Noise(scale, scale, scale**2)
    bounded = np.clip(residual, -objective.delta, objective.delta)
    square = float(np.sum(bounded**2)) / degrees
    slope = float(erf(objective.delta / (np.sqrt(2) * max(scale, 1e-300))))
    return Noise(scale, np.sqrt(square) / slope, square / slope)
