"""Every optimiser on every backend: against NumPy, against each other, and over a checkpoint that the other backend goes on from."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.config import TrainConfig
from mlx_forget.config_layers import from_layers
from mlx_forget.errors import UserError
from mlx_forget.ladder import initial_weights, model_spec, moment_shapes, param_shapes
from mlx_forget.methods import method_spec
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, TrainerSpec
from mlx_forget.training.identity import science
from mlx_forget.training.plan import plan_run
from tests.reference import GPT2, Adafactor, AdamW

SPEC = model_spec("2x32", vocab_size=61, context_length=12)
OPTIMIZERS = {"adamw": AdamW, "adafactor": Adafactor}
BOTH = pytest.mark.skipif(len(available_backends()) < 2, reason="needs both backends")


@pytest.fixture(params=available_backends())
def backend(request):
    return load_backend(request.param)


def trainer_of(backend, name, **changes):
    optim = OptimSpec(name=name, weight_decay=0.1, max_grad_norm=0.5)
    return backend(TrainerSpec(model=SPEC, optim=optim, runtime=RuntimeSpec(device="cpu", num_threads=1), seed=3, **changes))


def make_batch(seed, rows=5):
    tokens = np.random.default_rng(seed).integers(0, 61, (rows, 13)).astype(np.int32)
    zeros = np.zeros(rows, np.uint8)
    return Batch(tokens=tokens, loss_mask=np.ones((rows, 12), np.uint8), segment=None, term=zeros, source=zeros)


def saved(trainer, folder, name="w"):
    trainer.save(folder / f"{name}.safetensors")
    return load_file(folder / f"{name}.safetensors")


def comparable(name, value):
    """All but the biases of keys, which have no gradient (see test_numerics)."""
    return np.r_[value[:32], value[64:]] if name.endswith("c_attn.bias") else value


def test_adafactor_of_the_reference_is_that_of_transformers():
    """The NumPy reference that the backends are held to, against the implementation most people use."""
    torch = pytest.importorskip("torch")
    theirs_module = pytest.importorskip("transformers.optimization")
    rng = np.random.default_rng(0)
    weights = {"a.weight": rng.normal(size=(7, 5)), "b.bias": rng.normal(size=6)}
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in weights.items()}
    theirs = theirs_module.Adafactor(
        parameters.values(), lr=0.02, scale_parameter=False, relative_step=False, warmup_init=False, weight_decay=0.1
    )
    ours = Adafactor(OptimSpec(name="adafactor", weight_decay=0.1, max_grad_norm=0.0))
    for _ in range(5):
        gradients = {name: rng.normal(size=value.shape) * 10 ** rng.uniform(-3, 1) for name, value in weights.items()}
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        theirs.step()
        weights, _ = ours.update(weights, gradients, 0.02, decays=lambda name: True)
    for name, value in weights.items():
        np.testing.assert_allclose(value, parameters[name].detach().numpy(), rtol=1e-6)


def test_twenty_adafactor_steps_match_numpy(backend, tmp_path):
    """AdamW's are in test_numerics."""
    trainer = trainer_of(backend, "adafactor")
    reference, weights = Adafactor(trainer.spec.optim), dict(initial_weights(SPEC, 3))
    for step in range(20):
        batch, rate = make_batch(step), 3e-3 * (1 + step % 3)
        trainer.train_step(batch, rate)
        gradients = GPT2(weights, SPEC).gradients(batch.tokens, np.full((5, 12), 1 / 60))
        for name in gradients:
            if name.endswith("c_attn.bias"):
                gradients[name][32:64] = 0
        weights, _ = reference.update(weights, gradients, rate)
    for name, value in saved(trainer, tmp_path).items():
        np.testing.assert_allclose(comparable(name, value), comparable(name, weights[name]), atol=3e-4, err_msg=name)


@BOTH
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_backends_stay_together_and_go_on_from_each_others_state(name, tmp_path):
    """Parity over 50 steps within 1e-3 nats, then again after the two have changed places."""
    trainers = [trainer_of(load_backend(own), name) for own in ("cuda", "mlx")]
    worst = 0.0
    for step in range(50):
        left, right = (one.train_step(make_batch(step), 3e-3).read() for one in trainers)
        worst = max(worst, abs(left.loss_sums.sum() - right.loss_sums.sum()) / 60)
    assert worst <= 1e-3
    for number, one in enumerate(trainers):
        one.save(tmp_path / f"{number}.safetensors")
        one.save_state(tmp_path / f"{number}.state.safetensors")
    swapped = [trainer_of(load_backend(own), name) for own in ("mlx", "cuda")]
    for number, one in enumerate(swapped):
        one.load(tmp_path / f"{number}.safetensors")
        one.load_state(tmp_path / f"{number}.state.safetensors")
    for step in range(50, 55):
        losses = [one.train_step(make_batch(step), 3e-3).read().loss_sums.sum() for one in (*trainers, *swapped)]
        assert (max(losses) - min(losses)) / 60 <= 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_continues_exactly_and_that_of_another_optimiser_is_refused(backend, tmp_path, name):
    straight = trainer_of(backend, name)
    for step in range(3):
        straight.train_step(make_batch(step), 1e-2).read()
    saved(straight, tmp_path)
    straight.save_state(tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    assert {key: value.shape for key, value in state.items() if key != "step"} == moment_shapes(name, param_shapes(SPEC))
    assert state["step"].tolist() == [3]
    resumed = trainer_of(backend, name)
    resumed.load(tmp_path / "w.safetensors")
    resumed.load_state(tmp_path / "state.safetensors")
    for step in range(3, 6):
        left, right = straight.train_step(make_batch(step), 1e-2).read(), resumed.train_step(make_batch(step), 1e-2).read()
        np.testing.assert_array_equal(left.loss_sums, right.loss_sums)
    (other,) = set(OPTIMIZERS) - {name}
    with pytest.raises(UserError, match="not the training state of this model and optimiser"):
        trainer_of(backend, other).load_state(tmp_path / "state.safetensors")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(backend, tmp_path, name):
    trainer = trainer_of(backend, name)
    trainer.train_step(make_batch(0), 1e-2).read()
    poisoned = saved(trainer, tmp_path, "before")
    poisoned["transformer.h.0.mlp.c_fc.weight"][0, 0] = np.inf
    save_file(poisoned, tmp_path / "poisoned.safetensors")
    trainer.load(tmp_path / "poisoned.safetensors")
    trainer.save_state(tmp_path / "state-before.safetensors")
    assert trainer.train_step(make_batch(1), 1e-2).read().skipped == 1
    trainer.save_state(tmp_path / "state-after.safetensors")
    before, after = load_file(tmp_path / "state-before.safetensors"), load_file(tmp_path / "state-after.safetensors")
    assert all(np.array_equal(before[key], after[key]) for key in before)
    weights = saved(trainer, tmp_path)
    assert all(np.array_equal(poisoned[key], weights[key]) for key in weights)


def test_adafactor_keeps_less_than_a_tenth_of_adamws_moments():
    sizes = {name: sum(int(np.prod(shape)) for shape in moment_shapes(name, param_shapes(SPEC)).values()) for name in OPTIMIZERS}
    assert sizes["adafactor"] < 0.1 * sizes["adamw"]


def test_a_bf16_anchor_is_the_rounded_one_and_takes_half(backend, tmp_path):
    method = method_spec("anchored-adamw", 5.0)
    trainers = [trainer_of(backend, "adamw", method=dataclasses.replace(method, anchor_precision=own)) for own in ("fp32", "bf16")]
    for trainer in trainers:
        trainer.set_reference("start")
        trainer.train_step(make_batch(0), 1e-2).read()
    sizes = [sum(value.nbytes for value in trainer._reference.values()) for trainer in trainers]
    assert sizes[0] == 2 * sizes[1]
    exact, rounded = (saved(trainer, tmp_path, str(number)) for number, trainer in enumerate(trainers))
    for name, start in initial_weights(SPEC, 3):
        # The pull is lr lambda = 5% of the distance to an anchor that is rounded to 8 bits.
        np.testing.assert_allclose(rounded[name], exact[name], atol=0.05 * 2**-8 * np.abs(start).max() + 1e-7, err_msg=name)
    assert any(not np.array_equal(exact[name], rounded[name]) for name in exact)
    comparison = trainers[1].compare(make_batch(9).tokens, np.ones((5, 12), np.uint8))
    assert np.isfinite(comparison.kl).all()


def test_half_life_in_tokens_sets_beta2_whatever_the_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def resolved(**keys):
        keys = {"init": "scratch", "pretrain": None, "target": "prose", "vocab_size": 512, "model": "0.16m"} | keys
        return plan_run(from_layers(TrainConfig, keys)).config

    small, large = (resolved(batch_size=size, beta2_half_life_tokens="20K") for size in (4, 16))
    assert small.beta2 ** (20_000 / (4 * 128)) == pytest.approx(0.5)
    assert large.beta2 ** (20_000 / (16 * 128)) == pytest.approx(0.5)
    assert small.beta2 == pytest.approx(large.beta2 ** (1 / 4))
    # The same science under either key.
    assert science(small) == science(resolved(batch_size=4, beta2=small.beta2))


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"optimizer": "adamx"}, "Unknown optimizer 'adamx'. Did you mean 'adamw'? Known: adafactor, adamw."),
        ({"optimizer": "adafactor", "beta2_half_life_tokens": 1000}, "optimizer 'adafactor' has no beta2"),
        ({"anchor_precision": "bf16"}, "method 'injection' holds no anchor"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused_in_a_sentence(keys, sentence):
    with pytest.raises(UserError) as refused:
        from_layers(TrainConfig, keys)
    assert sentence in str(refused.value)
