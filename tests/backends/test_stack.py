"""Several models trained as one against the same models trained one by one, on every backend."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.ladder import model_spec
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, TrainerSpec
from tests.fakes import BigramTrainer

SPEC = model_spec("2x32", vocab_size=53, context_length=16)
SEEDS = (1, 1, 4)
RATES = (1e-3, 4e-3, 2e-3)


@pytest.fixture(params=["fake", *available_backends()])
def backend(request):
    found = BigramTrainer if request.param == "fake" else load_backend(request.param)
    assert found.describe().stack
    return found


def spec(**runtime):
    return TrainerSpec(model=SPEC, optim=OptimSpec(max_grad_norm=0.7), runtime=RuntimeSpec(**runtime), seed=1)


def make_batch(k, step, *, rows=6, segment=False):
    rng = np.random.default_rng([k, step])
    mask = (rng.random((rows, 16)) < 0.9).astype(np.uint8)
    return Batch(
        tokens=rng.integers(0, SPEC.vocab_size, (rows, 17)).astype(np.int32),
        loss_mask=mask,
        segment=np.sort(rng.integers(0, 3, (rows, 16)), axis=1).astype(np.int32) if segment else None,
        term=np.zeros(rows, np.uint8),
        source=rng.integers(0, 2, rows).astype(np.uint8),
    )


def weights_of(trainer, folder):
    trainer.save(folder / "w.safetensors")
    return load_file(folder / "w.safetensors")


def assert_close(left, right):
    np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=2e-6)
    np.testing.assert_array_equal(left.counts, right.counts)
    assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-5)
    assert left.skipped == right.skipped


@pytest.mark.parametrize(
    "options",
    [{}, {"segment": True}, {"micro_batch_size": 4}, {"grad_checkpoint": True}, {"num_threads": 3}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_members_learn_what_they_would_learn_alone(backend, tmp_path, options):
    runtime = {key: value for key, value in options.items() if key != "segment"}
    stack = backend.stack(spec(**runtime), SEEDS)
    singles = [backend(replace(spec(**runtime), seed=seed)) for seed in SEEDS]
    for step in range(12):
        batches = [make_batch(k, step, segment="segment" in options) for k in range(3)]
        together = stack.train_step(batches, [rate * (1 + step % 2) for rate in RATES], [True] * 3)
        for k, single in enumerate(singles):
            assert_close(together[k].read(), single.train_step(batches[k], RATES[k] * (1 + step % 2)).read())
    probe = make_batch(9, 9).tokens
    for member, single in zip(stack.members, singles, strict=True):
        np.testing.assert_allclose(member.token_losses(probe), single.token_losses(probe), atol=2e-5)
        left, right = weights_of(member, tmp_path), weights_of(single, tmp_path)
        assert all(np.abs(left[name] - right[name]).max() < 2e-5 for name in right)


def test_a_member_that_has_ended_stays_as_it_is_and_the_others_go_on(backend, tmp_path):
    stack, singles = backend.stack(spec(), SEEDS), [backend(replace(spec(), seed=seed)) for seed in SEEDS]
    ended = {}
    for step in range(9):
        active = [True, step < 6, step < 3]
        batches = [make_batch(k, step) for k in range(3)]
        results = stack.train_step(batches, RATES, active)
        for k in range(3):
            if active[k]:
                assert_close(results[k].read(), singles[k].train_step(batches[k], RATES[k]).read())
            else:
                ended.setdefault(k, weights_of(stack.members[k], tmp_path))
                reading = results[k].read()
                assert (reading.counts.sum(), reading.skipped, np.isnan(reading.loss_sums).all()) == (0, 0, True)
    for k, before in ended.items():
        after = weights_of(stack.members[k], tmp_path)
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_member_that_is_not_finite_is_masked_alone(backend, tmp_path):
    stack, healthy = backend.stack(spec(), SEEDS), backend(replace(spec(), seed=SEEDS[0]))
    poisoned = weights_of(stack.members[1], tmp_path)
    next(iter(poisoned.values()))[:] = np.nan
    save_file(poisoned, tmp_path / "nan.safetensors")
    stack.members[1].load(tmp_path / "nan.safetensors")
    for step in range(3):
        batches = [make_batch(k, step) for k in range(3)]
        results = stack.train_step(batches, RATES, [True] * 3)
        assert [result.read().skipped for result in results] == [0, 1, 0]
        assert_close(results[0].read(), healthy.train_step(batches[0], RATES[0]).read())
    after = weights_of(stack.members[1], tmp_path)
    assert all(np.array_equal(after[name], poisoned[name], equal_nan=True) for name in after)
    stack.members[1].save_state(tmp_path / "state.safetensors")
    assert load_file(tmp_path / "state.safetensors")["step"].tolist() == [0]


def test_members_go_on_from_what_single_trainers_saved_and_the_other_way_round(backend, tmp_path):
    """Three runs at different steps enter a stack; one of them leaves it again."""
    singles = [backend(replace(spec(), seed=seed)) for seed in SEEDS]
    stack = backend.stack(spec(), (7, 8, 9))
    for k, single in enumerate(singles):
        for step in range(2 + k):
            single.train_step(make_batch(k, step), RATES[k]).read()
        single.save(tmp_path / f"{k}.safetensors")
        single.save_state(tmp_path / f"{k}.state.safetensors")
        stack.members[k].load(tmp_path / f"{k}.safetensors")
        stack.members[k].load_state(tmp_path / f"{k}.state.safetensors")
    for step in range(5, 8):
        batches = [make_batch(k, step) for k in range(3)]
        results = stack.train_step(batches, RATES, [True] * 3)
        for k, single in enumerate(singles):
            assert_close(results[k].read(), single.train_step(batches[k], RATES[k]).read())
    stack.members[2].save(tmp_path / "left.safetensors")
    stack.members[2].save_state(tmp_path / "left.state.safetensors")
    alone = backend(spec())
    alone.load(tmp_path / "left.safetensors")
    alone.load_state(tmp_path / "left.state.safetensors")
    batches = [make_batch(k, 8) for k in range(3)]
    together = stack.train_step(batches, RATES, [False, False, True])[2].read()
    assert_close(together, alone.train_step(batches[2], RATES[2]).read())
