import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_forget.errors import UserError
from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pipeline.mixture import Mixture, parse_share
from mlx_forget.pipeline.sides import RowSubset, read_masked
from mlx_forget.pipeline.store import StoreWriter, open_store


def make_store(folder, documents, *, vocab_size=300, tokens_per_shard=1 << 20, split="train"):
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = folder.parent / "t.model"
    tokenizer.write_bytes(b"model")
    writer = StoreWriter(folder, tokenizer, "hash", vocab_size, 1, 2, "test", tokens_per_shard=tokens_per_shard)
    for document in documents:
        writer.add(split, np.asarray(document), len(document))
    return writer.close()


def flat(documents):
    return np.concatenate([np.append(np.asarray(document, np.int32), 2) for document in documents]).astype(np.int32)


DOCUMENTS = st.lists(st.lists(st.integers(3, 299), max_size=40), min_size=1, max_size=30)


@given(documents=DOCUMENTS, row_length=st.integers(1, 20), tokens_per_shard=st.integers(41, 400))
@settings(max_examples=60, deadline=None)
def test_rows_are_bos_and_consecutive_tokens(tmp_path_factory, documents, row_length, tokens_per_shard):
    folder = tmp_path_factory.mktemp("s") / "store"
    split = make_store(folder, documents, tokens_per_shard=tokens_per_shard).split("train")
    shards, expected, pending = [], [], 0
    for document in documents:
        if pending + len(document) + 1 > tokens_per_shard:
            shards.append([])
            pending = 0
        if not shards:
            shards.append([])
        shards[-1].append(document)
        pending += len(document) + 1
    for shard in shards:
        tokens = flat(shard) if shard else np.zeros(0, np.int32)
        usable = len(tokens) // row_length * row_length
        expected.extend(tokens[:usable].reshape(-1, row_length))
    assert split.num_rows(row_length) == len(expected)
    if expected:
        rows = np.random.default_rng(0).permutation(len(expected))
        out = np.empty((len(rows), row_length + 1), np.int32)
        split.read_rows(rows, out)
        assert (out[:, 0] == 1).all()
        assert np.array_equal(out[:, 1:], np.array(expected)[rows])
    assert [split.document(i).tolist() for i in range(split.num_documents)] == documents


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_the_width_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    store = make_store(tmp_path / "store", [[3, 4]], vocab_size=vocab_size)
    assert store.split("train").tokens[0].dtype == dtype


def test_the_fingerprint_covers_content_only(tmp_path):
    same = [make_store(tmp_path / name / "store", [[3, 4], [5]]).fingerprint for name in ("a", "b")]
    other = make_store(tmp_path / "c" / "store", [[3, 4], [6]]).fingerprint
    assert same[0] == same[1] != other


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["train-00000.arrow", "train-00000.documents.arrow"])
def test_a_damaged_file_is_named_and_never_read(tmp_path, damage, name):
    make_store(tmp_path / "store", [list(range(3, 200))])
    path = tmp_path / "store" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.raises(UserError, match=name):
        open_store(tmp_path / "store")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    make_store(tmp_path / "store", [[3, 4]])
    (tmp_path / "store" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        open_store(tmp_path / "store")


def test_a_manifest_that_was_edited_or_is_newer_is_refused(tmp_path):
    make_store(tmp_path / "store", [[3, 4]])
    path = tmp_path / "store" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "bos_id": 5}))
    with pytest.raises(UserError, match=r"damaged \(its checksum"):
        open_store(tmp_path / "store")
    # Stores of earlier versions have no checksum of the manifest.
    del manifest["checksum"]
    path.write_text(json.dumps({**manifest, "bos_id": 5}))
    with pytest.raises(UserError, match="fingerprint"):
        open_store(tmp_path / "store")
    path.write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(UserError, match="schema 99"):
        open_store(tmp_path / "store")


def test_a_store_is_absent_until_it_is_whole_and_is_never_overwritten(tmp_path):
    tokenizer = tmp_path / "t.model"
    tokenizer.write_bytes(b"model")
    writer = StoreWriter(tmp_path / "store", tokenizer, "hash", 300, 1, 2, "test")
    writer.add("train", np.array([3]), 1)
    assert not (tmp_path / "store").exists()
    writer.close()
    with pytest.raises(UserError, match="exists already"):
        StoreWriter(tmp_path / "store", tokenizer, "hash", 300, 1, 2, "test")


def stream_of(tmp_path, p, *, batch_size=6, num_steps=40):
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 299, 50) for _ in range(60)]
    target = RowSubset.of_tokens(make_store(tmp_path / "t" / "store", documents).split("train"), 8, 800)
    pool = RowSubset.of_tokens(make_store(tmp_path / "p" / "store", [299 - d + 3 for d in documents]).split("train"), 8, None)
    mixture = Mixture(target.num_rows, pool.num_rows, parse_share(p), 0)
    return BatchStream(target, pool, mixture, batch_size, num_steps)


def test_ranks_share_out_a_batch(tmp_path):
    stream = stream_of(tmp_path, "25%")
    whole = stream.batch(3)
    assert whole.tokens.shape == (6, 9)
    assert whole.tokens.dtype == np.int32
    for rank in range(4):
        part = stream.batch(3, rank=rank, world_size=4)
        assert np.array_equal(part.tokens, whole.tokens[rank::4])
        assert np.array_equal(part.source, whole.source[rank::4])


def test_batches_do_not_depend_on_the_order_in_which_they_are_asked(tmp_path):
    stream, again = (stream_of(tmp_path / name, "1/64", num_steps=2000) for name in "ab")
    forward = [stream.batch(step).tokens for step in (0, 1, 700, 1999)]
    backward = [again.batch(step).tokens for step in (1999, 700, 1, 0)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_a_batch_that_was_written_into_changes_no_other(tmp_path):
    stream, fresh = stream_of(tmp_path / "a", "30%"), stream_of(tmp_path / "b", "30%")
    for step in [*range(20), 7, 8, 8, 9, 10, 3]:
        batch = stream.batch(step)
        # Every batch is computed anew by a stream that has served no other.
        fresh._planned = fresh._block = None
        wanted = fresh.batch(step)
        assert np.array_equal(batch.tokens, wanted.tokens)
        assert np.array_equal(batch.loss_mask, wanted.loss_mask)
        assert np.array_equal(batch.source, wanted.source)
        assert all(array.flags.c_contiguous and array.flags.writeable for array in (batch.tokens, batch.loss_mask))
        batch.tokens[:] = batch.loss_mask[:] = batch.source[:] = 0


def test_smaller_target_subsets_are_prefixes_of_larger_ones(tmp_path):
    split = make_store(tmp_path / "store", [list(range(3, 200))] * 20).split("train")
    rows = []
    for tokens in (400, 1600):
        subset = RowSubset.of_tokens(split, 16, tokens)
        rows.append(read_masked(subset, np.arange(subset.num_rows))[0])
    assert len(rows[0]) * 16 == 400
    assert np.array_equal(rows[0], rows[1][: len(rows[0])])


def test_asking_for_more_tokens_than_there_are_says_by_how_many(tmp_path):
    split = make_store(tmp_path / "store", [list(range(3, 200))]).split("train")
    with pytest.raises(UserError, match="too few"):
        RowSubset.of_tokens(split, 16, 10_000)
    with pytest.raises(UserError, match="smaller than one row"):
        RowSubset.of_tokens(split, 1000, None)
