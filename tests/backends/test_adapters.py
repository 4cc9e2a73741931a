"""Adapters on both backends: what they compute against NumPy, what stays frozen, what is saved, and the reference under them."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_forget import adapters
from mlx_forget.backends import available_backends, load_backend
from mlx_forget.errors import UserError
from mlx_forget.ladder import decays, initial_weights, linear_shapes, model_spec
from mlx_forget.methods import TERM_REPLAY_KL, MethodSpec
from mlx_forget.trainer import AdapterSpec, Batch, OptimSpec, RuntimeSpec, TrainerSpec
from tests.reference import GPT2, AdamW

SPEC = model_spec("2x32", vocab_size=61, context_length=12)
LINEARS = linear_shapes(SPEC)
SEED = 3
KINDS = ["lora", "dora"]


@pytest.fixture(params=available_backends())
def backend(request):
    return load_backend(request.param)


def adapter_of(kind="lora", **changes):
    return AdapterSpec(kind=kind, **{"rank": 4, "alpha": 6.0, "target_modules": ("all-linear",), **changes})


def trainer_of(backend, kind="lora", *, adapter=None, optim=None, method=None, **runtime):
    return backend(
        TrainerSpec(
            model=SPEC,
            adapter=adapter or adapter_of(kind),
            optim=optim or OptimSpec(),
            method=method or MethodSpec(),
            runtime=RuntimeSpec(**runtime),
            seed=SEED,
        )
    )


def make_batch(seed=0, rows=6, term=None):
    rng = np.random.default_rng(seed)
    return Batch(
        tokens=rng.integers(0, 61, (rows, 13)).astype(np.int32),
        loss_mask=(rng.random((rows, 12)) < 0.8).astype(np.uint8),
        segment=None,
        term=np.zeros(rows, np.uint8) if term is None else np.array(term, np.uint8),
        source=np.zeros(rows, np.uint8),
    )


def saved(trainer, path, **how):
    trainer.save(path, **how)
    return load_file(path)


def steps(trainer, count, rate=1e-2, first=0):
    return [trainer.train_step(make_batch(first + i), rate).read() for i in range(count)]


class AdaptedGPT2:
    """The reference model with its adapters fused, and their gradients by the chain rule, in float64."""

    def __init__(self, base, parts, adapter):
        self.base, self.adapter = {name: np.float64(value) for name, value in base.items()}, adapter
        self.parts = {name: np.float64(value) for name, value in parts.items()}
        self.modules = adapters.adapted_modules(LINEARS, adapter)

    def direction(self, module):
        a, b = self.parts[module + adapters.A], self.parts[module + adapters.B]
        return self.base[module + ".weight"] + self.adapter.scale * (b @ a).T

    def factor(self, module):
        if self.adapter.kind == "lora":
            return 1.0
        return self.parts[module + adapters.MAGNITUDE] / np.linalg.norm(self.direction(module), axis=0)

    def model(self):
        fused = {module + ".weight": self.direction(module) * self.factor(module) for module in self.modules}
        return GPT2({**self.base, **fused}, SPEC)

    def gradients(self, batch):
        whole = self.model().gradients(batch.tokens, batch.loss_mask / batch.loss_mask.sum())
        found = {}
        for module in self.modules:
            grad = whole[module + ".weight"]
            if self.adapter.kind == "dora":
                direction = self.direction(module)
                found[module + adapters.MAGNITUDE] = (grad * direction).sum(0) / np.linalg.norm(direction, axis=0)
            grad = grad * self.factor(module) * self.adapter.scale
            found[module + adapters.A] = (grad @ self.parts[module + adapters.B]).T
            found[module + adapters.B] = (self.parts[module + adapters.A] @ grad).T
        return found


def start_parts(base, adapter):
    parts = dict(adapters.initial_adapters(LINEARS, adapter, SEED))
    if adapter.kind == "dora":
        parts |= {
            module + adapters.MAGNITUDE: np.linalg.norm(base[module + ".weight"], axis=0)
            for module in adapters.adapted_modules(LINEARS, adapter)
        }
    return {name: parts[name] for name in adapters.parameter_shapes(LINEARS, adapter)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["all-linear", "attention", "mlp.c_fc"])
def test_ten_steps_match_numpy(backend, kind, target, tmp_path):
    adapter, optim = adapter_of(kind, target_modules=(target,)), OptimSpec(max_grad_norm=0.5)
    base = dict(initial_weights(SPEC, SEED))
    reference, adamw = AdaptedGPT2(base, start_parts(base, adapter), adapter), AdamW(optim)
    trainer = trainer_of(backend, adapter=adapter, optim=optim)
    for number in range(10):
        reading = trainer.train_step(make_batch(number), 1e-2).read()
        reference.parts, norm = adamw.update(reference.parts, reference.gradients(make_batch(number)), 1e-2, decays)
        assert reading.grad_norm == pytest.approx(norm, rel=1e-4)
    losses = reference.model().losses(make_batch(50).tokens)
    np.testing.assert_allclose(trainer.token_losses(make_batch(50).tokens), losses, atol=2e-4)
    found = saved(trainer, tmp_path / "a.safetensors", trainable_only=True)
    assert {adapters.parameter_name(name) for name in found} == set(reference.parts)
    for name, value in found.items():
        # Where a gradient is next to nothing, Adam turns its rounding error into a part of a step.
        np.testing.assert_allclose(value, reference.parts[adapters.parameter_name(name)], atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_later_fusing_it_changes_nothing(backend, kind, tmp_path):
    base, trainer = backend(TrainerSpec(model=SPEC, seed=SEED)), trainer_of(backend, kind)
    tokens = make_batch(9).tokens
    np.testing.assert_allclose(trainer.token_losses(tokens), base.token_losses(tokens), atol=2e-6)
    steps(trainer, 8)
    base.load(saved_path(trainer, tmp_path))
    assert np.abs(trainer.token_losses(tokens) - backend(TrainerSpec(model=SPEC, seed=SEED)).token_losses(tokens)).max() > 0.05
    np.testing.assert_allclose(trainer.token_losses(tokens), base.token_losses(tokens), atol=1e-5)


def saved_path(trainer, tmp_path):
    trainer.save(tmp_path / "whole.safetensors")
    return tmp_path / "whole.safetensors"


def test_adafactor_trains_adapters(backend, tmp_path):
    trainer = trainer_of(backend, "dora", optim=OptimSpec(name="adafactor"))
    losses = [trainer.train_step(make_batch(0), 1e-2).read().loss_sums.sum() for _ in range(10)]
    assert losses[-1] < losses[0]
    trainer.save_state(tmp_path / "s.safetensors")
    a = "transformer.h.0.attn.c_attn.lora_A.weight"
    state = load_file(tmp_path / "s.safetensors")
    assert {
        f"exp_avg_sq_row.{a}",
        f"exp_avg_sq_col.{a}",
        "exp_avg_sq.transformer.h.0.attn.c_attn.lora_magnitude_vector.weight",
    } <= set(state)


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained_saved_and_given_moments(backend, kind, tmp_path):
    trainer = trainer_of(backend, adapter=adapter_of(kind, target_modules=("attention",)))
    steps(trainer, 3)
    whole, start = load_file(saved_path(trainer, tmp_path)), dict(initial_weights(SPEC, SEED))
    changed = {name for name in start if not np.array_equal(whole[name], start[name])}
    assert changed == {f"transformer.h.{i}.attn.{name}.weight" for i in range(2) for name in ("c_attn", "c_proj")}
    own = saved(trainer, tmp_path / "own.safetensors", trainable_only=True)
    trainer.save_state(tmp_path / "state.safetensors")
    names = {adapters.parameter_name(name) for name in own}
    moments = {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in names}
    assert set(load_file(tmp_path / "state.safetensors")) == moments | {"step"}
    per_module = 2 if kind == "lora" else 3
    assert len(names) == 4 * per_module
    assert sum(value.size for value in own.values()) == adapters.num_trainable(LINEARS, trainer.spec.adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_continues_exactly_dropout_included(backend, kind, tmp_path):
    straight, resumed = (trainer_of(backend, adapter=adapter_of(kind, dropout=0.3)) for _ in range(2))
    steps(straight, 3)
    straight.save(tmp_path / "a.safetensors", trainable_only=True)
    straight.save_state(tmp_path / "s.safetensors")
    resumed.load(tmp_path / "a.safetensors")
    resumed.load_state(tmp_path / "s.safetensors")
    left, right = steps(straight, 3, first=3), steps(resumed, 3, first=3)
    assert [r.loss_sums.tolist() for r in left] == [r.loss_sums.tolist() for r in right]
    after = [saved(t, tmp_path / "x.safetensors", trainable_only=True) for t in (straight, resumed)]
    assert all(np.array_equal(after[0][name], after[1][name]) for name in after[0])


def test_dropout_is_of_the_adapter_and_of_training_only(backend):
    still, dropping = trainer_of(backend), trainer_of(backend, adapter=adapter_of(dropout=0.5))
    first = [t.train_step(make_batch(0), 1e-2).read() for t in (still, dropping)]
    # B is zero: the first step's losses do not see the adapter, its gradient does.
    assert first[0].loss_sums[0, 0] == pytest.approx(first[1].loss_sums[0, 0], rel=1e-6)
    assert first[0].grad_norm != pytest.approx(first[1].grad_norm, rel=1e-3)
    steps(dropping, 2)
    tokens = make_batch(9).tokens
    np.testing.assert_array_equal(dropping.token_losses(tokens), dropping.token_losses(tokens))


def test_micro_batches_and_recomputed_activations_change_nothing(backend, tmp_path):
    whole, parts = trainer_of(backend, "dora"), trainer_of(backend, "dora", micro_batch_size=2, grad_checkpoint=True)
    left, right = steps(whole, 4), steps(parts, 4)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a.loss_sums, b.loss_sums, rtol=2e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


def test_the_base_is_the_reference_without_a_second_copy(backend, tmp_path):
    trainer, batch = trainer_of(backend), make_batch(5)
    base = backend(TrainerSpec(model=SPEC, seed=SEED))
    trainer.set_reference("adapters_off")
    steps(trainer, 6)
    found, base_losses = trainer.compare(batch.tokens, batch.loss_mask), base.token_losses(batch.tokens)
    np.testing.assert_allclose(found.ref_nll, base_losses * batch.loss_mask, atol=1e-5)
    np.testing.assert_allclose(found.nll, trainer.token_losses(batch.tokens) * batch.loss_mask, atol=1e-5)
    assert found.kl[batch.loss_mask == 1].mean() > 1e-3
    prompts, u = np.ones((3, 2), np.int32), np.random.default_rng(0).random((3, 8))
    np.testing.assert_array_equal(trainer.sample(prompts, u, from_reference=True), base.sample(prompts, u))
    assert all(value is trainer._weights[name] for name, value in trainer._reference.items())


def test_kl_replay_with_adapters_off_is_that_with_a_copy_of_the_start(backend):
    method = MethodSpec(name="kl-replay", coefficients=(1.0, 0.0, 2.0), reference="start")
    off, copy = trainer_of(backend, method=method), trainer_of(backend, method=method)
    off.set_reference("adapters_off")
    copy.set_reference("start")
    term = [0, 0, 0, TERM_REPLAY_KL, TERM_REPLAY_KL, TERM_REPLAY_KL]
    for number in range(5):
        left, right = (t.train_step(make_batch(number, term=term), 1e-2).read() for t in (off, copy))
        np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=1e-4, atol=1e-4)
    assert left.loss_sums[TERM_REPLAY_KL].sum() > 1e-3


def test_bf16_trains_with_fp32_adapters(backend):
    trainer = trainer_of(backend, "dora", precision="bf16")
    losses = [r.loss_sums.sum() for r in [trainer.train_step(make_batch(0), 1e-2).read() for _ in range(8)]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_architecture_of_the_ladder_has_adapters_too(backend, kind, tmp_path):
    """Fused, they are the same model; the reference and sampling see them."""
    spec = model_spec("qknorm-2x32", vocab_size=61, context_length=12)
    made = TrainerSpec(model=spec, adapter=adapter_of(kind), seed=SEED)
    trainer, base = backend(made), backend(TrainerSpec(model=spec, seed=SEED))
    steps(trainer, 8)
    base.load(saved_path(trainer, tmp_path))
    tokens = make_batch(9).tokens
    np.testing.assert_allclose(trainer.token_losses(tokens), base.token_losses(tokens), atol=1e-5)
    trainer.set_reference("adapters_off")
    assert trainer.compare(tokens, np.ones((6, 12), np.uint8)).kl.mean() > 1e-3
    prompts, u = np.ones((3, 2), np.int32), np.random.default_rng(0).random((3, 8))
    np.testing.assert_array_equal(trainer.sample(prompts, u), base.sample(prompts, u))


@pytest.mark.skipif(len(available_backends()) < 2, reason="needs both backends")
@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_on_the_other_architecture(kind):
    spec = model_spec("qknorm-2x32", vocab_size=61, context_length=12)
    trainers = [load_backend(name)(TrainerSpec(model=spec, adapter=adapter_of(kind), seed=SEED)) for name in available_backends()]
    for a, b in zip(*(steps(t, 20) for t in trainers), strict=True):
        assert a.loss_sums.sum() == pytest.approx(b.loss_sums.sum(), rel=2e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=2e-4)


@pytest.mark.skipif(len(available_backends()) < 2, reason="needs both backends")
@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_and_read_each_others_adapters(kind, tmp_path):
    trainers = {name: trainer_of(load_backend(name), kind) for name in available_backends()}
    left, right = (steps(t, 20) for t in trainers.values())
    for a, b in zip(left, right, strict=True):
        assert a.loss_sums.sum() == pytest.approx(b.loss_sums.sum(), rel=2e-5)
    first, second = trainers.values()
    first.save(tmp_path / "a.safetensors", trainable_only=True)
    first.save_state(tmp_path / "s.safetensors")
    second.load(tmp_path / "a.safetensors")
    second.load_state(tmp_path / "s.safetensors")
    for a, b in zip(steps(first, 3, first=30), steps(second, 3, first=30), strict=True):
        assert a.loss_sums.sum() == pytest.approx(b.loss_sums.sum(), rel=2e-5)


def test_whole_weights_start_the_adapters_anew(backend, tmp_path):
    trainer, base = trainer_of(backend, "dora"), backend(TrainerSpec(model=SPEC, seed=8))
    steps(trainer, 3)
    trainer.load(saved_path(base, tmp_path))
    tokens = make_batch(7).tokens
    np.testing.assert_allclose(trainer.token_losses(tokens), base.token_losses(tokens), atol=2e-6)


def test_adapters_of_another_shape_are_refused(backend, tmp_path):
    trainer_of(backend).save(tmp_path / "a.safetensors", trainable_only=True)
    with pytest.raises(UserError, match="does not hold the weights"):
        trainer_of(backend, adapter=adapter_of(rank=2)).load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not hold the weights"):
        backend(TrainerSpec(model=SPEC)).load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("scaling, scale", [("alpha/r", 6.0 / 4), ("alpha/sqrt(r)", 6.0 / 2), ("none", 1.0)])
def test_the_scale_of_each_rule(scaling, scale):
    assert adapter_of(scaling=scaling).scale == pytest.approx(scale)


def test_adapters_start_as_pefts_do():
    parts = dict(adapters.initial_adapters(LINEARS, adapter_of(rank=8), 0))
    a = parts["transformer.h.0.mlp.c_proj" + adapters.A]
    assert a.shape == (8, 128)
    assert np.abs(a).max() <= 128**-0.5
    assert a.std() == pytest.approx(128**-0.5 / 3**0.5, rel=0.05)
    assert not parts["transformer.h.0.mlp.c_proj" + adapters.B].any()
    assert not np.array_equal(a, parts["transformer.h.1.mlp.c_proj" + adapters.A])


def test_only_the_last_blocks_have_adapters_where_that_is_asked():
    assert adapters.adapted_modules(LINEARS, adapter_of(num_layers=1, target_modules=("attention",))) == (
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.attn.c_proj",
    )
    assert adapters.adapted_modules(LINEARS, adapter_of(num_layers=9)) == tuple(LINEARS)


@pytest.mark.parametrize(
    "changes, message",
    [({"target_modules": ("q_proj",)}, "attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"), ({"rank": 33}, "--lora-rank 33 exceeds")],
)
def test_what_cannot_be_adapted_is_said(changes, message):
    with pytest.raises(UserError, match=message):
        adapters.adapted_modules(LINEARS, adapter_of(**changes))
