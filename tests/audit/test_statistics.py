"""The intervals of an audit cover, and equal what theory gives where it gives something."""

import math

import numpy as np
import pytest

from mlx_forget.audit.answers import paired_rates
from mlx_forget.audit.statistics import jackknife, ratio, t_quantile


def test_the_jackknife_of_a_plain_mean_is_its_textbook_standard_error():
    values = np.random.default_rng(0).normal(size=40)
    found = jackknife(np.stack([values, np.ones(40)], axis=1), ratio(0, 1))
    assert found.value == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    assert found.high - found.value == pytest.approx(t_quantile(39) * found.stderr)
    assert found.half_width == pytest.approx(2.0227 * found.stderr, rel=1e-4)


def test_one_document_allows_no_standard_error():
    found = jackknife(np.array([[3.0, 2.0]]), ratio(0, 1))
    assert found.value == 1.5
    assert math.isnan(found.stderr)
    assert math.isnan(found.low)


def documents(random, count):
    """Sums (change, tokens) of documents whose lengths are skewed and whose tokens hang together, as real ones do."""
    tokens = np.ceil(random.lognormal(6.0, 1.0, count))
    level = random.normal(0.8, 0.25, count)
    return np.stack([tokens * level + random.normal(size=count) * np.sqrt(tokens) * 1.5, tokens], axis=1)


@pytest.mark.parametrize("size", [50, 200])
def test_intervals_over_resampled_sets_hold_the_full_difference(size):
    random = np.random.default_rng(5)
    full = documents(random, 4000)
    truth = full[:, 0].sum() / full[:, 1].sum()
    held = sum(
        found.low <= truth <= found.high
        for found in (jackknife(full[random.integers(0, len(full), size)], ratio(0, 1)) for _ in range(1000))
    )
    # Three standard deviations of a proportion of 1,000 draws around 95%, and the requirement's 92% to 98%.
    assert 920 <= held <= 980


def test_tokens_as_draws_would_not_cover():
    """Why documents are the draws: their tokens hang together."""
    random = np.random.default_rng(5)
    full = documents(random, 4000)
    truth = full[:, 0].sum() / full[:, 1].sum()
    held = 0
    for _ in range(300):
        chosen = full[random.integers(0, len(full), 100)]
        stderr = 1.5 / math.sqrt(chosen[:, 1].sum())
        held += abs(chosen[:, 0].sum() / chosen[:, 1].sum() - truth) <= 1.96 * stderr
    assert held < 0.7 * 300


def test_pairing_removes_what_both_readings_share():
    random = np.random.default_rng(1)
    before = random.normal(4, 1, 100)
    after = before + random.normal(0.1, 0.01, 100)
    sums = np.stack([np.ones(100), before, after], axis=1)
    paired = jackknife(sums, lambda s: (s[:, 2] - s[:, 1]) / s[:, 0])
    assert paired.stderr < 0.1 * jackknife(sums, ratio(2, 0)).stderr
    assert paired.low > 0


def test_flips_of_paired_answers():
    rates = paired_rates([1, 1, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0])
    assert (rates.before, rates.after, rates.lost, rates.gained) == (5 / 8, 2 / 8, 4, 1)
    # Five flips, at most one of them upwards: 2 (1 + 5) / 32.
    assert rates.p_value == pytest.approx(12 / 32)
    assert rates.change == pytest.approx(-3 / 8)
    same = paired_rates([1, 0], [1, 0])
    assert (same.p_value, same.stderr) == (1.0, 0.0)
