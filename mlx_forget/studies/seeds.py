"""One number over the seeds of a study, as every table of several seeds has it."""

from collections.abc import Sequence

import numpy as np


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation over seeds (n - 1 in its denominator); None for one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def deviation_text(deviation: float | None) -> str:
    return "" if deviation is None else f"±{deviation:.4f}"
