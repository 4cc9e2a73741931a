"""IA3, and finetuning of the last blocks alone: on both backends, against autograd and peft, saved, resumed and fused."""

import json

import numpy as np
import pytest

from mlx_forget import adapters
from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import find_checkpoint
from mlx_forget.costs import state_bytes
from mlx_forget.errors import UserError
from mlx_forget.ladder import initial_weights, linear_shapes, model_spec, num_params
from mlx_forget.methods import method_spec
from mlx_forget.trainer import AdapterSpec, OptimSpec, RuntimeSpec, TrainerSpec
from tests.backends.test_adapters import make_batch
from tests.reference import GPT2, AdamW
from tests.small_checkpoints import write_checkpoint
from tests.test_pretrained import batch_of, nll_of, rows
from tests.training.test_pretrained_runs import STEPS, write_texts

BACKENDS = available_backends()
SPEC = model_spec("2x32", vocab_size=61, context_length=12)
LINEARS = linear_shapes(SPEC)
IA3 = AdapterSpec(kind="ia3")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bases")
    return {kind: write_checkpoint(folder / kind, kind) for kind in ("llama", "qwen2")}


def trainer_of(backend, model, *, adapter=None, num_layers=None, method="plain", optim=None, **runtime):
    runtime = RuntimeSpec(num_threads=1, **runtime)
    spec = TrainerSpec(model, optim or OptimSpec(), method_spec(method), adapter, runtime, seed=2, num_layers=num_layers)
    return load_backend(backend)(spec)


def saved(trainer, path, **how):
    from safetensors.numpy import load_file

    trainer.save(path, **how)
    return load_file(path)


def test_what_the_last_blocks_need_is_less_than_what_every_weight_needs(backend):
    """A limit of memory counts gradients and moments of what is trained, as the optimiser keeps them."""
    model, adafactor = SPEC, OptimSpec(name="adafactor")
    num, last = num_params(model), sum(v.size for n, v in initial_weights(model, 2) if n.startswith("transformer.h.1."))
    spec = TrainerSpec(model, num_layers=1)
    assert state_bytes(TrainerSpec(model)) == 16 * num
    assert state_bytes(spec) == 4 * num + 12 * last
    assert state_bytes(TrainerSpec(model, adafactor)) < 9 * num
    # The Fisher information is that of what is trained.
    trainer, rows = trainer_of(backend, model, num_layers=1, method="ewc"), make_batch(0)
    trainer.set_reference("start")
    trainer.set_fisher(rows.tokens, rows.loss_mask)
    assert np.isfinite(trainer.train_step(rows, 1e-3).read().grad_norm)


def test_vectors_sit_on_keys_values_and_the_way_down():
    shapes = adapters.parameter_shapes(LINEARS, IA3)
    block = "transformer.h.0."
    assert {name: shape for name, shape in shapes.items() if name.startswith(block)} == {
        f"{block}attn.c_attn{adapters.VECTOR}": (96, 1),
        f"{block}mlp.c_proj{adapters.VECTOR}": (1, 128),
    }
    every = adapters.parameter_shapes(LINEARS, AdapterSpec(kind="ia3", target_modules=("all-linear",)))
    assert every[f"{block}mlp.c_fc{adapters.VECTOR}"] == (128, 1)
    assert len(every) == 8


@pytest.mark.parametrize("target", [(), ("all-linear",)])
def test_ten_steps_of_ia3_match_numpy(backend, target, tmp_path):
    adapter, optim = AdapterSpec(kind="ia3", target_modules=target), OptimSpec(weight_decay=0.1)
    base = {name: np.float64(value) for name, value in initial_weights(SPEC, 2)}
    vectors = {name: np.float64(value) for name, value in adapters.initial_adapters(LINEARS, adapter, 2)}
    adamw, trainer = AdamW(optim), trainer_of(backend, SPEC, adapter=adapter, optim=optim)

    def fused():
        own = dict(base)
        for name, vector in vectors.items():
            module = adapters.module_of(name)
            own[f"{module}.weight"] = base[f"{module}.weight"] * vector.T
            if vector.shape[1] == 1:
                own[f"{module}.bias"] = base[f"{module}.bias"] * vector[:, 0]
        return own

    for number in range(10):
        batch = make_batch(number)
        reading = trainer.train_step(batch, 1e-2).read()
        whole = GPT2(fused(), SPEC).gradients(batch.tokens, batch.loss_mask / batch.loss_mask.sum())
        found = {}
        for name, vector in vectors.items():
            module = adapters.module_of(name)
            product = (whole[f"{module}.weight"] * base[f"{module}.weight"]).T
            bias = whole[f"{module}.bias"] * base[f"{module}.bias"]
            found[name] = product.sum(1, keepdims=True) + bias[:, None] if vector.shape[1] == 1 else product.sum(0, keepdims=True)
        # No vector decays: its rest is one.
        vectors, norm = adamw.update(vectors, found, 1e-2, lambda name: False)
        assert reading.grad_norm == pytest.approx(norm, rel=1e-4)
    tokens = make_batch(50).tokens
    np.testing.assert_allclose(trainer.token_losses(tokens), GPT2(fused(), SPEC).losses(tokens), atol=2e-4)
    own = saved(trainer, tmp_path / "a.safetensors", trainable_only=True)
    assert {adapters.parameter_name(name) for name in own} == set(vectors)
    # Fused, it is the same model, biases included.
    plain = trainer_of(backend, SPEC)
    trainer.save(tmp_path / "whole.safetensors")
    plain.load(tmp_path / "whole.safetensors")
    np.testing.assert_allclose(plain.token_losses(tokens), trainer.token_losses(tokens), atol=1e-5)
    prompts, u = np.ones((3, 2), np.int32), np.random.default_rng(0).random((3, 6))
    np.testing.assert_array_equal(plain.sample(prompts, u), trainer.sample(prompts, u))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_ia3_on_a_checkpoint_is_pefts(backend, checkpoints, kind, grad_checkpoint, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, tokens = find_checkpoint(checkpoints[kind]).model_spec(), rows(4)
    trainer = trainer_of(backend, model, adapter=IA3, method="kl-replay", grad_checkpoint=grad_checkpoint)
    trainer.set_reference("adapters_off")
    before = trainer.token_losses(tokens)
    np.testing.assert_allclose(before, trainer_of(backend, model).token_losses(tokens), atol=1e-5)

    def theirs():
        trainer.save(tmp_path / adapters.WEIGHTS, trainable_only=True)
        linears, base = linear_shapes(model), str(checkpoints[kind])
        written = adapters.peft_config(IA3, linears, base=base, model_type=model.model_type)
        (tmp_path / adapters.CONFIG).write_text(json.dumps(written))
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(whole, tmp_path, is_trainable=True)

    for _ in range(3):
        trainer.train_step(batch_of(tokens, term=[0, 0, 0, 2]), 2e-2).read()
    tuned = theirs()
    logits = tuned(torch.from_numpy(tokens[:, :-1]).long()).logits
    after = trainer.token_losses(tokens)
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(after, nll_of(logits.detach().numpy(), tokens[:, 1:]), atol=5e-5)
    # The next step's gradient is that of autograd over peft's model.
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).long().flatten()).backward()
    norm = torch.stack([value.grad.norm() for value in tuned.parameters() if value.grad is not None]).norm()
    assert trainer.train_step(batch_of(tokens), 1e-3).read().grad_norm == pytest.approx(float(norm), rel=1e-4)
    np.testing.assert_allclose(trainer.compare(tokens, np.ones((4, 24), np.uint8)).ref_nll, before, atol=2e-5)


@pytest.mark.parametrize("how", [{"adapter": IA3}, {"num_layers": 1}])
def test_a_resumed_trainer_goes_on_exactly(backend, checkpoints, how, tmp_path):
    from safetensors.numpy import load_file

    for model in (SPEC, find_checkpoint(checkpoints["llama"]).model_spec()):
        straight, resumed = (trainer_of(backend, model, **how) for _ in range(2))
        batch = make_batch(0) if model is SPEC else batch_of(rows(4))
        straight.train_step(batch, 1e-2).read()
        straight.save(tmp_path / "w.safetensors", trainable_only=True)
        straight.save_state(tmp_path / "s.safetensors")
        trained = adapters.trained_names(straight._weights, how.get("adapter"), how.get("num_layers"))
        assert {name.split(".", 1)[1] for name in load_file(tmp_path / "s.safetensors") if "." in name} == set(trained)
        resumed.load(tmp_path / "w.safetensors")
        resumed.load_state(tmp_path / "s.safetensors")
        for _ in range(2):
            left, right = (t.train_step(batch, 1e-2).read() for t in (straight, resumed))
            assert left.loss_sums.tolist() == right.loss_sums.tolist()
            assert left.grad_norm == right.grad_norm


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_the_last_blocks_alone_are_trained_with_the_gradient_of_autograd(backend, checkpoints, grad_checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    tokens, folder = rows(4), checkpoints["qwen2"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = theirs(torch.from_numpy(tokens[:, :-1]).long()).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens[:, 1:]).long().flatten()).backward()
    last = [value.grad.norm() for name, value in theirs.named_parameters() if ".layers.1." in name]
    model = find_checkpoint(folder).model_spec()
    trainer = trainer_of(backend, model, num_layers=1, method="kl-replay", grad_checkpoint=grad_checkpoint)
    trainer.set_reference("start")
    assert trainer.train_step(batch_of(tokens), 1e-2).read().grad_norm == pytest.approx(float(torch.stack(last).norm()), rel=1e-4)
    kl = trainer.train_step(batch_of(tokens, term=[0, 0, 2, 2]), 1e-2).read().loss_sums[2].sum()
    assert kl > 1e-2
    after, start = saved(trainer, tmp_path / "w.safetensors"), load_file(folder / "model.safetensors")
    assert {name for name in start if not np.array_equal(start[name], after[name])} == {n for n in start if ".layers.1." in n}


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs both backends")
@pytest.mark.parametrize("how", [{"adapter": IA3}, {"num_layers": 1}])
def test_backends_agree_on_the_ladder(how):
    for size in ("2x32", "qknorm-2x32"):
        spec = model_spec(size, vocab_size=61, context_length=12)
        left, right = (trainer_of(name, spec, **how) for name in BACKENDS)
        for number in range(10):
            a, b = (trainer.train_step(make_batch(number), 1e-2).read() for trainer in (left, right))
            assert a.loss_sums.sum() == pytest.approx(b.loss_sums.sum(), rel=2e-5)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=2e-4)


def test_runs_are_saved_fused_audited_and_loaded_elsewhere(backend, checkpoints, run_forget, tmp_path, monkeypatch):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    base, notes, tokens = checkpoints["qwen2"], write_texts(tmp_path / "notes.jsonl"), torch.from_numpy(rows()).long()
    data = ("--model", base, "--target", notes, "--pretrain", "none", "--p", "0", *STEPS, "--backend", backend, "--json")
    code, out, err = run_forget("train", *data, "--fine-tune-type", "ia3", "--num-layers", "1", "--output", "ia3")
    assert code == 0, err
    record = json.loads(out)
    # Keys and values of one block are 16 wide each, and 64 numbers enter the way down.
    assert record["num_trainable_params"] == 16 + 16 + 64
    assert record["losses"]["end"]["target_val"] < record["losses"]["start"]["target_val"]
    code, out, err = run_forget("train", *data, "--num-layers", "1", "--output", "last")
    assert code == 0, err
    record = json.loads(out)
    assert record["num_trainable_params"] == (record["num_non_embedding_params"] - 32) // 2
    assert run_forget("fuse", "ia3", "-o", "fused")[0] == 0
    assert run_forget("audit", base, "fused", "--data", f"notes={notes}", "--backend", backend)[0] == 0
    folder = find_checkpoint("ia3").folder
    assert not (folder / adapters.MLX_LM).exists()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        before = model(tokens).logits
        theirs = peft.PeftModel.from_pretrained(model, folder).eval()(tokens).logits
        fused = AutoModelForCausalLM.from_pretrained("fused").eval()(tokens).logits
        last = AutoModelForCausalLM.from_pretrained(find_checkpoint("last").folder).eval()(tokens).logits
    torch.testing.assert_close(theirs, fused, atol=1e-5 * float(fused.abs().max()), rtol=1e-4)
    assert min((theirs - before).abs().max(), (last - before).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--fine-tune-type", "ia3", "--lora-rank", "4"), "--fine-tune-type is ia3, which has no rank"),
        (("--num-layers", "1", "--init", "scratch"), "starts from scratch"),
        (("--num-layers", "1", "--method", "l2-sp"), "is by l2-sp"),
        (("--num-layers", "0"), "--num-layers must be positive"),
        (("--num-layers", "99", "--dry-run"), "--num-layers is 99, but 0.16m has 2 blocks"),
        (("--num-layers", "3", "--fine-tune-type", "lora", "--dry-run"), "--num-layers is 3, but 0.16m has 2 blocks"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(run_forget, backend, arguments, message):
    code, _, err = run_forget("train", "--backend", backend, *arguments)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err


def test_ia3_has_no_inputs_to_leave_out():
    with pytest.raises(UserError, match="leave dropout at 0"):
        AdapterSpec(kind="ia3", dropout=0.1)


@pytest.mark.skipif("mlx" not in BACKENDS, reason="needs MLX")
def test_ia3_needs_whole_weights(checkpoints, tmp_path):
    from mlx_lm import convert

    convert(str(checkpoints["llama"]), str(tmp_path / "q"), quantize=True, q_group_size=32, q_bits=8)
    with pytest.raises(UserError, match="ia3 needs whole weights"):
        trainer_of("mlx", find_checkpoint(tmp_path / "q").model_spec(), adapter=IA3)
