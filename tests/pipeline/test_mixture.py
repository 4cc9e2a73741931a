from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_forget.errors import UserError
from mlx_forget.pipeline.mixture import Mixture, parse_share, permute, stream_key

SHARES = st.fractions(min_value=0, max_value=Fraction(999, 1000), max_denominator=10**9)


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, seed, epoch):
    out = permute(np.arange(size), size, stream_key(seed, 3, epoch))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permutations_of_different_keys_look_independent():
    size = 10_000
    one, two = (permute(np.arange(size), size, stream_key(0, 3, epoch)) for epoch in (0, 1))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.05
    assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.05
    assert (one == two).mean() < 0.01


def test_neighbours_land_everywhere():
    size = 4096
    gaps = np.diff(permute(np.arange(size), size, stream_key(7, 3)))
    assert np.abs(gaps).mean() == pytest.approx(size / 3, rel=0.1)


@given(p=SHARES, seed=st.integers(0, 2**31), start=st.integers(0, 10**9), length=st.integers(1, 400))
@settings(max_examples=150, deadline=None)
def test_every_prefix_holds_within_one_of_p_times_its_length(p, seed, start, length):
    mixture = Mixture(100, 10**10, p, seed)
    source, _ = mixture.rows(start, start + length)
    counts = mixture.num_pretrain_before(start) + np.cumsum(source)
    lengths = np.arange(start + 1, start + length + 1)
    for count, n in zip(counts.tolist(), lengths.tolist(), strict=True):
        assert abs(count - p * n) < 1


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
@given(
    p=SHARES,
    seed=st.integers(0, 99),
    batch=st.integers(1, 64),
    step=st.integers(0, 300),
    rows=st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_a_batch_computed_directly_is_the_batch_of_the_whole_stream(mode, p, seed, batch, step, rows):
    mixture = Mixture(rows, 10**6, p, seed, mode)
    whole_source, whole_rows = mixture.rows(0, (step + 1) * batch)
    source, row = mixture.rows(step * batch, (step + 1) * batch)
    assert np.array_equal(source, whole_source[step * batch :])
    assert np.array_equal(row, whole_rows[step * batch :])


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_target_rows_come_once_per_epoch_in_a_new_order(mode):
    source, row = Mixture(97, 10_000, Fraction(1, 7), 5, mode).rows(0, 600)
    target = row[source == 0]
    epochs = [target[i * 97 : (i + 1) * 97] for i in range(5)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(97))
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_pretraining_rows_never_repeat(mode):
    source, row = Mixture(10, 1000, Fraction(1, 2), 5, mode).rows(0, 1900)
    injected = row[source == 1]
    assert len(set(injected)) == len(injected) > 900


def test_bernoulli_draws_are_about_p_across_blocks():
    mixture = Mixture(10, 10**9, Fraction(1, 20), 1, "bernoulli")
    assert mixture.num_pretrain_before(200_000) == pytest.approx(10_000, rel=0.05)
    source, _ = mixture.rows(65_000, 66_000)
    assert mixture.num_pretrain_before(66_000) == mixture.num_pretrain_before(65_000) + source.sum()


def test_the_seed_changes_the_order_and_nothing_else_does():
    rows = [Mixture(500, 500, Fraction(1, 10), seed).rows(0, 400)[1] for seed in (0, 0, 1)]
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


def test_too_small_a_pool_says_by_how_much():
    mixture = Mixture(100, 10, Fraction(1, 10), 0)
    mixture.check_pool(100, 128)
    with pytest.raises(UserError, match="needs 20 of 128 tokens and the pool holds 10, 1,280 tokens too few"):
        mixture.check_pool(200, 128)


@pytest.mark.parametrize(
    "text, share",
    [
        ("1%", Fraction(1, 100)),
        (0.01, Fraction(1, 100)),
        ("0.1%", Fraction(1, 1000)),
        ("1/128", Fraction(1, 128)),
        (0, 0),
    ],
)
def test_shares_are_read_exactly(text, share):
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["1", "100%", "-0.1", "much", "", "nan", "1/0"])
def test_shares_outside_the_range_are_refused(text):
    with pytest.raises(UserError, match="p must"):
        parse_share(text)


def test_rows_are_counted_at_once_however_far_along():
    mixture = Mixture(781, 90_000, Fraction(1, 3), 0)
    assert mixture.mode == "exact"
    assert mixture.num_pretrain_before(3 * 10**12) == 10**12


def test_the_stream_is_the_one_that_published_results_were_made_with():
    exact, drawn = (Mixture(16, 40, Fraction(1, 3), 5, mode).rows(0, 16) for mode in ("exact", "bernoulli"))
    assert exact[0].tolist() == [1, 0, 0] * 5 + [1]
    assert exact[1].tolist() == [5, 3, 5, 30, 8, 10, 23, 0, 2, 29, 9, 1, 25, 11, 4, 37]
    assert drawn[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0]
    assert drawn[1].tolist() == [3, 5, 8, 10, 0, 2, 5, 9, 1, 30, 11, 23, 4, 6, 13, 7]
    assert permute(np.arange(5), 5, stream_key(5, 3)).tolist() == [3, 2, 1, 4, 0]
    assert stream_key(7, 2, np.array([0, 1])).tolist() == [2891354267581229779, 3504140368283877498]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 65])
def test_rows_that_are_drawn_together_are_those_that_are_drawn_one_by_one(size):
    key = stream_key(3, 4)
    together = permute(np.tile(np.arange(size), 20), size, key)
    assert together.tolist() == [int(permute(np.array([row]), size, key)[0]) for row in range(size)] * 20
