"""What is left out: repetitions, and near-copies of what is held out."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_forget.pipeline import filters
from mlx_forget.pipeline.filters import Filter, HeldOut, SeenHashes


def words(seed, count=300):
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


@given(values=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 60), max_size=400))
@settings(max_examples=60, deadline=None)
def test_seen_hashes_are_a_set(values):
    filters._MIN_MERGE, before = 7, filters._MIN_MERGE
    try:
        seen, known = SeenHashes(), set()
        for value in values:
            assert seen.add(value) == (value not in known)
            known.add(value)
    finally:
        filters._MIN_MERGE = before


def test_near_copies_are_found_in_both_directions():
    held_out = HeldOut([" ".join(words(i)) for i in range(20)])
    assert not held_out.is_copied_in(" ".join(words(99)))
    changed = words(3)
    for i in range(0, len(changed), 25):
        changed[i] = "changed"
    assert held_out.is_copied_in(" ".join(changed))
    quoting = words(100, 5000) + words(7) + words(101, 5000)
    assert held_out.is_copied_in(" ".join(quoting))
    assert not held_out.is_copied_in(" ".join(words(100, 5000) + words(7)[:60]))
    assert not held_out.is_copied_in("")


def test_nothing_is_a_copy_of_nothing():
    assert not HeldOut([]).is_copied_in(" ".join(words(0)))


def test_what_is_left_out_is_counted_by_reason():
    keep = Filter(min_chars=5, max_chars=3000, once=True, held_out=HeldOut([" ".join(words(0))]))
    texts = ["hi", "x" * 4000, "a plain text", "a plain text", " ".join(words(0))]
    assert [keep.keeps(text, hash(text) % 2**64) for text in texts] == [False, False, True, False, False]
    assert keep.dropped == {"too short": 1, "too long": 1, "repeated": 1, "near-copy of held-out text": 1}
    keep.restart()
    assert keep.keeps("a plain text", hash("a plain text") % 2**64)
    assert np.sum(list(keep.dropped.values())) == 0
