"""Replay rows in the batches of a run: between the rows of the task, by their sources' shares, with their masks."""

from fractions import Fraction

import numpy as np
import pytest

from mlx_forget.pipeline.batches import BatchStream, ReplayRows
from mlx_forget.pipeline.mixture import Mixture, parse_share, permute, stream_key
from mlx_forget.pipeline.sides import Blend, RowSubset, read_masked
from tests.pipeline.test_rows import split_of
from tests.pipeline.test_store import make_store


def make_stream(tmp_path, *, rows_per_step=3, pool=7):
    rng = np.random.default_rng(0)
    target, replay = (
        RowSubset.of_tokens(make_store(tmp_path / name / "s", [rng.integers(3, 300, rows * 8 - 1)]).split("train"), 8, None)
        for name, rows in (("target", 20), ("replay", pool))
    )
    mixture = Mixture(target.num_rows, 0, parse_share(0), 0)
    return BatchStream(target, None, mixture, 6, 50, ReplayRows(replay, rows_per_step, 2, seed=1))


def test_replay_rows_are_added_between_the_rows_of_the_task(tmp_path):
    stream = make_stream(tmp_path)
    batch = stream.batch(4)
    assert batch.tokens.shape == (9, 9)
    assert batch.term.tolist() == [0, 2, 0, 0, 2, 0, 0, 2, 0]
    assert (batch.source == (batch.term > 0)).all()
    stream.replay = None
    np.testing.assert_array_equal(batch.tokens[batch.term == 0], stream.batch(4).tokens)


def test_replay_rows_come_once_an_epoch_and_ranks_share_them(tmp_path):
    stream = make_stream(tmp_path)
    served = [tuple(row) for step in range(7) for row in stream.batch(step).tokens[stream.batch(step).term == 2].tolist()]
    epochs = [served[i * 7 : (i + 1) * 7] for i in range(3)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert epochs[0] != epochs[1]
    for step in range(4):
        whole = stream.batch(step).tokens.tolist()
        parts = [row for rank in range(3) for row in stream.batch(step, rank=rank, world_size=3).tokens.tolist()]
        assert sorted(parts) == sorted(whole)


def test_rows_of_one_source_are_those_they_always_were(tmp_path):
    replay = make_stream(tmp_path).replay
    tokens = np.concatenate([replay.read(step, rank=0, world_size=1)[0] for step in range(7)])
    order = [permute(np.arange(7), 7, stream_key(1, 6, epoch)) for epoch in range(3)]
    expected, _, _ = read_masked(replay.subset, np.concatenate(order))
    np.testing.assert_array_equal(tokens, expected)
    assert replay.tokens_before(2) == (6 * 8, 6 * 8)
    assert replay.tokens_before(7) == (21 * 8, 7 * 8), "three epochs of seven rows"


def test_several_sources_are_replayed_by_their_shares_whatever_their_sizes(tmp_path):
    """Tokens of the large source are below 100. Each source has epochs of its own."""
    rng = np.random.default_rng(0)
    members = tuple(
        RowSubset.of_tokens(make_store(tmp_path / name / "s", [rng.integers(low, low + 90, rows * 8 - 1)]).split("train"), 8, None)
        for name, rows, low in (("large", 90, 10), ("small", 9, 110))
    )
    replay = ReplayRows(Blend(members, (Fraction(1, 4), Fraction(3, 4))), 5, 1, seed=3)
    steps = [replay.read(step, rank=0, world_size=1)[0] for step in range(20)]
    served = np.concatenate(steps)
    from_small = served[:, 1] >= 100
    assert (abs(np.cumsum(from_small) - 0.75 * np.arange(1, 101)) <= 3).all()
    small = [tuple(row) for row in served[from_small].tolist()]
    assert all(len(set(small[i * 9 : (i + 1) * 9])) == 9 for i in range(8))
    assert small[:9] != small[9:18]
    assert len({tuple(row) for row in served[~from_small].tolist()}) == (~from_small).sum()
    for rank in range(3):
        np.testing.assert_array_equal(replay.read(13, rank=rank, world_size=3)[0], steps[13][rank::3])


@pytest.mark.parametrize("layout", ["packed", "documents", "padded"])
@pytest.mark.parametrize("target_layout", ["packed", "documents"])
def test_replay_rows_keep_their_masks_and_segments(tmp_path, layout, target_layout):
    documents = [([3 + (i * 7 + j) % 200 for j in range(3 + i % 9)], [int(j > 1) for j in range(4 + i % 9)]) for i in range(60)]
    target = RowSubset.of_tokens(split_of(tmp_path / "target", documents, masked=False), 8, None, layout=target_layout)
    pool = RowSubset.of_tokens(split_of(tmp_path / "pool", documents), 8, None, layout=layout)
    mixture = Mixture(target.num_rows, 0, parse_share(0), 0)
    stream = BatchStream(target, None, mixture, 6, 50, ReplayRows(pool, 4, 1, seed=1))
    batch = stream.batch(2)
    own = batch.term == 1
    tokens, loss_mask, segment = stream.replay.read(2, rank=0, world_size=1)
    np.testing.assert_array_equal(batch.tokens[own], tokens)
    np.testing.assert_array_equal(batch.loss_mask[own], loss_mask)
    assert 0 < loss_mask.sum() < loss_mask.size
    assert batch.loss_mask[~own].all()
    assert (segment is not None) == (layout == "documents")
    assert (batch.segment is not None) == ("documents" in (layout, target_layout))
    if batch.segment is not None:
        assert (batch.segment[own].max() > 0) == (layout == "documents")
        assert (batch.segment[~own].max() > 0) == (target_layout == "documents")
        assert batch.segment.dtype == np.int32
    for rank in range(3):
        part = stream.batch(2, rank=rank, world_size=3)
        assert (part.segment is None) == (batch.segment is None)
        np.testing.assert_array_equal(part.loss_mask[part.term == 1], loss_mask[rank::3])
