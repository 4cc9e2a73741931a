"""Rows of every layout: no token lost or doubled, documents kept apart, exactly the labels that count."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_forget.distributed import ALONE
from mlx_forget.errors import UserError
from mlx_forget.evaluate import Estimate, Windows, estimate, window_losses
from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pipeline.mixture import Mixture
from mlx_forget.pipeline.rows import Rows
from mlx_forget.pipeline.sides import Blend, RowSubset, read_masked
from mlx_forget.pipeline.store import StoreWriter

BOS, EOS = 1, 2
# Documents as (tokens, mask with one more entry for EOS).
DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(3, 299), st.booleans()), max_size=30).flatmap(
        lambda pairs: st.tuples(st.just([t for t, _ in pairs]), st.just([int(m) for _, m in pairs]).map(lambda m: [*m, 1]))
    ),
    min_size=1,
    max_size=20,
)


def split_of(folder, documents, *, masked=True, tokens_per_shard=1 << 20):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t.model").write_bytes(b"model")
    writer = StoreWriter(folder / "store", folder / "t.model", "hash", 300, BOS, EOS, "test", tokens_per_shard=tokens_per_shard)
    for tokens, mask in documents:
        writer.add("train", np.array(tokens, np.int32), 1, loss_mask=np.array(mask, np.uint8) if masked else None)
    return writer.close().split("train")


def read_all(rows):
    num, length = rows.num_rows, rows.length
    tokens, mask, segment = (
        np.empty((num, length + 1), np.int32),
        np.empty((num, length), np.uint8),
        np.empty((num, length), np.int32),
    )
    rows.read(np.arange(num), tokens, mask, segment)
    return tokens, mask, segment


@given(documents=DOCUMENTS, length=st.integers(1, 12), tokens_per_shard=st.integers(31, 200))
@settings(max_examples=30, deadline=None)
def test_padded_rows_hold_every_label_once(tmp_path_factory, documents, length, tokens_per_shard):
    split = split_of(tmp_path_factory.mktemp("s"), documents, tokens_per_shard=tokens_per_shard)
    rows = Rows(split, length, "padded")
    tokens, mask, _ = read_all(rows)
    expected = []
    for ids, learn in documents:
        whole, keep = [*ids, EOS], learn
        for start in range(0, len(whole), length):
            part, kept = whole[start : start + length], keep[start : start + length]
            if any(kept):
                fill = length - len(part)
                expected.append(([BOS, *part, *[0] * fill], [*kept, *[0] * fill]))
    assert tokens.tolist() == [row for row, _ in expected]
    assert mask.tolist() == [kept for _, kept in expected]
    assert rows.num_useful(np.arange(rows.num_rows)).tolist() == mask.sum(axis=1).tolist()
    assert mask.sum() == sum(sum(learn) for _, learn in documents)


@given(documents=DOCUMENTS, length=st.integers(1, 12), tokens_per_shard=st.integers(31, 200))
@settings(max_examples=30, deadline=None)
def test_documents_are_kept_apart(tmp_path_factory, documents, length, tokens_per_shard):
    split = split_of(tmp_path_factory.mktemp("s"), documents, tokens_per_shard=tokens_per_shard)
    rows = Rows(split, length, "documents")
    tokens, mask, segment = read_all(rows)
    packed_tokens, packed_mask, none = read_all(Rows(split, length))
    assert np.array_equal(tokens, packed_tokens)
    assert np.array_equal(mask, packed_mask)
    assert not none.any()
    for row, own in zip(tokens, segment, strict=True):
        # The input at t opens the next document where it is the end of one.
        assert own.tolist() == np.cumsum([0, *(row[1:-1] == EOS)]).tolist()
    assert rows.num_useful(np.arange(rows.num_rows)).tolist() == mask.sum(axis=1).tolist()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_without_the_mask_everything_is_learnt(tmp_path, layout):
    documents = [([5, 6, 7, 8], [0, 0, 1, 1, 1]), ([9, 10], [0, 1, 1])]
    split = split_of(tmp_path, documents)
    _, mask, _ = read_all(Rows(split, 4, layout, mask_prompt=False))
    assert mask.sum() == 8
    assert not split_of(tmp_path / "plain", [(t, [1] * len(m)) for t, m in documents]).has_loss_mask


def test_a_layout_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"Unknown rows 'pack'. Did you mean 'packed'"):
        Rows(split_of(tmp_path, [([5], [1, 1])]), 4, "pack")


def chat(i, size):
    return ([3 + (i * 7 + j) % 200 for j in range(size)], [int(j >= size // 2) for j in range(size + 1)])


@pytest.fixture
def chats(tmp_path):
    return split_of(tmp_path / "chats", [chat(i, 4 + i % 23) for i in range(150)], tokens_per_shard=700)


@pytest.fixture
def text(tmp_path):
    return split_of(tmp_path / "text", [([5 + i % 200] * 40, [1] * 41) for i in range(80)], tokens_per_shard=900)


def test_padded_subsets_are_nested_and_count_tokens_to_learn(chats):
    subsets = [RowSubset.of_tokens(chats, 8, tokens, layout="padded") for tokens in (100, 400, None)]
    for subset, limit in zip(subsets, (100, 400, 10**9), strict=True):
        assert limit - 8 < subset.num_tokens <= limit or limit == 10**9
    places = [subset.place(np.arange(subset.num_rows)).tolist() for subset in subsets]
    assert places[1][: len(places[0])] == places[0]
    assert places[2][: len(places[1])] == places[1]
    with pytest.raises(UserError, match="too few"):
        RowSubset.of_tokens(chats, 8, 10**6, layout="padded")


@pytest.mark.parametrize("layout", ["packed", "documents", "padded"])
@pytest.mark.parametrize("blend", [False, True])
def test_a_stream_of_masked_rows_is_the_same_for_any_ranks_and_counts_exactly(chats, text, layout, blend):
    target = RowSubset.of_tokens(chats, 8, None, layout=layout)
    pool = RowSubset.of_tokens(text, 8, None, layout=layout)
    more = {}
    if blend:
        target = Blend((target, RowSubset.of_tokens(text, 8, 200, layout=layout)), (Fraction(2, 3), Fraction(1, 3)))
        more = {"target": target.mixture_members()}
    mixture = Mixture(target.num_rows, pool.num_rows, Fraction(1, 5), 3, **more)
    stream = BatchStream(target, pool, mixture, batch_size=6, num_steps=40)
    counted = np.zeros(2, int)
    for step in range(40):
        assert stream.tokens_before(step) == tuple(counted)
        assert tuple(map(sum, stream.tokens_of_sources(step))) == tuple(counted)
        batch = stream.batch(step)
        for source in (0, 1):
            counted[source] += batch.loss_mask[batch.source == source].sum()
        for world in (2, 4):
            for rank in range(world):
                part = stream.batch(step, rank=rank, world_size=world)
                assert np.array_equal(part.tokens, batch.tokens[rank::world])
                assert np.array_equal(part.loss_mask, batch.loss_mask[rank::world])
                assert (part.segment is None) == (batch.segment is None) == (layout != "documents")
                if part.segment is not None:
                    assert np.array_equal(part.segment, batch.segment[rank::world])
        assert (batch.loss_mask[batch.source == 1] == 1).all() or layout == "padded"
    again = BatchStream(target, pool, mixture, batch_size=6, num_steps=40).batch(31)
    assert np.array_equal(again.tokens, stream.batch(31).tokens)


def test_every_row_of_a_blend_is_one_of_its_member(chats, text):
    members = tuple(RowSubset.of_tokens(split, 8, None) for split in (chats, text))
    blend = Blend(members, (Fraction(1, 4), Fraction(3, 4)))
    out, _, _ = read_masked(blend, np.arange(blend.num_rows))
    expected = [read_masked(member, np.arange(member.num_rows))[0] for member in members]
    assert np.array_equal(out, np.concatenate(expected))
    windows = blend.window_ids(40)
    assert (windows < members[0].num_rows).sum() == 10
    assert len(set(windows.tolist())) == 40


class Ramp:
    """Losses that are the place in the row, and in the segment."""

    group = ALONE

    def token_losses(self, tokens, segment=None):
        place = np.broadcast_to(np.arange(1, tokens.shape[1], dtype=np.float32), (len(tokens), tokens.shape[1] - 1))
        return place if segment is None else place + 100 * segment


def test_windows_average_over_the_labels_that_count(chats):
    subset = RowSubset.of_tokens(chats, 8, None, layout="padded")
    windows = Windows.of("target", subset, 30)
    assert windows.loss_mask is not None
    expected = (Ramp().token_losses(windows.tokens) * windows.loss_mask).sum() / windows.loss_mask.sum()
    assert window_losses(Ramp(), windows).mean() == pytest.approx(expected)
    # Rows with many labels are no noise of the loss.
    constant = Ramp()
    constant.token_losses = lambda tokens, segment=None: np.full((len(tokens), tokens.shape[1] - 1), 3.0, np.float32)
    assert estimate(window_losses(constant, windows)) == Estimate(pytest.approx(3.0), pytest.approx(0.0, abs=1e-12))
    apart = Windows.of("target", RowSubset.of_tokens(chats, 8, None, layout="documents"), 30)
    losses = Ramp().token_losses(apart.tokens, apart.segment)
    assert window_losses(Ramp(), apart).mean() == pytest.approx((losses * apart.loss_mask).sum() / apart.loss_mask.sum())


@pytest.mark.parametrize("length", [3, 8])
def test_long_documents_go_on_end_or_are_left_out(chats, text, length):
    for split in (chats, text):
        documents = [
            (shard[a:b].astype(np.int32), split.loss_mask(number)[a:b])
            for number, shard in enumerate(split.tokens)
            for a, b in itertools.pairwise([*split.documents(number)[0].tolist(), len(shard)])
        ]
        kept = {
            "truncated": [(tokens[:length], mask[:length]) for tokens, mask in documents],
            "whole": [(tokens, mask) for tokens, mask in documents if len(tokens) <= length],
        }
        for layout, expected in kept.items():
            expected = [one for one in expected if one[1].any()]
            rows = Rows(split, length, layout)
            assert rows.num_long == sum(len(tokens) > length for tokens, _ in documents) > 0
            assert rows.num_rows == len(expected)
            assert rows.num_useful(np.arange(rows.num_rows)).tolist() == [int(mask.sum()) for _, mask in expected]
            tokens, mask = np.empty((rows.num_rows, length + 1), np.int32), np.empty((rows.num_rows, length), np.uint8)
            rows.read(np.arange(rows.num_rows), tokens, mask)
            for row, (own, learnt) in enumerate(expected):
                assert tokens[row, 1 : 1 + len(own)].tolist() == own.tolist()
                assert mask[row].tolist() == [*learnt.tolist(), *[0] * (length - len(own))]
