"""Self-generated replay: the store that holds its rows, and the rows that are written while a run trains."""

import json

import numpy as np
import pytest

from mlx_forget import checkpoint
from mlx_forget.backends import load_backend
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.ladder import model_spec
from mlx_forget.pipeline.sides import RowSubset
from mlx_forget.pipeline.store import open_store
from mlx_forget.pipeline.tokenizer import BOS, EOS, train_tokenizer
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.replay.online import OnlineReplay
from mlx_forget.replay.sampled_store import origin_note, sample_store
from mlx_forget.replay.sampling import SampleSpec, sample_rows, uniforms
from mlx_forget.token_counts import parse_tokens
from mlx_forget.trainer import Batch
from tests.fakes import BigramTrainer
from tests.pipeline.test_store import make_store
from tests.replay.test_sampling import NETWORKS, SMALL, backend, trainer_of  # noqa: F401


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


def test_ids_that_only_the_model_has_are_not_sampled(tmp_path, tokenizer):
    """As of Qwen 2.5, whose table of embeddings is longer than its tokenizer: the store could not be read."""
    shape = model_spec("1x32", vocab_size=1024, context_length=16)
    trainer = trainer_of(BigramTrainer, shape)
    checkpoint.save_checkpoint(tmp_path / "wide", trainer, shape, tokenizer, {"run_id": "wide"}, with_training_state=False)
    found = checkpoint.open_checkpoint(tmp_path / "wide")
    num_ids = load_vocabulary(tokenizer).vocab_size
    store = write((trainer, found), tmp_path / "s", spec={"num_ids": num_ids})
    out = np.empty((600, 17), np.int32)
    store.split("train").read_rows(np.arange(600), out)
    assert num_ids < shape.vocab_size
    assert out.max() == num_ids - 1


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


def test_the_provenance_is_plain_json(start, tmp_path):
    write(start, tmp_path / "s", 16 * 20)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["provenance"]["entropy_nats"] == pytest.approx(5.6, abs=0.2)


def test_online_rows_are_those_of_the_sample_whatever_the_step_and_rank(backend):  # noqa: F811
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
