"""Adapters on checkpoints of other tools: the same on both backends, in peft and in mlx-lm, fused or not."""

import json

import numpy as np
import pytest

from mlx_forget import adapters
from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import find_checkpoint
from mlx_forget.fuse import whole_checkpoint
from mlx_forget.ladder import linear_shapes
from mlx_forget.methods import method_spec
from mlx_forget.pretrained import older_keys, read_config
from mlx_forget.trainer import AdapterSpec, RuntimeSpec, TrainerSpec
from tests.small_checkpoints import write_checkpoint
from tests.test_pretrained import batch_of, nll_of, rows
from tests.training.test_pretrained_runs import write_texts

pytest.importorskip("transformers")

BACKENDS = available_backends()
# Biases of queries and keys, heads that are tied, and logits that are no plain product.
KINDS = ["llama", "qwen2", "gemma2"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: write_checkpoint(folder / kind, kind) for kind in KINDS}


def trainer_of(backend, folder, *, kind="lora", method="plain", target="all-linear", dropout=0.0, **runtime):
    adapter = AdapterSpec(kind=kind, rank=4, alpha=8.0, dropout=dropout, target_modules=(target,))
    spec = TrainerSpec(
        model=find_checkpoint(folder).model_spec(),
        adapter=adapter,
        method=method_spec(method),
        runtime=RuntimeSpec(num_threads=1, **runtime),
        seed=2,
    )
    return load_backend(backend)(spec)


def plain_of(backend, folder, **runtime):
    return load_backend(backend)(
        TrainerSpec(model=find_checkpoint(folder).model_spec(), runtime=RuntimeSpec(num_threads=1, **runtime))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", KINDS)
def test_adapters_start_as_the_base_train_and_fuse(checkpoints, backend, kind, base, tmp_path):
    trainer, plain, tokens = trainer_of(backend, checkpoints[base], kind=kind), plain_of(backend, checkpoints[base]), rows(6)
    start = plain.token_losses(tokens)
    np.testing.assert_allclose(trainer.token_losses(tokens), start, atol=3e-5)
    trainer.set_reference("adapters_off")
    for _ in range(4):
        trainer.train_step(batch_of(tokens), 3e-3)
    after = trainer.token_losses(tokens)
    assert after.mean() < start.mean() - 0.01
    np.testing.assert_allclose(trainer.compare(tokens, np.ones((6, 24), np.uint8)).ref_nll, start, atol=3e-5)
    trainer.save(tmp_path / "whole.safetensors")
    plain.load(tmp_path / "whole.safetensors")
    np.testing.assert_allclose(plain.token_losses(tokens), after, atol=5e-5)
    prompts, u = np.full((2, 2), 5, np.int32), np.random.default_rng(0).random((2, 6))
    np.testing.assert_array_equal(trainer.sample(prompts, u), plain.sample(prompts, u))
    assert all(value is trainer._weights[name] for name, value in trainer._reference.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_dora_in_bf16_starts_as_the_base_and_sees_small_changes_of_length(checkpoints, backend, base, tmp_path):
    from safetensors.numpy import load_file, save_file

    # Of six rows, the rounding of bf16 alone moves the ratio at the end by 0.8.
    tokens = rows(48)
    narrow = plain_of(backend, checkpoints[base], precision="bf16").token_losses(tokens)
    rounding = np.abs(narrow - plain_of(backend, checkpoints[base]).token_losses(tokens))
    changes = []
    for precision in ("fp32", "bf16"):
        trainer = trainer_of(backend, checkpoints[base], kind="dora", precision=precision)
        start = trainer.token_losses(tokens)
        if precision == "bf16":
            apart = np.abs(start - narrow)
            assert rounding.max() > 0
            assert (apart.max(), apart.mean()) <= (rounding.max(), rounding.mean())
        trainer.save(tmp_path / "adapters.safetensors", trainable_only=True)
        stored = load_file(tmp_path / "adapters.safetensors")
        # Less than half a step of bf16 at 1.
        longer = {name: value * np.float32(1.0035 if name.endswith("magnitude_vector") else 1) for name, value in stored.items()}
        save_file(longer, tmp_path / "adapters.safetensors")
        trainer.load(tmp_path / "adapters.safetensors")
        changes.append(trainer.token_losses(tokens) - start)
    exact, found = changes
    assert 0.5 < (exact * found).sum() / (exact * exact).sum() < 1.5


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs both backends")
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", KINDS)
def test_both_backends_take_the_same_steps(checkpoints, kind, base):
    batch = batch_of(rows(6), term=[0, 0, 0, 1, 2, 2])
    readings = []
    for backend in BACKENDS:
        trainer = trainer_of(backend, checkpoints[base], kind=kind, method="kl-replay")
        trainer.set_reference("adapters_off")
        readings.append([trainer.train_step(batch, 1e-3).read() for _ in range(4)])
    for left, right in zip(*readings, strict=True):
        np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=1e-4, atol=1e-3)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_activations_change_nothing(checkpoints, backend):
    """The KL term's forward pass without adapters lies between a pass and its recomputation."""
    batch = batch_of(rows(6), term=[0, 0, 0, 0, 2, 2])
    readings = []
    for runtime in ({}, {"grad_checkpoint": True, "micro_batch_size": 5}):
        trainer = trainer_of(backend, checkpoints["llama"], kind="dora", method="kl-replay", **runtime)
        trainer.set_reference("adapters_off")
        readings.append([trainer.train_step(batch, 1e-3).read() for _ in range(3)])
    for left, right in zip(*readings, strict=True):
        np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=1e-5, atol=1e-4)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_trainer_drops_the_same_inputs(checkpoints, backend, tmp_path):
    straight, resumed = (trainer_of(backend, checkpoints["llama"], dropout=0.4) for _ in range(2))
    batch = batch_of(rows(4))
    straight.train_step(batch, 1e-2).read()
    straight.save(tmp_path / "a.safetensors", trainable_only=True)
    straight.save_state(tmp_path / "s.safetensors")
    resumed.load(tmp_path / "a.safetensors")
    resumed.load_state(tmp_path / "s.safetensors")
    for _ in range(2):
        left, right = straight.train_step(batch, 1e-2).read(), resumed.train_step(batch, 1e-2).read()
        assert left.loss_sums.tolist() == right.loss_sums.tolist()
        assert left.grad_norm == right.grad_norm


def test_targets_are_named_as_the_checkpoint_names_them(checkpoints):
    linears = linear_shapes(find_checkpoint(checkpoints["llama"]).model_spec())
    attention = adapters.adapted_modules(linears, AdapterSpec(rank=2))
    assert {adapters.within_block(name) for name in attention} == {f"self_attn.{part}_proj" for part in "qkvo"}
    assert linears["model.layers.0.mlp.down_proj"] == (64, 32)
    every = {
        adapters.within_block(name)
        for name in adapters.adapted_modules(linears, AdapterSpec(rank=2, target_modules=("all-linear",)))
    }
    assert every == {*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))}
    named = adapters.adapted_modules(linears, AdapterSpec(rank=2, target_modules=("q_proj", "mlp.up_proj")))
    assert {adapters.within_block(name) for name in named} == {"self_attn.q_proj", "mlp.up_proj"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_is_resumed_fused_audited_and_loaded_by_peft_and_mlx_lm(checkpoints, backend, run_forget, tmp_path, monkeypatch):
    torch, PeftModel = pytest.importorskip("torch"), pytest.importorskip("peft").PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    base, notes = checkpoints["qwen2"], write_texts(tmp_path / "notes.jsonl")
    write_texts(tmp_path / "old.jsonl", seed=9)
    keys = ("--iters", "6", "--learning-rate", "3e-3", "--batch-size", "4", "--max-seq-length", "32", "--eval-rows", "8")
    lora = ("--fine-tune-type", "dora", "--lora-r", "4", "--lora-target-modules", "q_proj,mlp.up_proj", "--num-layers", "1")
    lora += ("--compare-to-start",)
    arguments = ("--backend", backend, "--model", base, "--target", notes, "--pretrain", tmp_path / "old.jsonl", *keys, *lora)
    code, out, err = run_forget("train", *arguments, "--output", "run", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["num_trainable_params"] == (4 * (32 + 32) + 32 + 4 * (32 + 64) + 64)
    assert record["losses"]["end"]["forgetting_kl"] > 0
    assert run_forget("fuse", "run", "-o", "fused")[0] == 0
    found, tokens = find_checkpoint("run"), rows()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        before = model(torch.from_numpy(tokens).long()).logits
        theirs = PeftModel.from_pretrained(model, found.folder).eval()(torch.from_numpy(tokens).long()).logits
        fused = AutoModelForCausalLM.from_pretrained("fused").eval()(torch.from_numpy(tokens).long()).logits
    assert (theirs - before).abs().max() > 1e-2
    torch.testing.assert_close(theirs, fused, atol=1e-5 * float(fused.abs().max()), rtol=1e-4)
    expected = nll_of(fused.numpy()[:, :-1], tokens[:, 1:])
    np.testing.assert_allclose(plain_of(backend, "fused").token_losses(tokens), expected, atol=1e-4)
    assert whole_checkpoint(found).state["fused_from"]["base"] == found.state["base"]
    code, out, err = run_forget("audit", "auto", "run", "--data", tmp_path / "old.jsonl", "--backend", backend, "--json")
    assert code == 0, err
    if backend == "mlx":
        import mlx.core as mx
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model

        # mlx-lm does not know how transformers 5 writes the rotary base.
        adapted, _ = load_model(base, model_config=older_keys(read_config(base)))
        logits = np.array(load_adapters(adapted, str(found.folder / "mlx-lm"))(mx.array(tokens)).astype(mx.float32))
        np.testing.assert_allclose(logits, fused.numpy(), atol=1e-4 * np.abs(fused.numpy()).max())
