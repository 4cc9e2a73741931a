"""The network backends against NumPy float64: losses, gradients, twenty AdamW steps, and what must not change a result."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.ladder import decays, initial_weights, model_spec
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, TrainerSpec
from tests.reference import GPT2, AdamW

SPEC = model_spec("2x32", vocab_size=61, context_length=12)


@pytest.fixture(params=available_backends())
def backend(request):
    return load_backend(request.param)


def trainer_of(backend, *, optim=None, **runtime):
    return backend(TrainerSpec(model=SPEC, optim=optim or OptimSpec(), runtime=RuntimeSpec(**runtime), seed=3))


def make_batch(seed, rows=5, segment=False):
    rng = np.random.default_rng(seed)
    mask = (rng.random((rows, 12)) < 0.8).astype(np.uint8)
    return Batch(
        tokens=rng.integers(0, 61, (rows, 13)).astype(np.int32),
        loss_mask=mask,
        segment=np.sort(rng.integers(0, 3, (rows, 12)), axis=1).astype(np.int32) if segment else None,
        term=np.zeros(rows, np.uint8),
        source=np.zeros(rows, np.uint8),
    )


def saved(trainer, tmp_path):
    trainer.save(tmp_path / "w.safetensors")
    return load_file(tmp_path / "w.safetensors")


def start():
    return dict(initial_weights(SPEC, 3))


def token_weight(batch):
    return batch.loss_mask / batch.loss_mask.sum()


def test_forward_matches_numpy(backend):
    batch = make_batch(0)
    np.testing.assert_allclose(trainer_of(backend).token_losses(batch.tokens), GPT2(start(), SPEC).losses(batch.tokens), atol=2e-5)


def test_a_segment_reads_as_if_it_were_alone(backend):
    trainer, batch = trainer_of(backend), make_batch(2, segment=True)
    together = trainer.token_losses(batch.tokens, batch.segment)
    np.testing.assert_allclose(together, GPT2(start(), SPEC).losses(batch.tokens, batch.segment), atol=2e-5)
    for row, segment, losses in zip(batch.tokens, batch.segment, together, strict=True):
        for number in np.unique(segment):
            own = np.flatnonzero(segment == number)
            alone = trainer.token_losses(row[None, own[0] : own[-1] + 2])
            np.testing.assert_allclose(losses[own], alone[0], atol=1e-5)
    assert np.abs(together - trainer.token_losses(batch.tokens)).max() > 1e-3


@pytest.mark.parametrize("segment", [False, True])
def test_gradients_match_numpy(backend, tmp_path, segment):
    """One plain AdamW step with beta1 = 0 and huge epsilon is a gradient step: the weights show the gradient."""
    batch = make_batch(1, segment=segment)
    optim = OptimSpec(beta1=0.0, beta2=0.0, epsilon=1e6, weight_decay=0.0, max_grad_norm=0.0)
    trainer = trainer_of(backend, optim=optim)
    rate = 1e6
    reading = trainer.train_step(batch, rate).read()
    gradients = GPT2(start(), SPEC).gradients(batch.tokens, token_weight(batch), batch.segment)
    before, after = start(), saved(trainer, tmp_path)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(before[name] - after[name], gradient, atol=3e-6, err_msg=name)
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert reading.grad_norm == pytest.approx(norm, rel=1e-4)


def test_twenty_steps_match_numpy(backend, tmp_path):
    optim = OptimSpec(weight_decay=0.1, max_grad_norm=0.5)
    trainer, reference, weights = trainer_of(backend, optim=optim), AdamW(optim), start()
    for step in range(20):
        batch, rate = make_batch(step), 3e-3 * (1 + step % 3)
        trainer.train_step(batch, rate)
        gradients = GPT2(weights, SPEC).gradients(batch.tokens, token_weight(batch))
        weights, _ = reference.update(weights, gradients, rate)
    for name, value in saved(trainer, tmp_path).items():
        # A bias of the keys adds the same to a whole row of attention scores: its gradient is zero, but the reference has its rounding
        # error, which Adam scales up. The backends leave it alone.
        compared = slice(None)
        if name.endswith("c_attn.bias"):
            compared = np.r_[:32, 64:96]
            assert not value[32:64].any(), name
        np.testing.assert_allclose(value[compared], weights[name][compared], atol=3e-4, err_msg=name)
    probe = make_batch(99).tokens
    difference = trainer.token_losses(probe) - GPT2(weights, SPEC).losses(probe)
    assert abs(difference.mean()) < 1e-4


def test_decay_spares_biases_and_norms(backend, tmp_path):
    assert {name.split(".")[-2] + "." + name.split(".")[-1] for name in start() if not decays(name)} == {
        "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "ln_f.weight", "ln_f.bias",
        "c_attn.bias", "c_proj.bias", "c_fc.bias",
    }  # fmt: skip
    optim = OptimSpec(beta1=0.0, beta2=0.0, epsilon=1e9, weight_decay=0.5)
    trainer = trainer_of(backend, optim=optim)
    trainer.train_step(make_batch(0), 0.1)
    for name, value in saved(trainer, tmp_path).items():
        factor = 0.95 if decays(name) else 1.0
        np.testing.assert_allclose(value, start()[name] * factor, atol=1e-6, err_msg=name)


def test_micro_batches_add_up_to_the_whole_batch(backend, tmp_path):
    batch = make_batch(4, rows=7)
    whole, parts = trainer_of(backend), trainer_of(backend, micro_batch_size=3)
    left, right = whole.train_step(batch, 1e-3).read(), parts.train_step(batch, 1e-3).read()
    assert left.loss_sums.sum() == pytest.approx(right.loss_sums.sum(), rel=1e-6)
    assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-5)


def test_gradient_checkpointing_changes_nothing(backend):
    batch = make_batch(4)
    plain, lean = trainer_of(backend), trainer_of(backend, grad_checkpoint=True)
    for _ in range(3):
        left, right = plain.train_step(batch, 1e-2).read(), lean.train_step(batch, 1e-2).read()
        assert left.loss_sums.sum() == pytest.approx(right.loss_sums.sum(), rel=1e-6)


def test_a_non_finite_step_is_masked_and_counted(backend, tmp_path):
    trainer = trainer_of(backend)
    poisoned = start()
    poisoned["transformer.h.0.mlp.c_fc.weight"][0, 0] = np.nan
    from safetensors.numpy import save_file

    save_file(poisoned, tmp_path / "nan.safetensors")
    trainer.load(tmp_path / "nan.safetensors")
    reading = trainer.train_step(make_batch(0), 1e-2).read()
    assert reading.skipped == 1
    after = saved(trainer, tmp_path)
    for name, value in poisoned.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    save_file(start(), tmp_path / "good.safetensors")
    trainer.load(tmp_path / "good.safetensors")
    assert trainer.train_step(make_batch(0), 1e-2).read().skipped == 0
    trainer.save_state(tmp_path / "state.safetensors")
    assert load_file(tmp_path / "state.safetensors")["step"].tolist() == [1]


def test_bf16_follows_fp32_and_keeps_fp32_masters(backend, tmp_path):
    precise, fast = trainer_of(backend), trainer_of(backend, precision="bf16")
    for step in range(5):
        batch = make_batch(step)
        left, right = precise.train_step(batch, 1e-4).read(), fast.train_step(batch, 1e-4).read()
        assert right.loss_sums.sum() == pytest.approx(left.loss_sums.sum(), rel=5e-3)
    weights = saved(fast, tmp_path)
    assert all(value.dtype == np.float32 for value in weights.values())
    # A gain of 1 in bf16 has neighbours 0.004 and 0.008 away: it would never leave 1 in steps of 0.0001.
    moved = np.abs(weights["transformer.h.0.ln_1.weight"] - 1)
    assert 2e-4 < moved.max() < 6e-4, "steps too small for bf16 weights must still add up"
    fast.save_state(tmp_path / "state.safetensors")
    assert all(value.dtype == np.float32 for value in load_file(tmp_path / "state.safetensors").values())


def test_the_ladder_has_the_papers_counts():
    from mlx_forget.ladder import num_params

    counts = {
        "tiny": 42_128_384,
        "small": 110_418_432,
        "medium": 336_128_000,
        "large": 667_657_600,
        "xl": 1_276_235_776,
    }
    for name, count in counts.items():
        assert num_params(model_spec(name, 32_000, 1024)) == count
