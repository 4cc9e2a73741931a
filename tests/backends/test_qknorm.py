"""The ladder's second architecture on every backend: against NumPy, against each other, and as whole runs."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.errors import UserError
from mlx_forget.ladder import (
    decays,
    default_context,
    hf_config,
    initial_weights,
    model_spec,
    num_non_embedding_params,
    num_params,
    param_shapes,
    spec_from_hf_config,
)
from mlx_forget.methods import method_spec
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, TrainerSpec
from tests.reference import QKNorm, softmax

SPEC = model_spec("qknorm-2x32", vocab_size=61, context_length=12)
GRADIENT_STEP = OptimSpec(beta1=0.0, beta2=0.0, epsilon=1e6, weight_decay=0.0, max_grad_norm=0.0)
BOTH = pytest.mark.skipif(len(available_backends()) < 2, reason="needs both backends")


@pytest.fixture(params=available_backends())
def backend(request):
    return load_backend(request.param)


def trainer_of(backend, *, optim=None, method=None, **runtime):
    spec = {"optim": optim or OptimSpec(), **({} if method is None else {"method": method})}
    return backend(TrainerSpec(model=SPEC, runtime=RuntimeSpec(device="cpu", num_threads=1, **runtime), seed=3, **spec))


def make_batch(seed, rows=5, *, segment=False, term=None):
    rng = np.random.default_rng(seed)
    return Batch(
        tokens=rng.integers(0, 61, (rows, 13)).astype(np.int32),
        loss_mask=(rng.random((rows, 12)) < 0.8).astype(np.uint8),
        segment=np.sort(rng.integers(0, 3, (rows, 12)), axis=1).astype(np.int32) if segment else None,
        term=np.zeros(rows, np.uint8) if term is None else np.array(term, np.uint8),
        source=np.zeros(rows, np.uint8),
    )


def saved(trainer, folder, name="w"):
    trainer.save(folder / f"{name}.safetensors")
    return load_file(folder / f"{name}.safetensors")


def start():
    return dict(initial_weights(SPEC, 3))


def test_sizes_are_those_of_the_paper():
    published = {"6m": 5_767_168, "12m": 12_189_696, "21m": 20_971_520, "32m": 32_112_640, "46m": 45_613_056, "205m": 205_520_896}
    for size, counted in published.items():
        spec = model_spec(f"marek-{size}", vocab_size=4096, context_length=256)
        assert spec.head_dim == 64
        assert default_context(f"marek-{size}") == 256
        # They count one of the two embeddings.
        assert num_non_embedding_params(spec) == 12 * spec.num_layers * spec.width**2
        assert num_params(spec) - 4096 * spec.width == counted


def test_weights_start_with_a_variance_of_one_over_their_inputs():
    spec = model_spec("marek-6m", vocab_size=512, context_length=256)
    for name, value in initial_weights(spec, 0):
        assert decays(name)
        inputs = value.shape[1] if "embed" in name else value.shape[0]
        assert value.std() * inputs**0.5 == pytest.approx(1, rel=0.02), name


@pytest.mark.parametrize("segment", [False, True])
def test_forward_matches_numpy(backend, segment):
    batch = make_batch(0, segment=segment)
    expected = QKNorm(start(), SPEC).losses(batch.tokens, batch.segment)
    np.testing.assert_allclose(trainer_of(backend).token_losses(batch.tokens, batch.segment), expected, atol=2e-5)


@pytest.mark.parametrize("segment", [False, True])
def test_the_gradient_is_the_slope_of_the_loss(backend, tmp_path, segment):
    """A gradient step shows the gradient; along random directions it is the slope of NumPy's loss in float64."""
    batch = make_batch(1, segment=segment)
    trainer = trainer_of(backend, optim=GRADIENT_STEP)
    trainer.train_step(batch, 1e6).read()
    before, after = start(), saved(trainer, tmp_path)
    share = batch.loss_mask / batch.loss_mask.sum()

    def loss(weights):
        return (QKNorm(weights, SPEC).losses(batch.tokens, batch.segment) * share).sum()

    rng = np.random.default_rng(0)
    for name in before:
        direction = rng.normal(size=before[name].shape)
        moved = [before | {name: before[name] + sign * 1e-4 * direction} for sign in (1, -1)]
        slope = (loss(moved[0]) - loss(moved[1])) / 2e-4
        found = ((before[name].astype(np.float64) - after[name]) * direction).sum()
        assert found == pytest.approx(slope, rel=2e-3, abs=2e-5), name


@BOTH
@pytest.mark.parametrize("method", [None, "lwf"])
def test_backends_stay_together(method):
    trainers = [trainer_of(load_backend(own), method=None if method is None else method_spec(method)) for own in ("cuda", "mlx")]
    for trainer in trainers:
        if method is not None:
            trainer.set_reference("start")
    worst = 0.0
    for step in range(50):
        left, right = (one.train_step(make_batch(step), 3e-3).read() for one in trainers)
        worst = max(worst, np.abs(left.loss_sums - right.loss_sums).max() / left.counts[0, 0])
    assert worst <= 1e-3
    trainers[0].set_reference("start"), trainers[1].set_reference("start")
    probe = make_batch(99)
    comparisons = [one.compare(probe.tokens, probe.loss_mask) for one in trainers]
    np.testing.assert_allclose(comparisons[0].nll, comparisons[1].nll, atol=1e-3)


def test_a_sample_follows_the_distribution_that_numpy_computes(backend):
    """Through the cache of keys and values: every token is the one that its uniform picks from the whole forward pass."""
    u = np.random.default_rng(0).random((3, 9))
    prompts = np.array([[1, 5, 9], [1, 7, 3], [2, 2, 2]], np.int32)
    out = trainer_of(backend).sample(prompts, u)
    model = QKNorm(start(), SPEC)
    rows = np.concatenate([prompts, out], axis=1)
    cumulative = softmax(model.logits(rows[:, :-1])).cumsum(-1)[:, 2:]
    for row in range(3):
        for t in range(9):
            upper = cumulative[row, t, out[row, t]]
            lower = 0.0 if out[row, t] == 0 else cumulative[row, t, out[row, t] - 1]
            assert lower - 1e-5 <= u[row, t] <= upper + 1e-5


def test_micro_batches_and_recomputed_activations_change_nothing(backend):
    plain, lean = trainer_of(backend), trainer_of(backend, micro_batch_size=2, grad_checkpoint=True)
    for step in range(3):
        left, right = (one.train_step(make_batch(step), 1e-2).read() for one in (plain, lean))
        assert left.loss_sums.sum() == pytest.approx(right.loss_sums.sum(), rel=1e-5)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-4)


def test_bf16_stays_near_fp32(backend):
    exact, narrow = trainer_of(backend), trainer_of(backend, precision="bf16")
    for step in range(5):
        left, right = (one.train_step(make_batch(step), 3e-3).read() for one in (exact, narrow))
        assert left.loss_sums.sum() / 60 == pytest.approx(right.loss_sums.sum() / 60, abs=0.03)


def test_a_checkpoint_says_what_it_is():
    assert spec_from_hf_config(json.loads(json.dumps(hf_config(SPEC, bos_token_id=1, eos_token_id=2)))) == SPEC
    gpt2 = model_spec("2x32", 61, 12)
    assert spec_from_hf_config(hf_config(gpt2, bos_token_id=1, eos_token_id=2)) == gpt2
    assert set(param_shapes(gpt2)).isdisjoint(param_shapes(SPEC))


def test_a_wrong_name_is_refused():
    for name in ("marek-7m", "qknorm-4x", "qknorm-0x64"):
        with pytest.raises(UserError, match=r"Unknown model size|Model shape"):
            model_spec(name, 61, 12)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full if i else ()) for i, n in enumerate(available_backends())])
def test_a_whole_run_is_pretrained_finetuned_sampled_and_audited(name, tmp_path, run_forget):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    own = ("--backend", name, "--iters", "12", "--steps-per-eval", "6")
    pretraining = (
        "--init",
        "scratch",
        "--target",
        "prose",
        "--pretrain",
        "none",
        "--model",
        "qknorm-2x32",
        "--max-seq-length",
        "64",
    )
    assert run_forget("train", *own, *pretraining, "--output", base)[0] == 0
    method = ("--method", "kl-replay", "--replay-data", "online")
    code, _, err = run_forget("train", *own, "--init", base, "--target", "code", *method, "--output", tuned)
    assert code == 0, err
    record = json.loads((tuned / "record.json").read_text())
    assert record["num_params"] == num_params(model_spec("qknorm-2x32", 512, 64))
    code, _, err = run_forget("audit", base, tuned, "--json", "--output", tmp_path / "audit")
    assert code == 0, err
    assert "qknorm" in json.dumps(json.loads((base / "checkpoints" / "last" / "config.json").read_text()))
