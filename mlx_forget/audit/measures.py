"""What a text lost as a whole: losses before and after, divergences, bits per byte, progress lost, transitions, calibration."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from mlx_forget.audit.reading import Reading
from mlx_forget.audit.statistics import Estimate, Floats, jackknife, ratio
from mlx_forget.evaluate import ProgressLost, progress_lost

NUM_BINS = 15


@dataclass(frozen=True)
class Losses:
    """Measures of a whole text. Nats per token unless said otherwise; each is a mean over tokens with documents as the draws.

    Args:
        loss_before, loss_after: next-token loss.
        forgetting: after minus before, paired.
        kl: KL(base || tuned).
        soft_ce, hard_ce: cross-entropy of the tuned model to the base's distribution and to its top token (L_f of Kalajdzievski 2024).
        agreement: share of tokens at which the base's top token is the tuned model's too.
        entropy_before: of the base's distribution; `soft_ce` minus this is `kl`.
        bits_per_byte_before, bits_per_byte_after, bits_per_byte_change: end-of-document tokens included, which stand for no byte.
    """

    loss_before: Estimate
    loss_after: Estimate
    forgetting: Estimate
    kl: Estimate
    soft_ce: Estimate
    hard_ce: Estimate
    agreement: Estimate
    entropy_before: Estimate
    bits_per_byte_before: Estimate
    bits_per_byte_after: Estimate
    bits_per_byte_change: Estimate


def losses(reading: Reading) -> Losses:
    m = reading.measures
    columns = ("ref_nll", "nll", "kl", "soft_ce", "hard_ce", "agreement")
    sums = reading.per_document(np.ones(len(reading.label)), *(m[name] for name in columns))
    sums = np.concatenate([sums, reading.text.num_bytes[:, None].astype(np.float64)], axis=1)
    tokens, (before, after, kl, soft, hard, agreement), num_bytes = 0, range(1, 7), 7
    bits = 1 / math.log(2)

    def mean(column: int) -> Estimate:
        return jackknife(sums, ratio(column, tokens))

    def less(left: int, right: int, per: int, scale: float = 1.0) -> Estimate:
        return jackknife(sums, lambda s: scale * (s[:, left] - s[:, right]) / s[:, per])

    return Losses(
        loss_before=mean(before),
        loss_after=mean(after),
        forgetting=less(after, before, tokens),
        kl=mean(kl),
        soft_ce=mean(soft),
        hard_ce=mean(hard),
        agreement=mean(agreement),
        entropy_before=less(soft, kl, tokens),
        bits_per_byte_before=jackknife(sums, lambda s: bits * s[:, before] / s[:, num_bytes]),
        bits_per_byte_after=jackknife(sums, lambda s: bits * s[:, after] / s[:, num_bytes]),
        bits_per_byte_change=less(after, before, num_bytes, bits),
    )


def progress_lost_of(curve: tuple[tuple[float, float], ...], forgetting: Estimate) -> ProgressLost:
    """The share of pretraining that was undone, from the base's own curve.

    The curve was read on other windows of the same text, so its last point moves up by the paired difference found here.
    """
    if not curve:
        return ProgressLost(None, None)
    end = curve[-1][1]
    return progress_lost(list(curve), end, end + forgetting.value)


@dataclass(frozen=True)
class Transitions:
    """What became of next-token hits (the top token is the right one), in shares of all tokens.

    The adjusted shares leave out what lucky guesses explain: a model that knows an answer hits; one that does not still hits with the
    `chance` of always answering with the text's most common token, before and after independently. Guesses flip as often one way as
    the other, so no more flips are called lucky than happened in the rarer direction, and the net change stays (after Harmon et al.
    2025, who adjust multiple-choice answers).

    Args:
        hits_before, hits_after: shares of hits.
        lost, gained: hits that became misses, and misses that became hits.
        adjusted_lost, adjusted_gained: known tokens that became unknown, and the reverse.
        chance: of a lucky hit.
    """

    hits_before: Estimate
    hits_after: Estimate
    lost: Estimate
    gained: Estimate
    adjusted_lost: Estimate
    adjusted_gained: Estimate
    chance: float


def transitions(reading: Reading) -> Transitions:
    before, after = reading.measures["ref_hit"], reading.measures["hit"]
    num = len(reading.label)
    chance = float(np.bincount(reading.label).max() / num)
    sums = reading.per_document(np.ones(num), before, after, before * (1 - after), (1 - before) * after, (1 - before) * (1 - after))

    def share(column: int) -> Estimate:
        return jackknife(sums, ratio(column, 0))

    def adjusted(column: int) -> Estimate:
        def statistic(s: Floats) -> Floats:
            lost, gained, never = (s[:, i] / s[:, 0] for i in (3, 4, 5))
            lucky = np.minimum(never * chance / (1 - chance), np.minimum(lost, gained))
            return np.asarray((s[:, column] / s[:, 0] - lucky) / (1 - chance), np.float64)

        return jackknife(sums, statistic)

    return Transitions(
        hits_before=share(1),
        hits_after=share(2),
        lost=share(3),
        gained=share(4),
        adjusted_lost=adjusted(3),
        adjusted_gained=adjusted(4),
        chance=chance,
    )


@dataclass(frozen=True)
class Bin:
    """Tokens of one confidence: the mean confidence in the top token, and how often it was right; None where there are none."""

    num_tokens: int
    confidence: float | None
    hits: float | None


@dataclass(frozen=True)
class Calibration:
    """Whether the probability of the top token is how often it is right.

    Args:
        overconfidence: mean confidence minus share of hits.
        expected_error: |confidence - hits| averaged over 15 equal bins of confidence (ECE), weighted by tokens.
        bins: those bins.
    """

    overconfidence: Estimate
    expected_error: Estimate
    bins: tuple[Bin, ...]


def calibration(reading: Reading) -> tuple[Calibration, Calibration]:
    """Before and after."""
    m = reading.measures
    return _calibration(reading, m["ref_confidence"], m["ref_hit"]), _calibration(reading, m["confidence"], m["hit"])


def _calibration(reading: Reading, confidence: Floats, hit: Floats) -> Calibration:
    group = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    sums = reading.per_group(group, NUM_BINS, np.ones(len(hit)), confidence, hit)
    total = sums.sum(axis=0)
    bins = tuple(Bin(int(n), float(c / n) if n else None, float(h / n) if n else None) for n, c, h in total)
    return Calibration(
        overconfidence=jackknife(sums, lambda s: (s[..., 1] - s[..., 2]).sum(axis=1) / s[..., 0].sum(axis=1)),
        expected_error=jackknife(sums, lambda s: np.abs(s[..., 1] - s[..., 2]).sum(axis=1) / s[..., 0].sum(axis=1)),
        bins=bins,
    )


def as_plain(value: object) -> object:
    """A dataclass of these as plain JSON values; nan becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
