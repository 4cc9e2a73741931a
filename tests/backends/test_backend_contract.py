"""One suite over every backend: what the loop relies on. A backend that passes here can be driven."""

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.errors import UserError
from mlx_forget.ladder import model_spec
from mlx_forget.methods import MethodSpec
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, TrainerSpec
from tests.fakes import BigramTrainer

SPEC = model_spec("2x32", vocab_size=53, context_length=16)
BACKENDS = ["fake", *available_backends()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BigramTrainer if request.param == "fake" else load_backend(request.param)


def spec(**changes):
    return TrainerSpec(**{"model": SPEC, "runtime": RuntimeSpec(device=None), **changes})


def make_batch(seed=0, rows=6, *, source=None, term=None, mask=None):
    tokens = np.random.default_rng(seed).integers(0, SPEC.vocab_size, (rows, 17)).astype(np.int32)
    zeros = np.zeros(rows, np.uint8)
    return Batch(
        tokens=tokens,
        loss_mask=np.ones((rows, 16), np.uint8) if mask is None else mask,
        segment=None,
        term=zeros if term is None else np.asarray(term, np.uint8),
        source=zeros if source is None else np.asarray(source, np.uint8),
    )


def weights_of(trainer, tmp_path, name="w"):
    from safetensors.numpy import load_file

    trainer.save(tmp_path / f"{name}.safetensors")
    return load_file(tmp_path / f"{name}.safetensors")


def test_steps_lower_the_loss_on_a_repeated_batch(backend):
    trainer, batch = backend(spec()), make_batch()
    first = trainer.train_step(batch, 1e-2).read()
    for _ in range(20):
        last = trainer.train_step(batch, 1e-2).read()
    assert last.loss_sums.sum() < 0.9 * first.loss_sums.sum()


def test_a_reading_splits_losses_and_counts_by_term_and_source(backend):
    trainer = backend(spec(method=MethodSpec(coefficients=(1.0, 0.5, 0.0))))
    mask = np.ones((6, 16), np.uint8)
    mask[0, 4:] = 0
    batch = make_batch(source=[0, 1, 0, 0, 1, 1], term=[0, 0, 0, 0, 1, 1], mask=mask)
    losses = trainer.token_losses(batch.tokens)
    reading = trainer.train_step(batch, 1e-3).read()
    assert reading.counts.tolist() == [[4 + 16 + 16, 16], [0, 32], [0, 0]]
    expected = (losses * mask).sum(1)
    assert reading.loss_sums[0, 0] == pytest.approx(expected[[0, 2, 3]].sum(), rel=1e-5)
    assert reading.loss_sums[0, 1] == pytest.approx(expected[1], rel=1e-5)
    assert reading.loss_sums[1, 1] == pytest.approx(expected[[4, 5]].sum(), rel=1e-5)
    assert reading.skipped == 0
    assert reading.grad_norm > 0


def test_a_term_with_coefficient_zero_changes_nothing(backend, tmp_path):
    plain, mixed = backend(spec()), backend(spec())
    batch = make_batch(rows=6, term=[0, 0, 0, 1, 1, 1])
    only = Batch(batch.tokens[:3], batch.loss_mask[:3], None, batch.term[:3], batch.source[:3])
    plain.train_step(only, 1e-2).read()
    mixed.train_step(batch, 1e-2).read()
    left, right = weights_of(plain, tmp_path, "a"), weights_of(mixed, tmp_path, "b")
    for name in left:
        np.testing.assert_allclose(left[name], right[name], atol=2e-6)


def test_masked_tokens_carry_no_gradient(backend, tmp_path):
    left, right = backend(spec()), backend(spec())
    mask = np.ones((6, 16), np.uint8)
    mask[:, 8:] = 0
    batch = make_batch(mask=mask)
    changed = batch.tokens.copy()
    changed[:, 9:] = 1
    left.train_step(batch, 1e-2).read()
    right.train_step(Batch(changed, mask, None, batch.term, batch.source), 1e-2).read()
    a, b = weights_of(left, tmp_path, "a"), weights_of(right, tmp_path, "b")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-7)


def test_token_losses_do_not_depend_on_how_many_rows_are_asked_at_once(backend):
    trainer, tokens = backend(spec()), make_batch(rows=9).tokens
    whole = trainer.token_losses(tokens)
    assert whole.shape == (9, 16)
    assert whole.dtype == np.float32
    parts = np.concatenate([trainer.token_losses(tokens[:4]), trainer.token_losses(tokens[4:])])
    np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_an_untrained_model_knows_nothing(backend):
    losses = backend(spec()).token_losses(make_batch(rows=64).tokens)
    # Logits have a standard deviation of 0.55 at the start, as GPT-2 has: 0.15 nats above a uniform guess.
    assert losses.mean() == pytest.approx(np.log(SPEC.vocab_size) + 0.15, abs=0.15)


def test_the_seed_decides_the_start_weights(backend, tmp_path):
    same, again, other = (weights_of(backend(spec(seed=s)), tmp_path, str(i)) for i, s in enumerate((1, 1, 2)))
    assert all(np.array_equal(same[name], again[name]) for name in same)
    assert any(not np.array_equal(same[name], other[name]) for name in same)


def test_saved_weights_and_state_continue_exactly(backend, tmp_path):
    batches = [make_batch(seed) for seed in range(6)]
    straight = backend(spec())
    for batch in batches[:3]:
        straight.train_step(batch, 1e-2).read()
    straight.save(tmp_path / "weights.safetensors")
    straight.save_state(tmp_path / "state.safetensors")
    resumed = backend(spec(seed=9))
    resumed.load(tmp_path / "weights.safetensors")
    resumed.load_state(tmp_path / "state.safetensors")
    for batch in batches[3:]:
        left, right = straight.train_step(batch, 1e-2).read(), resumed.train_step(batch, 1e-2).read()
        np.testing.assert_array_equal(left.loss_sums, right.loss_sums)
    left, right = weights_of(straight, tmp_path, "a"), weights_of(resumed, tmp_path, "b")
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_weights_of_another_model_are_refused(backend, tmp_path):
    other = backend(TrainerSpec(model=model_spec("2x32", vocab_size=54, context_length=16)))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold the weights"):
        backend(spec()).load(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not the training state"):
        backend(spec()).load_state(tmp_path / "other.safetensors")


def test_clipping_bounds_the_step_and_reports_the_norm_before_it(backend, tmp_path):
    batch = make_batch()
    free = backend(spec(optim=OptimSpec(max_grad_norm=0.0))).train_step(batch, 1e-3).read()
    clipped = backend(spec(optim=OptimSpec(max_grad_norm=1e-3))).train_step(batch, 1e-3).read()
    assert clipped.grad_norm == pytest.approx(free.grad_norm, rel=1e-5)


def test_compare_with_the_start_is_zero_at_the_start_and_positive_after_a_step(backend):
    trainer, batch = backend(spec()), make_batch()
    mask = batch.loss_mask.copy()
    mask[0, :5] = 0
    with pytest.raises(UserError, match="set_reference"):
        trainer.compare(batch.tokens, mask)
    trainer.set_reference("start")
    at_start = trainer.compare(batch.tokens, mask)
    np.testing.assert_allclose(at_start.kl, 0, atol=1e-5)
    np.testing.assert_allclose(at_start.nll, at_start.ref_nll, atol=1e-5)
    assert (at_start.agreement[mask == 1] == 1).all()
    assert not at_start.nll[mask == 0].any()
    for _ in range(10):
        trainer.train_step(batch, 1e-2).read()
    after = trainer.compare(batch.tokens, mask)
    assert after.kl[mask == 1].mean() > 1e-3
    np.testing.assert_allclose(after.ref_nll, at_start.ref_nll, atol=1e-5)
    np.testing.assert_allclose(after.nll, trainer.token_losses(batch.tokens) * mask, atol=1e-4)
    assert (after.soft_ce[mask == 1] >= after.kl[mask == 1]).all()


def test_samples_depend_on_the_uniforms_of_their_row_only(backend):
    trainer = backend(spec())
    u = np.random.default_rng(0).random((5, 8))
    prompts = np.full((5, 2), 1, np.int32)
    whole = trainer.sample(prompts, u)
    assert whole.shape == (5, 8)
    assert whole.dtype == np.int32
    assert ((whole >= 0) & (whole < SPEC.vocab_size)).all()
    np.testing.assert_array_equal(whole[2:4], trainer.sample(prompts[2:4], u[2:4]))


def test_samples_can_be_of_the_first_ids_alone(backend):
    """As if the model had no others: a table of embeddings may be longer than its tokenizer."""
    trainer = backend(spec())
    prompts, u = np.full((40, 2), 1, np.int32), np.random.default_rng(0).random((40, 6))
    out = trainer.sample(prompts, u, num_ids=5)
    assert set(out.ravel().tolist()) == set(range(5))
    assert trainer.sample(prompts, u).max() >= 5


def test_samples_follow_the_model(backend):
    trainer = backend(spec())
    tokens = np.tile(np.arange(17, dtype=np.int32) % 3 + 7, (8, 1))
    batch = Batch(tokens, np.ones((8, 16), np.uint8), None, np.zeros(8, np.uint8), np.zeros(8, np.uint8))
    for _ in range(150):
        trainer.train_step(batch, 1e-2)
    out = trainer.sample(np.full((4, 1), 7, np.int32), np.full((4, 6), 0.5))
    assert out.tolist() == [[8, 9, 7, 8, 9, 7]] * 4


def test_a_sample_longer_than_the_context_is_refused(backend):
    with pytest.raises(UserError, match="exceed the context"):
        backend(spec()).sample(np.ones((1, 10), np.int32), np.full((1, 10), 0.5))


def test_adapters_off_needs_adapters(backend):
    with pytest.raises(UserError, match="needs adapters"):
        backend(spec()).set_reference("adapters_off")
