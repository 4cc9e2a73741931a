"""Self-generated replay: rows that are functions of (weights, seed, row), their distribution, and the store that holds them."""

import hashlib
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mlx_forget import checkpoint
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.ladder import model_spec
from mlx_forget.pipeline.batches import BatchStream, ReplayRows
from mlx_forget.pipeline.mixture import Mixture, parse_share, permute, stream_key
from mlx_forget.pipeline.sides import Blend, RowSubset, read_masked
from mlx_forget.pipeline.store import open_store
from mlx_forget.pipeline.tokenizer import BOS, EOS, train_tokenizer
from mlx_forget.replay.online import OnlineReplay
from mlx_forget.replay.sampled_store import origin_note, sample_store
from mlx_forget.replay.sampling import SampleSpec, sample_rows, uniforms
from mlx_forget.token_counts import parse_tokens
from mlx_forget.trainer import Batch, RuntimeSpec, TrainerSpec, available_backends, load_backend
from tests.fakes import BigramTrainer
from tests.pipeline.test_rows import split_of
from tests.pipeline.test_store import make_store

NETWORKS = available_backends()
SMALL = model_spec("2x32", vocab_size=20, context_length=12)


@pytest.fixture(params=["fake", *NETWORKS])
def backend(request):
    return BigramTrainer if request.param == "fake" else load_backend(request.param)


def trainer_of(backend, spec=SMALL, seed=0):
    return backend(TrainerSpec(model=spec, runtime=RuntimeSpec(precision="fp32"), seed=seed))


def test_uniforms_depend_on_seed_row_and_position_alone():
    whole = uniforms(3, 0, 50, 40)
    assert ((whole >= 0) & (whole < 1)).all()
    np.testing.assert_array_equal(uniforms(3, 7, 5, 40), whole[7:12])
    np.testing.assert_array_equal(uniforms(3, 0, 50, 11), whole[:, :11])
    assert not (uniforms(4, 0, 50, 40) == whole).any()
    assert len(np.unique(whole)) == whole.size


def test_a_row_is_the_same_whatever_the_batch(backend):
    trainer = trainer_of(backend)
    whole = sample_rows(trainer, SampleSpec(num_tokens=1, length=12, seed=5, batch_size=64), 0, 23)
    for batch_size, first in ((1, 0), (5, 0), (4, 9)):
        spec = SampleSpec(num_tokens=1, length=12, seed=5, batch_size=batch_size)
        np.testing.assert_array_equal(sample_rows(trainer, spec, first, 23 - first), whole[first:])


@pytest.mark.skipif(len(NETWORKS) < 2, reason="one backend has nothing to agree with")
def test_backends_sample_the_same_tokens():
    spec = SampleSpec(num_tokens=1, length=12, seed=2, prompt=(7, 8))
    left, right = (sample_rows(trainer_of(load_backend(name)), spec, 0, 200) for name in NETWORKS)
    np.testing.assert_array_equal(left, right)
    assert (left[:, :2] == [7, 8]).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_models_probabilities(backend, temperature):
    """Chi-square of first and second tokens against exact probabilities, and of a wrong distribution, which must be seen."""
    trainer, num_rows, vocabulary = trainer_of(backend), 6000, np.arange(20, dtype=np.int32)
    if backend is BigramTrainer:
        trainer.weight *= 25

    def conditional(context):
        rows = np.array([[*context, token] for token in vocabulary], np.int32)
        probability = np.exp(-trainer.token_losses(rows)[:, -1].astype(np.float64) / temperature)
        return probability / probability.sum()

    first = conditional([BOS])
    second = sum(share * conditional([BOS, token]) for token, share in zip(vocabulary, first, strict=True))
    spec = SampleSpec(num_tokens=1, length=2, seed=1, temperature=temperature, batch_size=2000)
    rows = sample_rows(trainer, spec, 0, num_rows)
    for column, exact in ((0, first), (1, second)):
        counts = np.bincount(rows[:, column], minlength=20)
        assert stats.chisquare(counts, exact * num_rows).pvalue > 1e-4
        assert stats.chisquare(counts, np.full(20, num_rows / 20)).pvalue < 1e-6


def test_whole_rows_after_a_prompt_have_their_joint_probability(backend):
    """Chi-square over every continuation of three tokens: what is cached of earlier tokens is what the model would have seen."""
    spec, temperature, num_rows, V = model_spec("2x32", vocab_size=6, context_length=8), 0.5, 8000, 6
    trainer = trainer_of(backend, spec, seed=3)
    if backend is BigramTrainer:
        trainer.weight *= 25
    sampling = SampleSpec(num_tokens=1, length=5, seed=4, temperature=temperature, prompt=(4, 2), batch_size=997)
    rows = sample_rows(trainer, sampling, 0, num_rows)
    assert (rows[:, :2] == [4, 2]).all()
    tokens = np.stack(np.meshgrid(*[np.arange(V)] * 3, indexing="ij"), -1).reshape(-1, 3)
    prompts = np.tile(np.array([BOS, 4, 2]), (len(tokens), 1))
    nll = trainer.token_losses(np.concatenate([prompts, tokens], axis=1).astype(np.int32))[:, -3:].astype(np.float64)
    joint = np.ones((V, V, V))
    for place in range(3):
        conditional = np.exp(-nll[:, place].reshape(V, V, V) / temperature)
        own = conditional[(..., *[slice(1)] * (2 - place))]
        assert np.allclose(conditional, own, rtol=1e-4), "the loss of a token does not depend on those after it"
        joint *= own / own.sum(axis=place, keepdims=True)
    counts = np.bincount(rows[:, 2:] @ [V * V, V, 1], minlength=V**3)
    marginals = [joint.sum(axis=tuple({0, 1, 2} - {place})) for place in range(3)]
    independent = np.einsum("a,b,c->abc", *marginals)
    assert stats.chisquare(counts, joint.ravel() * num_rows).pvalue > 1e-4
    assert stats.chisquare(counts, independent.ravel() * num_rows).pvalue < 1e-6, (
        "tokens that did not depend on one another would be seen"
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_another_process_samples_the_same_rows(name):
    script = (
        "import hashlib\n"
        "from mlx_forget.replay.sampling import SampleSpec, sample_rows\n"
        "from tests.test_replay import SMALL, load_backend, trainer_of\n"
        f"trainer = trainer_of(load_backend({name!r}), seed=6)\n"
        "rows = sample_rows(trainer, SampleSpec(num_tokens=1, length=12, seed=9, batch_size=BATCH), 5, 60)\n"
        "print(hashlib.sha256(rows.tobytes()).hexdigest())\n"
    )
    there = subprocess.run(
        [sys.executable, "-c", script.replace("BATCH", "7")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    ).stdout.split()[-1]
    rows = sample_rows(trainer_of(load_backend(name), seed=6), SampleSpec(num_tokens=1, length=12, seed=9), 0, 65)[5:]
    assert there == hashlib.sha256(rows.tobytes()).hexdigest()


def test_online_rows_are_those_of_the_sample_whatever_the_step_and_rank(backend):
    """And of the frozen reference: training in between changes none."""
    trainer = trainer_of(backend)
    with pytest.raises(UserError, match="call set_reference first"):
        OnlineReplay(trainer, SampleSpec(num_tokens=1, length=12), 3, 2, 20).read(0, rank=0, world_size=1)
    spec = SampleSpec(num_tokens=1, length=12, seed=5, batch_size=7)
    expected = sample_rows(trainer, spec, 0, 30)
    trainer.set_reference("start")
    zeros = np.zeros(4, np.uint8)
    batch = Batch(np.tile(np.arange(13, dtype=np.int32), (4, 1)), np.ones((4, 12), np.uint8), None, zeros, zeros)
    for _ in range(5):
        trainer.train_step(batch, 0.1).read()
    said = Said()
    online = OnlineReplay(trainer, spec, rows_per_step=3, term=2, vocab_size=20, say=said)
    for step in (0, 1, 5, 2, 9):
        rows, loss_mask, segment = online.read(step, rank=0, world_size=1)
        assert loss_mask is segment is None, "every label of a sample counts, and its row is one"
        assert (rows[:, 0] == BOS).all()
        np.testing.assert_array_equal(rows[:, 1:], expected[step * 3 : step * 3 + 3])
        np.testing.assert_array_equal(online.read(step, rank=1, world_size=2)[0], rows[1::2])
    assert ["are noise: 2." in sentence or "are noise: 3." in sentence for sentence in said] == [True], (
        "said once, of an untrained model"
    )


# --- the store ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train_tokenizer(["some words to learn from, and more of them"] * 50, vocab_size=288).save(path)
    return path


MODEL = model_spec("1x32", vocab_size=288, context_length=16)


@pytest.fixture
def start(tmp_path, tokenizer):
    """A checkpoint of an untrained bigram, and its trainer."""
    trainer = trainer_of(BigramTrainer, MODEL)
    checkpoint.save_checkpoint(tmp_path / "start", trainer, MODEL, tokenizer, {"run_id": "first"}, with_training_state=False)
    return trainer, checkpoint.open_checkpoint(tmp_path / "start")


class Said(list):
    def __call__(self, sentence):
        self.append(sentence)


def write(start, folder, num_tokens=16 * 600, *, say=None, **changes):
    trainer, found = start
    spec = SampleSpec(num_tokens=num_tokens, length=16, **changes.pop("spec", {}))
    return sample_store(
        trainer, found, folder, spec, backend="fake", precision="fp32", say=Said() if say is None else say, **changes
    )


def test_a_sample_is_an_ordinary_store_of_whole_rows_with_its_origin(start, tmp_path):
    store = write(start, tmp_path / "s", 16 * 300, spec={"seed": 4})
    train = RowSubset.of_tokens(store.split("train"), 16, None)
    assert (train.num_rows, store.split("validation").num_rows(16)) == (300, 30)
    out = np.empty((300, 17), np.int32)
    store.split("train").read_rows(np.arange(300), out)
    expected = sample_rows(start[0], SampleSpec(num_tokens=1, length=16, seed=4), 0, 300)
    assert (out[:, 0] == BOS).all()
    np.testing.assert_array_equal(out[:, 1:], expected)
    last = expected[7][:-1] if expected[7][-1] == EOS else expected[7]
    assert store.split("train").document(7).tolist() == last.tolist()
    assert store.provenance["model"] == {"run_id": "first", "weights_sha256": start[1].state["files"]["model.safetensors"]}
    assert {key: store.provenance[key] for key in ("seed", "temperature", "length", "prompt")} == {
        "seed": 4, "temperature": 1.0, "length": 16, "prompt": [],
    }  # fmt: skip
    assert open_store(tmp_path / "s").fingerprint == store.fingerprint
    assert not list(tmp_path.glob(".s.samples"))


def test_larger_samples_begin_with_smaller_ones_and_validation_rows_are_others(start, tmp_path):
    small, large = (write(start, tmp_path / name, 16 * rows) for name, rows in (("small", 90), ("large", 700)))
    rows = [store.split("train").tokens[0][: 90 * 16] for store in (small, large)]
    np.testing.assert_array_equal(*rows)
    held_out = {tuple(row) for row in large.split("validation").tokens[0].reshape(-1, 16).tolist()}
    assert not held_out & {tuple(row) for row in large.split("train").tokens[0].reshape(-1, 16).tolist()}


def test_a_killed_sample_goes_on_where_it_was(start, tmp_path):
    straight = write(start, tmp_path / "straight")
    trainer, calls = start[0], []
    sample = trainer.sample

    def dies(prompts, u, **options):
        calls.append(len(prompts))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return sample(prompts, u, **options)

    trainer.sample = dies
    with pytest.raises(KeyboardInterrupt):
        write(start, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    shards = sorted((tmp_path / ".broken.samples").glob("*.npy"))
    assert [path.name for path in shards] == ["train-00000.npy"]
    before = sum(calls)
    again = write(start, tmp_path / "broken")
    assert again.fingerprint == straight.fingerprint
    assert sum(calls) - before == 600 - 256 + 60, "the whole shard is not sampled again"


def test_an_interrupted_sample_says_how_far_it_came(start, tmp_path):
    with pytest.raises(Interrupted, match="after 0 tokens; the same command goes on"):
        write(start, tmp_path / "s", interrupted=lambda: 15)


def test_shards_of_another_sample_or_damaged_ones_are_not_used(start, tmp_path):
    part = tmp_path / ".s.samples"
    straight = write(start, tmp_path / "straight")
    part.mkdir()
    (part / "samples.json").write_text("{}")
    np.save(part / "train-00000.npy", np.zeros((256, 16), np.int32))
    said = Said()
    assert write(start, tmp_path / "s", say=said).fingerprint == straight.fingerprint
    assert any("rows of another sample" in sentence for sentence in said)


def test_a_batch_that_does_not_fit_is_halved_and_the_rows_stay(start, tmp_path):
    trainer = start[0]
    straight = write(start, tmp_path / "straight", 16 * 50)
    sample = trainer.sample

    def small(prompts, u, **options):
        if len(prompts) > 10:
            raise MemoryError
        return sample(prompts, u, **options)

    trainer.sample, said = small, Said()
    assert write(start, tmp_path / "s", 16 * 50, say=said).fingerprint == straight.fingerprint
    assert said[0] == "50 rows at once do not fit into memory: sampling 25."
    fits = [f"{n} rows at once do not fit into memory: sampling {n // 2}." for n in (50, 25, 12)]
    assert [sentence for sentence in said if "fit" in sentence] == [
        *fits[:2],
        "12 rows at once do not fit into memory: sampling 6.",
    ]


def test_online_replay_halves_a_batch_once_says_so_and_changes_no_row(start):
    trainer = start[0]
    trainer.set_reference("start")
    spec = SampleSpec(num_tokens=1, length=16, seed=2, batch_size=12)
    expected = sample_rows(trainer, spec, 0, 36)
    sample, said, calls = trainer.sample, Said(), []

    def small(prompts, u, **options):
        calls.append(len(prompts))
        if len(prompts) > 7:
            raise MemoryError
        return sample(prompts, u, **options)

    trainer.sample = small
    online = OnlineReplay(trainer, spec, rows_per_step=4, term=2, vocab_size=288, say=said)
    rows = np.concatenate([online.read(step, rank=0, world_size=1)[0][:, 1:] for step in range(9)])
    np.testing.assert_array_equal(rows, expected)
    assert said[0] == "12 rows at once do not fit into memory: sampling 6."
    assert calls == [12] + [6] * 6, "tried once, not at every refill"
    trainer.sample = lambda prompts, u, **options: (_ for _ in ()).throw(MemoryError)
    with pytest.raises(UserError, match="One row does not fit into memory"):
        online.read(9, rank=0, world_size=1)


@pytest.mark.parametrize("name, error", [
    ("cuda", "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ("mlx", "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8 bytes."),
    ("mlx", "[malloc_or_wait] Unable to allocate 9 bytes."),
])  # fmt: skip
def test_what_a_framework_says_when_memory_is_out_is_understood(name, error, monkeypatch):
    if name not in NETWORKS:
        pytest.skip("not installed")
    trainer = trainer_of(load_backend(name))

    def fails(*arguments, **options):
        raise RuntimeError(error)

    monkeypatch.setattr(type(trainer._decoder), "sample", fails)
    ask = np.full((2, 1), BOS, np.int32), uniforms(0, 0, 2, 4)
    with pytest.raises(MemoryError, match="sampling 2 rows"):
        trainer.sample(*ask)
    error = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        trainer.sample(*ask)


def test_a_tokenizer_without_a_bos_says_what_rows_are_sampled_after(start, tmp_path):
    said = Said()
    write(start, tmp_path / "s", 16 * 20, say=said, spec={"bos_id": EOS, "eos_id": EOS})
    assert said[0] == f"The tokenizer has no BOS of its own: rows are sampled after '</s>' (id {EOS}), which also ends documents."
    assert not any("BOS" in sentence for sentence in _said_by(start, tmp_path / "t"))


def _said_by(start, folder):
    said = Said()
    write(start, folder, 16 * 20, say=said)
    return said


def test_a_collapsed_or_untrained_model_is_named_with_its_numbers(start, tmp_path):
    said = Said()
    write(start, tmp_path / "noise", 16 * 20, say=said)
    assert any("are noise: 5." in sentence for sentence in said)
    said, trainer = Said(), start[0]
    trainer.weight[:] = -50
    trainer.weight[np.arange(288), (np.arange(288) + 1) % 3 + 20] = 50
    write(start, tmp_path / "loop", 16 * 20, say=said)
    assert any("collapsed: 0.00 nats" in sentence for sentence in said)
    assert any("repeat themselves: 92% of their 4-grams" in sentence for sentence in said)


def test_a_store_of_another_model_is_named_and_used(start, tmp_path):
    store = write(start, tmp_path / "s", 16 * 20)
    assert origin_note(store, start[1]) is None
    state = {"run_id": "second", "files": {checkpoint.WEIGHTS: "other"}}
    note = origin_note(store, checkpoint.Checkpoint(tmp_path, state))
    assert "run first" in note
    assert "from second" in note
    assert origin_note(make_store(tmp_path / "m" / "text", [[3, 4, 5]]), start[1]) is None


@pytest.mark.parametrize(
    "text, number", [("2M", 2_000_000), ("300k", 300_000), ("1.5B", 1_500_000_000), ("2e6", 2_000_000), ("1,000", 1000)]
)
def test_numbers_of_tokens_are_read(text, number):
    assert parse_tokens(text) == number


@pytest.mark.parametrize("text", ["", "M", "-3", "2X", "0", "1.5", "1.2.3"])
def test_wrong_numbers_of_tokens_are_refused(text):
    with pytest.raises(UserError, match="300K or 2M"):
        parse_tokens(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"seed": -1}, "seed must lie"),
        ({"num_tokens": 0}, "num_tokens must be positive"),
        ({"prompt": (3,) * 16}, "nothing is left to sample"),
    ],
)
def test_wrong_samples_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SampleSpec(**{"num_tokens": 100, "length": 16, **changes})


# --- replay rows in batches ---


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


def test_the_provenance_is_plain_json(start, tmp_path):
    write(start, tmp_path / "s", 16 * 20)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["provenance"]["entropy_nats"] == pytest.approx(5.6, abs=0.2)
