"""Checkpoints that transformers wrote: read, computed as transformers computes them on every backend, trained, and written back."""

import json
import shutil

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import find_checkpoint
from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec, num_non_embedding_params, num_params
from mlx_forget.methods import method_spec
from mlx_forget.pretrained import older_keys, read_pretrained
from mlx_forget.trainer import AdapterSpec, Batch, OptimSpec, RuntimeSpec, TrainerSpec
from mlx_forget.weight_files import read_tensor, tensor_names, weight_files
from tests.small_checkpoints import CONTEXT, transformers_logits, vocab_size, write_checkpoint, write_tokenizer

pytest.importorskip("transformers")

BACKENDS = available_backends()
# A rotary base that is no default, tied heads, norms of queries and keys, soft-capped logits, scaled logits.
KINDS = ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "cohere"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = write_checkpoint(folder / kind, kind)
        return made[kind]

    return make


def rows(num=4, length=24, seed=0):
    return np.random.default_rng(seed).integers(4, vocab_size(), (num, length + 1)).astype(np.int32)


def nll_of(logits, labels):
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, labels[..., None].astype(int), -1)[..., 0]


def trainer_of(backend, folder, *, method="plain", optim=None, **runtime):
    found = find_checkpoint(folder)
    spec = TrainerSpec(
        model=found.model_spec(),
        method=method_spec(method),
        optim=optim or OptimSpec(),
        runtime=RuntimeSpec(num_threads=1, **runtime),
    )
    trainer = load_backend(backend)(spec)
    if isinstance(spec.model, ModelSpec):
        trainer.load(found.weights)
    return trainer


def batch_of(tokens, term=None):
    zeros = np.zeros(len(tokens), np.uint8)
    mask = np.ones((len(tokens), tokens.shape[1] - 1), np.uint8)
    return Batch(tokens, mask, None, zeros if term is None else np.array(term, np.uint8), zeros)


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_those_of_transformers(checkpoints, kind):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    spec, model = read_pretrained(checkpoints(kind)), AutoModelForCausalLM.from_pretrained(checkpoints(kind))
    assert num_params(spec) == model.num_parameters()
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert num_non_embedding_params(spec) == model.num_parameters() - embedding * (1 if tied else 2)
    assert (spec.vocab_size, spec.context_length, spec.width) == (vocab_size(), CONTEXT, 32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_losses_are_those_of_transformers(checkpoints, backend, kind):
    tokens = rows()
    expected = nll_of(transformers_logits(checkpoints(kind), tokens[:, :-1]), tokens[:, 1:])
    found = trainer_of(backend, checkpoints(kind)).token_losses(tokens)
    # Losses are 5 to 12 nats, so a part in 10^5 of float32's precision.
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


def test_a_gpt2_is_a_rung_of_the_ladder(checkpoints):
    assert isinstance(find_checkpoint(checkpoints("gpt2")).model_spec(), ModelSpec)


def test_a_gpt2_of_another_form_is_not_a_rung(tmp_path, checkpoints):
    config = json.loads((checkpoints("gpt2") / "config.json").read_text())
    for changed in ({"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}, {"tie_word_embeddings": False}):
        folder = tmp_path / next(iter(changed))
        folder.mkdir()
        for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).symlink_to(checkpoints("gpt2") / name)
        (folder / "config.json").write_text(json.dumps(config | changed))
        assert not isinstance(find_checkpoint(folder).model_spec(), ModelSpec)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "cohere", "gemma2"])
@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs both backends")
def test_both_backends_take_the_same_steps(checkpoints, kind, tmp_path):
    from safetensors.numpy import load_file

    batch = batch_of(rows(6), term=[0, 0, 0, 1, 2, 2])
    readings, weights = [], []
    for backend in BACKENDS:
        # AdamW takes a full step from a gradient that is nothing but rounding; with this epsilon it does not.
        trainer = trainer_of(backend, checkpoints(kind), method="kl-replay", optim=OptimSpec(epsilon=1e-6))
        trainer.set_reference("start")
        readings.append([trainer.train_step(batch, 1e-3).read() for _ in range(3)])
        trainer.save(tmp_path / f"{backend}.safetensors")
        weights.append(load_file(tmp_path / f"{backend}.safetensors"))
    for left, right in zip(*readings, strict=True):
        np.testing.assert_allclose(left.loss_sums, right.loss_sums, rtol=1e-4, atol=1e-3)
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-3)
    assert readings[0][2].loss_sums[2].sum() > 0
    for name, left in weights[0].items():
        # Three steps of 1e-3 each: a wrong sign anywhere would show.
        np.testing.assert_allclose(left, weights[1][name], atol=5e-4, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_that_of_autograd_over_transformers(checkpoints, backend):
    """The loss over the model's own logits, differentiated by PyTorch: the gradient's norm is the one that the step reports."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    for kind in ("llama-tied", "gemma2"):
        tokens = rows(3)
        model = AutoModelForCausalLM.from_pretrained(checkpoints(kind), dtype=torch.float32)
        logits = model(torch.from_numpy(tokens[:, :-1]).long()).logits
        labels = torch.from_numpy(tokens[:, 1:]).long().flatten()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
        expected = float(torch.stack([value.grad.norm() for value in model.parameters()]).norm())
        reading = trainer_of(backend, checkpoints(kind)).train_step(batch_of(tokens), 1e-3).read()
        assert reading.grad_norm == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputed_activations_and_micro_batches_change_no_step(checkpoints, backend):
    batch = batch_of(rows(4))
    model = read_pretrained(checkpoints("llama"))
    for adapter, size in ((None, 3), (AdapterSpec(rank=4, dropout=0.2), None)):
        # What adapters drop depends on how a batch is cut.
        frugal = RuntimeSpec(num_threads=1, grad_checkpoint=True, micro_batch_size=size)
        pair = [load_backend(backend)(TrainerSpec(model, adapter=adapter, runtime=r)) for r in (RuntimeSpec(num_threads=1), frugal)]
        for _ in range(2):
            left, right = (trainer.train_step(batch, 1e-3).read() for trainer in pair)
            assert left.grad_norm == pytest.approx(right.grad_norm, rel=1e-4)
            assert left.loss_sums.sum() == pytest.approx(right.loss_sums.sum(), rel=1e-5)


def test_documents_of_a_row_do_not_see_each_other(checkpoints):
    pytest.importorskip("torch")
    tokens = rows(2)
    segment = np.zeros((2, 24), np.int32)
    segment[:, 10:] = 1
    for kind in ("llama", "gemma2"):
        whole = trainer_of("cuda", checkpoints(kind)).token_losses(tokens, segment)
        first = nll_of(transformers_logits(checkpoints(kind), tokens[:, :10]), tokens[:, 1:11])
        second = nll_of(transformers_logits(checkpoints(kind), tokens[:, 10:-1]), tokens[:, 11:])
        np.testing.assert_allclose(whole, np.concatenate([first, second], axis=1), atol=3e-5)


@pytest.mark.skipif("mlx" not in BACKENDS, reason="needs MLX")
def test_mlx_refuses_document_masks_it_does_not_have(checkpoints):
    with pytest.raises(UserError, match="--rows padded"):
        trainer_of("mlx", checkpoints("llama")).token_losses(rows(1), np.zeros((1, 24), np.int32))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_samples_follow_the_cache_free_model(checkpoints, kind):
    """Each sampled token is the first whose cumulative probability exceeds its uniform, by transformers' own logits."""
    prompts, u = np.full((3, 2), 7, np.int32), np.random.default_rng(3).random((3, 6))
    for backend in BACKENDS:
        out = trainer_of(backend, checkpoints(kind)).sample(prompts, u, temperature=0.7)
        logits = transformers_logits(checkpoints(kind), np.concatenate([prompts, out], axis=1)).astype(np.float64)[:, 1:-1] / 0.7
        cumulative = np.exp(logits - logits.max(-1, keepdims=True)).cumsum(-1)
        expected = (cumulative <= u[..., None] * cumulative[..., -1:]).sum(-1)
        np.testing.assert_array_equal(out, expected)
        first = trainer_of(backend, checkpoints(kind)).sample(prompts, u, temperature=0.7, num_ids=9)
        assert first.max() < 9 <= out.max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_audit_trainer_holds_what_it_is_given(checkpoints, backend, tmp_path):
    tokens = rows(3)
    mask = np.ones((3, 24), np.uint8)
    other = write_checkpoint(tmp_path / "other", "llama", seed=5)
    trainer = trainer_of(backend, checkpoints("llama"), reads_only=True)
    trainer.load(other)
    trainer.set_reference(checkpoints("llama"))
    found = trainer.compare(tokens, mask)
    for folder, nll in ((other, found.nll), (checkpoints("llama"), found.ref_nll)):
        expected = nll_of(transformers_logits(folder, tokens[:, :-1]), tokens[:, 1:])
        np.testing.assert_allclose(nll, expected, atol=3e-5, rtol=2e-5)
    assert found.kl.mean() > 0.1


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_those_of_peft(checkpoints, tmp_path, kind):
    """Steps on both backends, then the adapters in peft: the same losses, and the base is untouched."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from mlx_forget.adapters import write_configs
    from mlx_forget.ladder import linear_shapes

    adapter = AdapterSpec(kind=kind, rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
    tokens, held_out, found = rows(4), rows(2, seed=1), []
    for backend in BACKENDS:
        folder = tmp_path / backend
        folder.mkdir()
        spec = read_pretrained(checkpoints("qwen2"))
        runtime = RuntimeSpec(num_threads=1, grad_checkpoint=True)
        trainer = load_backend(backend)(TrainerSpec(model=spec, adapter=adapter, method=method_spec("kl-replay"), runtime=runtime))
        trainer.set_reference("adapters_off")
        before = trainer.token_losses(held_out)
        for _ in range(3):
            reading = trainer.train_step(batch_of(tokens, term=[0, 0, 2, 2]), 1e-2).read()
        after = trainer.token_losses(held_out)
        assert np.abs(after - before).max() > 1e-3
        np.testing.assert_allclose(trainer.compare(held_out, np.ones((2, 24), np.uint8)).ref_nll, before, atol=2e-5)
        trainer.save(folder / "adapter_model.safetensors", trainable_only=True)
        base = str(checkpoints("qwen2"))
        write_configs(folder, adapter, linear_shapes(spec), base=base, num_layers=2, model_type="qwen2")
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        with torch.no_grad():
            logits = model(torch.from_numpy(held_out[:, :-1]).long()).logits.numpy()
        np.testing.assert_allclose(nll_of(logits, held_out[:, 1:]), after, atol=5e-5)
        trainer.save(folder / "model.safetensors")
        fused = load_file(folder / "model.safetensors")
        moved = {
            name
            for name, value in load_file(checkpoints("qwen2") / "model.safetensors").items()
            if not torch.equal(value, fused[name])
        }
        assert {name.split(".")[-2] for name in moved} == {"q_proj", "down_proj"}
        found.append((after, reading))
        if backend == "mlx" and kind == "lora":
            import mlx.core as mx
            from mlx_lm import load

            # mlx-lm reads the rotary base where transformers 5 no longer writes it.
            shutil.copytree(base, tmp_path / "base")
            config = older_keys(json.loads((tmp_path / "base" / "config.json").read_text()))
            (tmp_path / "base" / "config.json").write_text(json.dumps(config))
            own, _ = load(str(tmp_path / "base"), adapter_path=str(folder / "mlx-lm"))
            np.testing.assert_allclose(np.array(own(mx.array(held_out[:, :-1])).astype(mx.float32)), logits, atol=1e-3)
    for after, reading in found[1:]:
        np.testing.assert_allclose(after, found[0][0], atol=1e-4)
        assert reading.grad_norm == pytest.approx(found[0][1].grad_norm, rel=1e-3)
        assert reading.loss_sums[2].sum() == pytest.approx(found[0][1].loss_sums[2].sum(), rel=1e-3)


@pytest.mark.skipif("mlx" not in BACKENDS, reason="needs MLX")
def test_adapters_sit_on_a_quantised_base_on_mlx_and_nowhere_else(checkpoints, tmp_path):
    import mlx.core as mx
    from mlx_lm import convert, load

    from mlx_forget.adapters import write_configs
    from mlx_forget.ladder import linear_shapes

    folder = tmp_path / "quantised"
    convert(str(checkpoints("llama")), str(folder), quantize=True, q_group_size=32, q_bits=8)
    # What mlx-lm converts, it also reads with another rotary base than was written: see `older_keys`.
    (folder / "config.json").write_text(json.dumps(older_keys(json.loads((folder / "config.json").read_text()))))
    spec, tokens = read_pretrained(folder), rows(3)
    assert spec.num_params == read_pretrained(checkpoints("llama")).num_params
    refusals = {"mlx": "give --fine-tune-type lora", "cuda": "PyTorch does not train here"}
    for backend in BACKENDS:
        with pytest.raises(UserError, match=refusals[backend]):
            load_backend(backend)(TrainerSpec(model=spec, runtime=RuntimeSpec(num_threads=1)))
    adapter = AdapterSpec(rank=4)
    runtime = RuntimeSpec(num_threads=1, grad_checkpoint=True)
    trainer = load_backend("mlx")(TrainerSpec(model=spec, adapter=adapter, method=method_spec("kl-replay"), runtime=runtime))
    trainer.load(find_checkpoint(folder).weights)
    trainer.set_reference("adapters_off")
    model, _ = load(str(folder))
    expected = nll_of(np.array(model(mx.array(tokens[:, :-1])).astype(mx.float32)), tokens[:, 1:])
    np.testing.assert_allclose(trainer.token_losses(tokens), expected, atol=2e-2)
    for _ in range(5):
        trainer.train_step(batch_of(tokens, term=[0, 0, 2]), 1e-2).read()
    after = trainer.token_losses(tokens)
    assert after[:2].mean() < expected[:2].mean() - 1e-2
    np.testing.assert_allclose(trainer.compare(tokens, np.ones((3, 24), np.uint8)).ref_nll, expected, atol=2e-2)
    kept = trainer.log_probs(tokens, from_reference=True)
    np.testing.assert_allclose(-np.take_along_axis(kept, tokens[:, 1:, None], -1)[..., 0], expected, atol=2e-2)
    run = tmp_path / "run"
    run.mkdir()
    trainer.save(run / "adapter_model.safetensors", trainable_only=True)
    write_configs(run, adapter, linear_shapes(spec), base=str(folder), num_layers=2, model_type="llama")
    tuned, _ = load(str(folder), adapter_path=str(run / "mlx-lm"))
    found = nll_of(np.array(tuned(mx.array(tokens[:, :-1])).astype(mx.float32)), tokens[:, 1:])
    np.testing.assert_allclose(found, after, atol=2e-2)


def test_weights_in_parts_and_in_half_precision_are_read(checkpoints, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints("qwen2"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    write_tokenizer(tmp_path)
    assert len(weight_files(tmp_path)) > 2
    tokens = rows(2)
    expected = nll_of(transformers_logits(tmp_path, tokens[:, :-1]), tokens[:, 1:])
    for backend in BACKENDS:
        trainer = trainer_of(backend, tmp_path)
        np.testing.assert_allclose(trainer.token_losses(tokens), expected, atol=2e-5, rtol=2e-5)
        trainer.load(find_checkpoint(tmp_path).weights)
        np.testing.assert_allclose(trainer.token_losses(tokens), expected, atol=2e-5, rtol=2e-5)
    weights = {name: value.detach().float().numpy() for name, value in model.named_parameters()}
    for file in weight_files(tmp_path):
        for name in tensor_names(file):
            np.testing.assert_array_equal(read_tensor(file, name), weights[name])
    next(file for file in weight_files(tmp_path)).unlink()
    with pytest.raises(UserError, match="lacks 1 of its"):
        find_checkpoint(tmp_path)


def test_the_rotary_base_is_also_written_where_older_readers_look():
    config = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    found = older_keys(config)
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    nested = older_keys({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}})
    assert (nested["rope_theta"], nested["rope_local_base_freq"]) == (1e6, 1e4)
    assert older_keys({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5.0}})["rope_theta"] == 7.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ladder_checkpoint_goes_to_transformers_and_returns(backend, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from mlx_forget.checkpoint import save_checkpoint
    from mlx_forget.ladder import model_spec

    write_tokenizer(tmp_path / "tokenizer")
    spec = model_spec("2x32", vocab_size(), CONTEXT)
    trainer = load_backend(backend)(TrainerSpec(model=spec, runtime=RuntimeSpec(num_threads=1), seed=3))
    save_checkpoint(tmp_path / "last", trainer, spec, tmp_path / "tokenizer" / "tokenizer.json", {}, with_training_state=False)
    tokens = rows(3)
    ours = trainer.token_losses(tokens)
    np.testing.assert_allclose(nll_of(transformers_logits(tmp_path / "last", tokens[:, :-1]), tokens[:, 1:]), ours, atol=1e-5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "last").save_pretrained(tmp_path / "back")
    write_tokenizer(tmp_path / "back")
    back = find_checkpoint(tmp_path / "back")
    assert back.model_spec() == spec
    trainer.load(back.weights)
    np.testing.assert_array_equal(trainer.token_losses(tokens), ours)
