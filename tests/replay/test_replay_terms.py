"""The terms that replay rows add to the objective, and the penalties that hold the weights: exact, over every backend."""

import dataclasses

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.errors import UserError
from mlx_forget.ladder import initial_weights, model_spec
from mlx_forget.methods import METHODS, MethodSpec, method_spec
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, TrainerSpec
from tests.fakes import RATE, BigramTrainer
from tests.reference import GPT2, softmax

SPEC = model_spec("2x32", vocab_size=53, context_length=16)
NETWORKS = available_backends()
KL_REPLAY = MethodSpec(name="kl-replay", coefficients=(1.0, 0.0, 0.7), reference="start")


@pytest.fixture(params=["fake", *NETWORKS])
def backend(request):
    return BigramTrainer if request.param == "fake" else load_backend(request.param)


@pytest.fixture(params=NETWORKS)
def network(request):
    return load_backend(request.param)


def trainer_of(backend, method=None, *, optim=None, seed=0, **runtime):
    return backend(
        TrainerSpec(
            model=SPEC, optim=optim or OptimSpec(), method=method or MethodSpec(), runtime=RuntimeSpec(**runtime), seed=seed
        )
    )


def make_batch(term, seed=0, *, mask=None, segment=False):
    rng, rows = np.random.default_rng(seed), len(term)
    return Batch(
        tokens=rng.integers(0, SPEC.vocab_size, (rows, 17)).astype(np.int32),
        loss_mask=np.ones((rows, 16), np.uint8) if mask is None else mask,
        segment=np.sort(rng.integers(0, 3, (rows, 16)), axis=1).astype(np.int32) if segment else None,
        term=np.asarray(term, np.uint8),
        source=(np.asarray(term) > 0).astype(np.uint8),
    )


def weights_of(trainer, tmp_path, name="w"):
    from safetensors.numpy import load_file

    trainer.save(tmp_path / f"{name}.safetensors")
    return load_file(tmp_path / f"{name}.safetensors")


def moved(trainer, seed):
    """A trainer some steps away from its reference, so that every penalty has something to pull back."""
    trainer.set_reference("start")
    for step in range(5):
        trainer.train_step(make_batch([0] * 4, seed + step), 1e-2).read()
    return trainer


def test_kl_of_a_model_with_itself_is_zero_and_pulls_nowhere(backend):
    trainer = trainer_of(backend, dataclasses.replace(KL_REPLAY, coefficients=(0.0, 0.0, 3.0)))
    trainer.set_reference("start")
    reading = trainer.train_step(make_batch([2, 2, 2]), 1e-3).read()
    assert abs(reading.loss_sums[2, 1]) < 1e-6
    assert reading.counts[2, 1] == 48
    assert reading.grad_norm < 1e-8


def test_the_kl_of_a_step_is_that_of_compare(backend):
    trainer = moved(trainer_of(backend, KL_REPLAY), 10)
    mask = np.ones((6, 16), np.uint8)
    mask[3, 7:] = 0
    batch = make_batch([0, 2, 0, 2, 2, 0], mask=mask)
    expected = trainer.compare(batch.tokens, mask)
    reading = trainer.train_step(batch, 1e-3).read()
    assert reading.counts.tolist() == [[48, 0], [0, 0], [0, 39]]
    assert reading.loss_sums[2, 1] == pytest.approx(expected.kl[[1, 3, 4]].sum(), rel=1e-4)
    assert reading.loss_sums[0, 0] == pytest.approx(expected.nll[[0, 2, 5]].sum(), rel=1e-4)
    assert reading.loss_sums[1].sum() == 0


def test_learning_without_forgetting_takes_the_kl_on_the_task_rows(backend):
    trainer = moved(trainer_of(backend, method_spec("lwf")), 10)
    batch = make_batch([0] * 5)
    expected = trainer.compare(batch.tokens, batch.loss_mask)
    reading = trainer.train_step(batch, 1e-3).read()
    assert reading.counts.tolist() == [[80, 0], [0, 0], [80, 0]]
    assert reading.loss_sums[2, 0] == pytest.approx(expected.kl.sum(), rel=1e-4)
    assert reading.loss_sums[0, 0] == pytest.approx(expected.nll.sum(), rel=1e-4)


GRADIENT_STEP = OptimSpec(beta1=0.0, beta2=0.0, epsilon=1e6, weight_decay=0.0, max_grad_norm=0.0)


def numpy_kl(weights, reference, tokens, segment=None):
    logp, ref = (np.log(softmax(GPT2(w, SPEC).forward(tokens[:, :-1], segment)[0])) for w in (weights, reference))
    return (np.exp(ref) * (ref - logp)).sum(-1)


@pytest.mark.parametrize("method", [KL_REPLAY, method_spec("lwf", 0.7)], ids=["kl-replay", "lwf"])
@pytest.mark.parametrize("segment", [False, True], ids=["", "segments"])
def test_the_gradient_of_the_kl_is_the_finite_difference(network, tmp_path, method, segment):
    """A gradient step shows the gradient; along random directions it is the slope of the objective in NumPy float64."""
    from safetensors.numpy import save_file

    reference = dict(initial_weights(SPEC, 1))
    save_file(reference, tmp_path / "reference.safetensors")
    trainer = trainer_of(network, method, optim=GRADIENT_STEP)
    trainer.set_reference(tmp_path / "reference.safetensors")
    mask = np.ones((5, 16), np.uint8)
    mask[0, 3:] = mask[3, 9:] = 0
    batch = make_batch([0, 2, 0, 2, 0] if method is KL_REPLAY else [0] * 5, mask=mask, segment=segment)
    before = {name: value.astype(np.float64) for name, value in initial_weights(SPEC, 0)}
    trainer.train_step(batch, 1e6).read()
    gradient = {name: before[name] - value for name, value in weights_of(trainer, tmp_path).items()}
    task, kl_rows = batch.term == 0, (batch.term == 2) if method is KL_REPLAY else np.ones(5, bool)
    kept = {key: None if batch.segment is None else batch.segment[rows] for key, rows in (("task", task), ("kl", kl_rows))}

    def objective(weights):
        nll = GPT2(weights, SPEC).losses(batch.tokens[task], kept["task"])
        kl = numpy_kl(weights, reference, batch.tokens[kl_rows], kept["kl"])
        return (nll * mask[task]).sum() / mask[task].sum() + 0.7 * (kl * mask[kl_rows]).sum() / mask[kl_rows].sum()

    rng, step = np.random.default_rng(5), 1e-5
    for _ in range(3):
        direction = {name: rng.standard_normal(value.shape) for name, value in before.items()}
        ends = [objective({name: value + sign * step * direction[name] for name, value in before.items()}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert sum((gradient[name] * direction[name]).sum() for name in before) == pytest.approx(slope, abs=2e-3, rel=1e-3)


def test_next_token_replay_equals_a_weighted_batch(network, tmp_path):
    """c on the replay term is a weighted cross-entropy over both kinds of rows: NumPy's gradient of exactly that."""
    trainer = trainer_of(network, method_spec("ntp-replay", 2.5), optim=GRADIENT_STEP)
    batch = make_batch([0, 1, 0, 1, 0])
    before = {name: value.astype(np.float64) for name, value in initial_weights(SPEC, 0)}
    weight = np.where(batch.term == 1, 2.5 / 32, 1 / 48)[:, None] * np.ones((5, 16))
    expected = GPT2(before, SPEC).gradients(batch.tokens, weight)
    trainer.train_step(batch, 1e6).read()
    for name, value in weights_of(trainer, tmp_path).items():
        np.testing.assert_allclose(before[name] - value, expected[name], atol=6e-6, err_msg=name)


@pytest.mark.parametrize("method", [KL_REPLAY, method_spec("lwf")], ids=["kl-replay", "lwf"])
@pytest.mark.parametrize("runtime", [{"micro_batch_size": 2}, {"grad_checkpoint": True}], ids=["micro-batches", "recomputed"])
def test_how_a_step_is_executed_does_not_change_the_kl_term(network, tmp_path, method, runtime):
    plain, other = (moved(trainer_of(network, method, **how), 10) for how in ({}, runtime))
    term = [0, 2, 0, 2, 2, 0, 0] if method is KL_REPLAY else [0] * 7
    left, right = (trainer.train_step(make_batch(term), 1e-3).read() for trainer in (plain, other))
    np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=2e-5, atol=1e-5)
    assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-4)


def test_low_precision_follows_fp32(network):
    precise, fast = (moved(trainer_of(network, KL_REPLAY, precision=precision), 10) for precision in ("fp32", "bf16"))
    batch = make_batch([0, 2, 0, 2])
    left, right = precise.train_step(batch, 1e-3).read(), fast.train_step(batch, 1e-3).read()
    np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=0.05, atol=0.05)


@pytest.mark.skipif(len(NETWORKS) < 2, reason="one backend has nothing to agree with")
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("injection", "low-lr")])
def test_backends_agree_on_every_method(tmp_path, name):
    terms = {1: [0, 1, 0, 1], 2: [0, 2, 0, 2], None: [0] * 4}[method_spec(name).replay_term]
    readings = []
    for backend in NETWORKS:
        trainer = trainer_of(load_backend(backend), method_spec(name))
        trainer.set_reference(method_spec(name).reference)
        rows = make_batch([0] * 3, 50)
        trainer.set_fisher(rows.tokens, rows.loss_mask)
        readings.append([trainer.train_step(make_batch(terms, step), 3e-3).read().loss_sums for step in range(12)])
    np.testing.assert_allclose(*readings, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(len(NETWORKS) < 2, reason="one backend has nothing to agree with")
def test_fisher_information_stays_within_segments_on_every_backend():
    def readings(backend, segment):
        trainer = trainer_of(load_backend(backend), method_spec("ewc", 50.0))
        trainer.set_reference("start")
        rows = make_batch([0] * 3, 50)
        trainer.set_fisher(rows.tokens, rows.loss_mask, segment)
        return [trainer.train_step(make_batch([0] * 4, step), 3e-3).read().loss_sums for step in range(12)]

    shape = make_batch([0] * 3, 50).loss_mask.shape
    halves = np.broadcast_to((np.arange(shape[1]) >= shape[1] // 2).astype(np.int32), shape).copy()
    apart = [readings(backend, halves) for backend in NETWORKS]
    np.testing.assert_allclose(*apart, rtol=1e-4, atol=1e-4)
    whole = readings(NETWORKS[0], None)
    assert np.abs(np.array(whole) - np.array(apart[0])).max() > 1e-3, "the segments are read"


# --- penalties on the weights ---

NO_DECAY = OptimSpec(weight_decay=0.0)


def test_an_anchor_of_lambda_zero_is_adamw_without_decay_bitwise(backend, tmp_path):
    anchored = trainer_of(backend, MethodSpec(name="anchored-adamw", reference="start"), optim=NO_DECAY)
    anchored.set_reference("start")
    free = trainer_of(backend, optim=NO_DECAY)
    for step in range(4):
        batch = make_batch([0] * 4, step)
        anchored.train_step(batch, 1e-2).read(), free.train_step(batch, 1e-2).read()
    a, b = weights_of(anchored, tmp_path, "a"), weights_of(free, tmp_path, "b")
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_large_lambda_stays_at_the_anchor(backend, tmp_path):
    """lr lambda counts as at most 1, so each step starts at the anchor: it never moves further than one Adam step."""
    trainer = trainer_of(backend, method_spec("anchored-adamw", 1e9), optim=NO_DECAY)
    start = weights_of(trainer, tmp_path, "start")
    trainer.set_reference("start")
    scale = RATE if backend is BigramTrainer else 1
    for step in range(8):
        trainer.train_step(make_batch([0] * 4, step), 1e-4).read()
    for name, value in weights_of(trainer, tmp_path).items():
        assert np.abs(value - start[name]).max() <= 2.5 * 1e-4 * scale, name


def test_the_anchor_follows_its_formula(network, tmp_path):
    """Beside the Adam step, lr lambda (theta - theta0) and nothing else: seen with an epsilon that stills Adam."""
    still = OptimSpec(epsilon=1e12, weight_decay=0.0)
    trainer = trainer_of(network, method_spec("anchored-adamw", 4.0), optim=still)
    before, anchor = dict(initial_weights(SPEC, 0)), dict(initial_weights(SPEC, 1))
    from safetensors.numpy import save_file

    save_file(anchor, tmp_path / "anchor.safetensors")
    trainer.set_reference(tmp_path / "anchor.safetensors")
    trainer.train_step(make_batch([0] * 4), 0.05).read()
    for name, value in weights_of(trainer, tmp_path).items():
        np.testing.assert_allclose(value, before[name] - 0.2 * (before[name] - anchor[name]), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["anchored-adamw", "l2-sp", "ewc", "kl-replay"])
def test_a_rate_of_zero_moves_nothing(backend, tmp_path, name):
    trainer = trainer_of(backend, method_spec(name, 5.0), optim=OptimSpec(weight_decay=0.1))
    trainer.set_reference("start")
    rows = make_batch([0] * 3, 50)
    trainer.set_fisher(rows.tokens, rows.loss_mask)
    before = weights_of(trainer, tmp_path, "before")
    trainer.train_step(make_batch([0, 2, 0, 2]), 0.0).read()
    after = weights_of(trainer, tmp_path, "after")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_l2_and_ewc_add_their_gradients(network, tmp_path):
    from safetensors.numpy import save_file

    before, anchor = dict(initial_weights(SPEC, 0)), dict(initial_weights(SPEC, 1))
    save_file(anchor, tmp_path / "anchor.safetensors")
    batch, probe = make_batch([0] * 4), make_batch([0] * 3, 50)
    task = GPT2(before, SPEC).gradients(batch.tokens, np.full((4, 16), 1 / 64))
    rows = [GPT2(before, SPEC).gradients(probe.tokens[i : i + 1], np.ones((1, 16))) for i in range(3)]
    for name in ("l2-sp", "ewc"):
        trainer = trainer_of(network, method_spec(name, 0.3), optim=GRADIENT_STEP)
        trainer.set_reference(tmp_path / "anchor.safetensors")
        trainer.set_fisher(probe.tokens, probe.loss_mask)
        trainer.train_step(batch, 1e6).read()
        for key, value in weights_of(trainer, tmp_path).items():
            fisher = 1.0 if name == "l2-sp" else sum(row[key] ** 2 for row in rows) / 48
            expected = task[key] + 0.3 * fisher * (before[key] - anchor[key])
            np.testing.assert_allclose(before[key] - value, expected, atol=6e-6, err_msg=f"{name} {key}")


def test_a_method_without_its_reference_is_refused(backend):
    for name in ("kl-replay", "lwf", "l2-sp", "anchored-adamw"):
        with pytest.raises(UserError, match="call set_reference first"):
            trainer_of(backend, method_spec(name)).train_step(make_batch([0, 0]), 1e-3)
    trainer = trainer_of(backend, method_spec("ewc"))
    trainer.set_reference("start")
    with pytest.raises(UserError, match="call set_fisher first"):
        trainer.train_step(make_batch([0, 0]), 1e-3)


def test_the_reference_does_not_move(backend):
    trainer = moved(trainer_of(backend, KL_REPLAY), 10)
    tokens, mask = make_batch([0] * 3, 3).tokens, np.ones((3, 16), np.uint8)
    before = trainer.compare(tokens, mask).ref_nll
    for step in range(4):
        trainer.train_step(make_batch([0, 2, 0], step), 1e-2).read()
    np.testing.assert_array_equal(trainer.compare(tokens, mask).ref_nll, before)


def test_a_kl_term_keeps_the_model_near_its_reference(backend):
    """The purpose: at equal steps, the divergence on rows like the replayed ones is smaller with the term than without."""
    batch = make_batch([0, 2, 0, 2])
    kls = []
    for c in (0.0, 20.0):
        trainer = trainer_of(backend, dataclasses.replace(KL_REPLAY, coefficients=(1.0, 0.0, c)))
        trainer.set_reference("start")
        for _ in range(15):
            trainer.train_step(batch, 3e-3).read()
        kls.append(trainer.compare(batch.tokens[1::2], batch.loss_mask[1::2]).kl.mean())
    assert kls[1] < 0.8 * kls[0]
