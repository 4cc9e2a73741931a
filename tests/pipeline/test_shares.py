"""Shares are exact in every prefix: schedules of p, any number of sources, and what that gives in batches."""

import hashlib
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_forget.errors import UserError
from mlx_forget.pipeline.mixture import Member, Mixture
from mlx_forget.pipeline.shares import (
    ShareSchedule,
    Split,
    constant_share,
    describe_share,
    parse_share,
    parse_sources,
    parse_stages,
)
from mlx_forget.training.data import sources_of

PARTS = st.fractions(min_value=0, max_value=Fraction(999, 1000), max_denominator=1000)


@st.composite
def stage_texts(draw):
    ends = sorted(draw(st.sets(st.integers(1, 99), max_size=3)))
    texts = []
    for end in [*ends, None]:
        first, last = draw(PARTS), draw(PARTS)
        shares = f"{first}..{last}" if draw(st.booleans()) else f"{first}"
        texts.append(shares + (f" until {end}%" if end else ""))
    return ", ".join(texts)


def brute(stages, num_rows, position):
    """The integral of p, row by row at the middle of each: exact for straight lines."""
    total, start = Fraction(0), 0
    for stage in stages:
        stop = int(stage.until * num_rows)
        for k in range(start, min(stop, position)):
            total += stage.first + (stage.last - stage.first) * (Fraction(2 * (k - start) + 1) / (2 * max(1, stop - start)))
        start = stop
    return total + max(0, position - num_rows) * stages[-1].last


def integral(stages, num_rows, position):
    """The same stage by stage, for schedules of any length."""
    total, start = Fraction(0), 0
    for stage in stages:
        stop = int(stage.until * num_rows)
        count = max(0, min(stop, position) - start)
        total += stage.first * count + (stage.last - stage.first) * Fraction(count**2, 2 * max(1, stop - start))
        start = stop
    return total + max(0, position - num_rows) * stages[-1].last


@given(text=stage_texts(), num_rows=st.integers(1, 300), position=st.integers(0, 400), phase=st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_a_schedule_serves_the_whole_part_of_its_integral_and_phase(text, num_rows, position, phase):
    stages = parse_stages(text)
    exact = brute(stages, num_rows, position)
    assert integral(stages, num_rows, position) == exact
    assert ShareSchedule(stages, num_rows).before([position], phase) == [floor(exact + Fraction(phase, 2**32))]


@given(
    text=stage_texts(), num_rows=st.integers(1, 10**9), seed=st.integers(0, 99), place=st.floats(0, 1), length=st.integers(1, 200)
)
@settings(max_examples=80, deadline=None)
def test_every_prefix_of_a_schedule_is_within_one_row(text, num_rows, seed, place, length):
    stages = parse_stages(text)
    mixture = Mixture(100, 10**12, ShareSchedule(stages, num_rows), seed)
    start = int(place * num_rows)
    source, _ = mixture.rows(start, start + length)
    counts = mixture.num_pretrain_before(start) + np.cumsum(source)
    for n, count in zip(range(start + 1, start + length + 1), counts.tolist(), strict=True):
        assert abs(count - integral(stages, num_rows, n)) < 1


def test_a_constant_schedule_serves_what_the_share_says():
    schedule = ShareSchedule(parse_stages("10%"), 1000)
    assert Mixture(10, 10**6, schedule, 0).num_pretrain_before(1000) == 100


def test_a_ramp_and_two_stages():
    ramp = Mixture(10, 10**6, ShareSchedule(parse_stages("0..50%"), 1000), 3)
    assert abs(ramp.num_pretrain_before(500) - 62.5) < 1
    assert abs(ramp.num_pretrain_before(1000) - 250) < 1
    stages = Mixture(10, 10**6, ShareSchedule(parse_stages("50% until 90%, 5%"), 1000), 3)
    assert abs(stages.num_pretrain_before(900) - 450) < 1
    assert abs(stages.num_pretrain_before(1000) - 455) < 1


@pytest.mark.parametrize(
    "text", ["5%, 1%", "5% until 1.2, 1%", "5% until 50%", "5% until 50%, 1% until 40%, 0", "1..2", "5% until x, 1%", "..5%", "a"]
)
def test_schedules_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="p "):
        parse_stages(text)


@pytest.mark.parametrize("text", ["1e-400000", "1e400000", "1E+999999999999%", "5% until 1e-99999, 1%"])
def test_a_share_as_long_as_its_exponent_is_refused_at_once(text):
    with pytest.raises(UserError, match="p "):
        parse_stages(text)


@pytest.mark.parametrize(
    "text, share", [("1%", Fraction(1, 100)), ("1/128", Fraction(1, 128)), ("0..5%", None), ("1% until 50%, 2%", None)]
)
def test_constant_shares_are_told_from_schedules(text, share):
    assert constant_share(text) == share


def test_one_schedule_has_one_spelling():
    assert describe_share("0.0..5%") == describe_share("0..0.05") != describe_share("0..0.06")
    assert describe_share("1%") == "1/100"


@given(
    weights=st.lists(st.integers(1, 1000), min_size=2, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 10**9),
    length=st.integers(1, 300),
)
@settings(max_examples=80, deadline=None)
def test_any_number_of_sources_keep_their_shares_in_every_prefix(weights, seed, start, length):
    shares = tuple(Fraction(weight, sum(weights)) for weight in weights)
    phases = tuple(int(x) for x in np.random.default_rng(seed).integers(0, 2**32, len(shares) - 1))
    split = Split(shares, phases)
    source, before = split.assign(np.arange(start, start + length))
    counts = np.array(split.counts_before(start))
    assert counts.sum() == start
    for k, (own, rank) in enumerate(zip(source.tolist(), before.tolist(), strict=True)):
        assert rank == counts[own]
        counts[own] += 1
        for share, count in zip(shares, counts.tolist(), strict=True):
            assert abs(count - share * (start + k + 1)) < 3
    assert counts.tolist() == split.counts_before(start + length)


def test_fractions_come_true_exactly_over_a_period():
    split = Split((Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)), (0, 0))
    assert split.counts_before(1000) == [500, 300, 200]


@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 40),
    step=st.integers(0, 60),
    text=st.sampled_from(["10%", "0..50%", "30% until 50%, 5%"]),
)
@settings(max_examples=40, deadline=None)
def test_many_sources_and_a_schedule_resume_at_any_row(seed, batch, step, text):
    targets = (Member(7, Fraction(1, 2)), Member(11, Fraction(1, 3)), Member(5, Fraction(1, 6)))
    pools = (Member(3000, Fraction(9, 10)), Member(400, Fraction(1, 10)))
    p = ShareSchedule(parse_stages(text), 2400)
    mixture = Mixture(23, 3400, p, seed, target=targets, pretrain=pools)
    source, rows = mixture.rows(0, (step + 1) * batch)
    again = mixture.rows(step * batch, (step + 1) * batch)
    assert np.array_equal(source[step * batch :], again[0])
    assert np.array_equal(rows[step * batch :], again[1])
    assert rows[source == 0].max(initial=0) < 23
    target_counts, pool_counts = mixture.counts_before((step + 1) * batch)
    for counts, side, sizes in ((target_counts, 0, (7, 11, 5)), (pool_counts, 1, (3000, 400))):
        edges = np.cumsum([0, *sizes])
        assert np.histogram(rows[source == side], edges)[0].tolist() == counts


def test_each_source_has_epochs_of_its_own():
    targets = (Member(7, Fraction(3, 4)), Member(50, Fraction(1, 4)))
    source, rows = Mixture(57, 0, Fraction(0), 1, target=targets).rows(0, 400)
    assert not source.any()
    small, large = rows[rows < 7], rows[rows >= 7]
    assert all(sorted(small[i * 7 : (i + 1) * 7]) == list(range(7)) for i in range(len(small) // 7))
    assert sorted(large[:50]) == list(range(7, 57))


def test_pretraining_rows_repeat_only_as_often_as_is_allowed():
    once = Mixture(10, 100, Fraction(1, 2), 0)
    once.check_pool(200, 8)
    with pytest.raises(UserError, match="never repeated"):
        once.check_pool(210, 8)
    thrice = Mixture(10, 100, Fraction(1, 2), 0, pretrain_epochs=3)
    thrice.check_pool(600, 8)
    source, rows = thrice.rows(0, 600)
    assert np.bincount(rows[source == 1]).tolist() == [3] * 100
    with pytest.raises(UserError, match="at most 3 times"):
        thrice.check_pool(610, 8)
    with pytest.raises(UserError, match="the pool holds 10,"):
        Mixture(9, 110, Fraction(1, 2), 0, pretrain=(Member(100, Fraction(1, 2)), Member(10, Fraction(1, 2)))).check_pool(60, 8)


def test_two_sources_are_served_as_ever():
    """The order of version 0.1.0: a change would change every published run."""
    digest = hashlib.sha256()
    for p, seed, mode in ((Fraction(1, 100), 0, "exact"), (Fraction(1, 20), 7, "exact"), (Fraction(1, 20), 7, "bernoulli")):
        source, rows = Mixture(781, 90_000, p, seed, mode).rows(0, 20_000)
        digest.update(source.tobytes() + rows.tobytes())
    assert digest.hexdigest() == "a1d8744962e4096efad2bdeb7ad74705ef6304b7fdf9288427125f218df13773"


def test_several_sources_of_a_side_are_served_as_ever():
    halves = (Member(5, Fraction(1, 2)), Member(7, Fraction(1, 2)))
    three = (Member(20, Fraction(5, 8)), Member(6, Fraction(1, 8)), Member(4, Fraction(1, 4)))
    _, rows = Mixture(12, 30, Fraction(1, 3), 5, target=halves, pretrain=three).rows(0, 24)
    assert rows.tolist() == [29, 3, 6, 5, 2, 8, 10, 1, 10, 20, 4, 7, 8, 0, 9, 28, 2, 5, 11, 3, 11, 12, 0, 9]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("prose", {"prose": 1}),
        ("prose=70%,cpp=0.3", {"prose": Fraction(7, 10), "cpp": Fraction(3, 10)}),
        ("a/b=1/3, c=2/3", {"a/b": Fraction(1, 3), "c": Fraction(2, 3)}),
    ],
)
def test_sources_and_their_shares_are_read(text, expected):
    assert parse_sources(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("year=2024/*.txt", {"year=2024/*.txt": 1}),
        ("texts/year=2024/month=1/a.txt", {"texts/year=2024/month=1/a.txt": 1}),
        ("a=1/3,c=2/3", {"a": Fraction(1, 3), "c": Fraction(2, 3)}),
        ("y=1/x.txt=50%,c=50%", {"y=1/x.txt": Fraction(1, 2), "c": Fraction(1, 2)}),
    ],
)
def test_a_path_may_have_folders_that_are_named_key_and_value(text, expected):
    assert sources_of(text) == expected


@pytest.mark.parametrize("text", ["a=50%,b=40%", "a=0,b=1", "a=x,b=1", "a=50%,a=50%", "=1"])
def test_shares_of_sources_that_do_not_add_up_are_refused(text):
    with pytest.raises(UserError, match=r"add up|Sources are|given twice"):
        parse_sources(text)


@pytest.mark.parametrize("text, words", [("a=50%,a=50%", "a is given twice"), ("a=1.5,b=1", "'a=1.5' is not")])
def test_what_is_wrong_with_sources_is_said(text, words):
    with pytest.raises(UserError, match=words):
        parse_sources(text)


def test_the_smallest_sources_are_joined_first_in_whatever_order_they_come():
    root = Split((Fraction(5, 8), Fraction(1, 8), Fraction(2, 8)), (0, 0))._tree()
    assert (root.right, root.left.left, root.left.right) == (0, 1, 2)
    assert (root.share, root.left.share) == (Fraction(3, 8), Fraction(1, 3))


def test_a_share_is_rounded_to_a_denominator_that_positions_can_be_multiplied_with():
    assert parse_share("0.12345678912345") == Fraction("0.12345678912345").limit_denominator(10**9)
    # A denominator of 2,023,766,921 would come closer.
    assert parse_share("0.123456789123") == Fraction(117306573, 950183249)
