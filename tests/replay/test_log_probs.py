"""Kept log-probabilities of a reference: the KL term is that of a live one, to a stated error, and they are never those of another."""

import json

import numpy as np
import pytest

from mlx_forget import checkpoint
from mlx_forget.backends import available_backends, load_backend
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.ladder import initial_weights
from mlx_forget.methods import MethodSpec
from mlx_forget.pipeline.batches import ReplayRows
from mlx_forget.pipeline.reference_rows import ReferenceRows, parse_kind, row_bytes
from mlx_forget.pipeline.sides import RowSubset, read_masked
from mlx_forget.replay.log_probs import BlendedLogProbs, keep_log_probs
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, TrainerSpec
from tests.fakes import BigramTrainer
from tests.reference import GPT2, softmax
from tests.replay.test_replay import MODEL, Said, start, tokenizer  # noqa: F401
from tests.replay.test_replay_terms import SPEC, weights_of

NETWORKS = available_backends()
ONLY_KL = MethodSpec(name="kl-replay", coefficients=(0.0, 0.0, 3.0), reference="start")
KL_REPLAY = MethodSpec(name="kl-replay", coefficients=(1.0, 0.0, 0.7), reference="start")
KINDS = (None, 7, SPEC.vocab_size - 1)


@pytest.fixture(params=["fake", *NETWORKS])
def backend(request):
    return BigramTrainer if request.param == "fake" else load_backend(request.param)


def trainer_of(backend, method=KL_REPLAY, *, seed=0, optim=None, **runtime):
    return backend(TrainerSpec(model=SPEC, method=method, optim=optim or OptimSpec(), runtime=RuntimeSpec(**runtime), seed=seed))


def make_batch(term=(0, 2, 0, 2, 2, 0, 2), seed=0, *, masked=True):
    rng, rows = np.random.default_rng(seed), len(term)
    mask = np.ones((rows, 16), np.uint8)
    if masked:
        # One KL row without a label, which backends leave out, and one with some.
        mask[3] = 0
        mask[4, 5:] = 0
    tokens = rng.integers(0, SPEC.vocab_size, (rows, 17)).astype(np.int32)
    return Batch(tokens, mask, None, np.asarray(term, np.uint8), (np.asarray(term) > 0).astype(np.uint8))


def with_reference(batch, trainer, top):
    kept = ReferenceRows.of(trainer.log_probs(batch.tokens[batch.term == 2]), top)
    return Batch(batch.tokens, batch.loss_mask, None, batch.term, batch.source, kept)


def moved(trainer, steps=5):
    """Away from the reference by some steps of the task."""
    batch = make_batch([0] * 4, 9, masked=False)
    for _ in range(steps):
        trainer.train_step(batch, 1e-2).read()
    return trainer


@pytest.mark.parametrize("top", KINDS)
def test_the_kl_of_a_model_with_what_it_said_itself_is_zero(backend, top):
    trainer = trainer_of(backend, ONLY_KL)
    reading = trainer.train_step(with_reference(make_batch(), trainer, top), 1e-3).read()
    assert reading.counts[2, 1] == 2 * 16 + 5
    assert abs(reading.loss_sums[2, 1]) / 37 < 2e-6
    assert reading.grad_norm < 3e-3, "what rounding to float16 leaves of gradients near 1"


@pytest.mark.parametrize("runtime", [{}, {"micro_batch_size": 2}], ids=["", "micro-batches"])
def test_a_kept_reference_gives_the_step_of_a_live_one(backend, runtime, tmp_path):
    steps = {}
    for name in ("live", "kept"):
        trainer = trainer_of(backend, **runtime)
        batch = with_reference(make_batch(), trainer, None)
        trainer.set_reference("start")
        moved(trainer)
        if name == "kept":
            trainer.set_reference(None)
        else:
            batch = make_batch()
        reading = trainer.train_step(batch, 1e-3).read()
        steps[name] = (reading, weights_of(trainer, tmp_path, name))
    (live, there), (kept, here) = steps["live"], steps["kept"]
    assert live.loss_sums[2, 1] > 0.01
    np.testing.assert_allclose(kept.loss_sums, live.loss_sums, rtol=2e-3, atol=2e-4)
    assert kept.grad_norm == pytest.approx(live.grad_norm, rel=2e-3)
    for key in there:
        np.testing.assert_allclose(here[key], there[key], atol=2e-4, err_msg=key)


@pytest.mark.parametrize("top", KINDS)
def test_the_kl_of_a_step_is_that_of_the_definition(backend, top):
    trainer = trainer_of(backend)
    batch = with_reference(make_batch(), trainer, top)
    trainer.set_reference("start")
    moved(trainer).set_reference(None)
    own = trainer.log_probs(batch.tokens[batch.term == 2])
    expected = (batch.reference.divergence(own) * batch.loss_mask[batch.term == 2]).sum()
    assert trainer.train_step(batch, 1e-3).read().loss_sums[2, 1] == pytest.approx(expected, rel=1e-4)


GRADIENT_STEP = OptimSpec(beta1=0.0, beta2=0.0, epsilon=1e6, weight_decay=0.0, max_grad_norm=0.0)


@pytest.mark.parametrize("top", [None, 7])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_is_the_finite_difference_of_the_definition(name, top, tmp_path):
    trainer = trainer_of(load_backend(name), optim=GRADIENT_STEP)
    batch = make_batch()
    kl, task = batch.term == 2, batch.term == 0
    reference = GPT2({key: value.astype(np.float64) for key, value in initial_weights(SPEC, 1)}, SPEC)
    said = np.log(softmax(reference.forward(batch.tokens[kl, :-1], None)[0])).astype(np.float32)
    batch = Batch(batch.tokens, batch.loss_mask, None, batch.term, batch.source, ReferenceRows.of(said, top))
    before = {key: value.astype(np.float64) for key, value in initial_weights(SPEC, 0)}
    trainer.train_step(batch, 1e6).read()
    gradient = {key: before[key] - value for key, value in weights_of(trainer, tmp_path).items()}

    def objective(weights):
        nll = GPT2(weights, SPEC).losses(batch.tokens[task], None)
        own = np.log(softmax(GPT2(weights, SPEC).forward(batch.tokens[kl, :-1], None)[0]))
        terms = ((nll, task, 1.0), (batch.reference.divergence(own), kl, 0.7))
        return sum(c * (loss * batch.loss_mask[rows]).sum() / batch.loss_mask[rows].sum() for loss, rows, c in terms)

    rng, step = np.random.default_rng(5), 1e-5
    for _ in range(2):
        direction = {key: rng.standard_normal(value.shape) for key, value in before.items()}
        ends = [objective({key: value + sign * step * direction[key] for key, value in before.items()}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert sum((gradient[key] * direction[key]).sum() for key in before) == pytest.approx(slope, abs=2e-3, rel=1e-3)


@pytest.mark.skipif(len(NETWORKS) < 2, reason="one backend has nothing to agree with")
def test_backends_give_the_same_log_probs_and_low_precision_follows():
    batch = make_batch()
    left, right = (trainer_of(load_backend(name)).log_probs(batch.tokens) for name in NETWORKS)
    np.testing.assert_allclose(left, right, atol=1e-5)
    np.testing.assert_allclose(np.exp(left, dtype=np.float64).sum(-1), 1, atol=1e-5)
    for name in NETWORKS:
        fast = trainer_of(load_backend(name), precision="bf16")
        reading = fast.train_step(with_reference(batch, fast, None), 1e-3).read()
        assert reading.loss_sums[2, 1] / 37 < 1e-3


def test_the_likeliest_tokens_bound_the_whole_divergence_from_below():
    rng = np.random.default_rng(0)
    reference, own = (np.log(softmax(rng.normal(0, 2, (3, 5, 40)))).astype(np.float32) for _ in range(2))
    whole = (np.exp(reference, dtype=np.float64) * (reference.astype(np.float64) - own)).sum(-1)
    found = {top: ReferenceRows.of(reference, top).divergence(own) for top in (1, 8, 39)}
    assert (found[1] <= found[8] + 1e-3).all()
    assert (found[8] <= whole + 1e-3).all()
    assert (found[8] < whole - 0.05).any()
    np.testing.assert_allclose(found[39], whole, atol=5e-3)
    np.testing.assert_allclose(ReferenceRows.of(reference, None).divergence(own), whole, atol=5e-3)


def test_float16_keeps_far_more_of_a_distribution_than_bf16_of_the_same_size():
    """The error that is stated: KL(reference || kept), for text-like entropies over 2,048 tokens."""
    rng = np.random.default_rng(0)
    exact = np.log(softmax(rng.normal(0, 3, (64, 2048))))

    def error(stored):
        stored = stored - np.log(np.exp(stored).sum(-1, keepdims=True))
        return float((np.exp(exact) * (exact - stored)).sum(-1).mean())

    bits = exact.astype(np.float32).view(np.uint32)
    bf16 = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)
    half = error(ReferenceRows.of(exact.astype(np.float32), None).log_probs.astype(np.float64))
    assert 0 <= half < 2e-7
    assert error(bf16) > 100 * half


# --- the files ---


def subset_of(start, tmp_path, rows=60, **changes):  # noqa: F811
    from tests.replay.test_replay import write

    return RowSubset.of_tokens(write(start, tmp_path / "store", 16 * rows, **changes).split("train"), 16, None)


def keep(subset, start, kind="full", **options):  # noqa: F811
    return keep_log_probs(subset, start[0], start[1], kind, backend="fake", precision="fp32", **options)


@pytest.mark.parametrize("kind", ["full", "top-5"])
def test_what_is_kept_is_what_the_model_says_and_is_computed_once(start, tmp_path, kind):  # noqa: F811
    subset, said = subset_of(start, tmp_path), Said()
    kept = keep(subset, start, kind, say=said)
    assert f"60 rows of store, {kind}" in said[0]
    index = np.array([3, 59, 0, 3])
    tokens, _, _ = read_masked(subset, index)
    expected = ReferenceRows.of(start[0].log_probs(tokens), parse_kind(kind))
    for part in ("log_probs", "top", "tail"):
        np.testing.assert_array_equal(getattr(kept.read(index), part), getattr(expected, part))
    assert kept.measured["num_tokens"] == 60 * 16
    assert 0 <= kept.measured["kl_of_kept_nats"] < 1e-5
    assert "nats per token, over 960 tokens" in kept.in_words()
    if kind == "top-5":
        assert kept.measured["tail_probability"] == pytest.approx(1 - 5 / 288, abs=0.01), "an untrained model"
    size = sum(path.stat().st_size - 128 for path in kept.folder.glob("*.npy"))
    assert size == 60 * row_bytes(kind, 16, 288)
    before = {path: path.stat().st_mtime_ns for path in kept.folder.iterdir()}
    fewer = RowSubset.of_tokens(subset.split, 16, 16 * 20)
    start[0].log_probs = None
    again = keep(fewer, start, kind, say=said)
    assert len(said) == 1
    np.testing.assert_array_equal(again.read(np.arange(20)).log_probs, kept.read(np.arange(20)).log_probs)
    assert {path: path.stat().st_mtime_ns for path in kept.folder.iterdir()} == before


def test_another_model_another_store_or_damaged_files_are_not_used(start, tmp_path):  # noqa: F811
    subset = subset_of(start, tmp_path)
    kept = keep(subset, start)
    state = {**start[1].state, "run_id": "second", "files": {**start[1].state["files"], checkpoint.WEIGHTS: "f" * 64}}
    other = keep(subset, (start[0], checkpoint.Checkpoint(start[1].folder, state)))
    assert other.folder != kept.folder
    assert kept.folder.parent == subset.split.folder / "log-probs"
    manifest = json.loads((kept.folder / "log_probs.json").read_text())
    assert manifest["model"]["run_id"] == "first"
    manifest["rows"]["tokens_sha256"] = "0"
    (kept.folder / "log_probs.json").write_text(json.dumps(manifest))
    said = Said()
    keep(subset, start, say=said)
    assert said, "of another store: computed again"
    values = np.load(kept.folder / "00000.log_probs.npy")
    values[0, 0, 0] += 1
    np.save(kept.folder / "00000.log_probs.npy", values)
    with pytest.raises(UserError, match=r"00000.log_probs.npy is damaged or missing: remove"):
        keep(subset, start)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_manifest_that_counts_other_rows_than_there_are_is_refused(start, tmp_path, sealed):  # noqa: F811
    subset = subset_of(start, tmp_path)
    path = keep(subset, start).folder / "log_probs.json"
    manifest = json.loads(path.read_text()) | {"num_rows": 10_000}
    path.write_text(json.dumps({key: value for key, value in manifest.items() if sealed or key != "checksum"}))
    with pytest.raises(UserError, match="is damaged: remove"):
        keep(subset, start)


def test_more_rows_are_added_and_a_killed_writer_goes_on(start, tmp_path, monkeypatch):  # noqa: F811
    from mlx_forget.replay import log_probs

    monkeypatch.setattr(log_probs, "_MAX_ROWS_PER_SHARD", 8)
    subset = subset_of(start, tmp_path)
    calls, real = [], start[0].log_probs

    def counted(tokens, segment=None, **options):
        calls.append(len(tokens))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(tokens, segment, **options)

    start[0].log_probs = counted
    with pytest.raises(KeyboardInterrupt):
        keep(subset, start)
    with pytest.raises(Interrupted, match="interrupted after 0 rows"):
        keep(subset, start, interrupted=lambda: 15)
    calls[:] = [0] * 10
    whole = keep(subset, start)
    assert len(calls) - 10 == 1 + 4, "the first again, whose error is stated, and those that were not whole"
    start[0].log_probs = real
    expected = ReferenceRows.of(real(read_masked(subset, np.arange(60))[0]), None)
    np.testing.assert_array_equal(whole.read(np.arange(60)).log_probs, expected.log_probs)


def test_no_room_is_said_before_anything_is_written(start, tmp_path, monkeypatch):  # noqa: F811
    import shutil

    subset = subset_of(start, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"take 0.000553 GB, and .* 1e-09 GB free: keep the likeliest tokens"):
        keep(subset, start)
    with pytest.raises(UserError, match="keep fewer than top-288, or full"):
        keep(subset, start, "top-288")


def test_rows_of_several_stores_are_read_by_their_numbers_in_the_blend(start, tmp_path):  # noqa: F811
    parts = []
    for name, rows in (("a", 10), ("b", 25)):
        (tmp_path / name).mkdir()
        parts.append(keep(subset_of(start, tmp_path / name, rows, spec={"seed": rows}), start, "top-5"))
    blend = BlendedLogProbs(tuple(parts))
    # A process of many may have no replay row.
    assert (
        blend.read(np.array([], int)).top.shape
        == parts[0].read(np.array([], int)).top.shape
        == (0, *parts[0].read(np.array([1])).top.shape[1:])
    )
    found = blend.read(np.array([12, 3, 34, 9]))
    for place, (part, row) in enumerate(((1, 2), (0, 3), (1, 24), (0, 9))):
        own = parts[part].read(np.array([row]))
        np.testing.assert_array_equal(found.top[place], own.top[0])
        np.testing.assert_array_equal(found.tail[place], own.tail[0])


def test_replay_rows_and_what_is_kept_of_them_stay_together_on_every_rank(start, tmp_path):  # noqa: F811
    subset = subset_of(start, tmp_path)
    replay = ReplayRows(subset, 6, 2, seed=1, reference=keep(subset, start))
    for step in (0, 13):
        for rank in range(2):
            tokens, _, _ = replay.read(step, rank=rank, world_size=2)
            kept = replay.read_reference(step, rank=rank, world_size=2)
            np.testing.assert_array_equal(kept.log_probs, ReferenceRows.of(start[0].log_probs(tokens), None).log_probs)
