"""Yes-or-no outcomes of the same examples before and after: rates, flips, and a paired test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairedRates:
    """How often something held before and after.

    Args:
        num: examples.
        before, after: shares.
        lost, gained: examples that held before only, and after only.
        change: after minus before.
        stderr: of the change, over examples, paired; nan for one example.
        p_value: two-sided exact McNemar test that flips in both directions are equally likely.
    """

    num: int
    before: float
    after: float
    lost: int
    gained: int
    change: float
    stderr: float
    p_value: float


def paired_rates(before: Sequence[float], after: Sequence[float]) -> PairedRates:
    """From outcomes 0 or 1, one for each example."""
    from scipy.stats import binomtest

    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    change = second - first
    lost, gained = int((change < 0).sum()), int((change > 0).sum())
    return PairedRates(
        num=len(first),
        before=float(first.mean()),
        after=float(second.mean()),
        lost=lost,
        gained=gained,
        change=float(change.mean()),
        stderr=float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else math.nan,
        p_value=float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0,
    )
