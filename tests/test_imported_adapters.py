"""Adapters that peft and mlx-lm wrote: on their base they compute what those tools compute, in every command, or they are refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_forget import imported_adapters
from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import find_checkpoint
from mlx_forget.errors import UserError
from mlx_forget.fuse import fuse, whole_checkpoint
from mlx_forget.ladder import ModelSpec
from mlx_forget.pretrained import older_keys, read_config
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from mlx_forget.weight_files import read_tensor, tensor_dtype, tensor_names, write_tensors
from tests.small_checkpoints import CONTEXT, write_checkpoint
from tests.test_pretrained import nll_of, rows
from tests.training.test_pretrained_runs import STEPS, write_texts

pytest.importorskip("transformers")

BACKENDS = available_backends()
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", "qalora_group_size": 16}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    # Biases of queries and keys; matrices that are stored [in, out].
    return {kind: write_checkpoint(folder / kind, kind) for kind in ("llama", "qwen2", "gpt2")}


def losses_of(backend, folder, tokens):
    found = whole_checkpoint(find_checkpoint(folder))
    trainer = load_backend(backend)(TrainerSpec(model=found.model_spec(), runtime=RuntimeSpec(num_threads=1)))
    if isinstance(found.model_spec(), ModelSpec):
        trainer.load(found.weights)
    return trainer.token_losses(tokens)


def write_adapter(folder, base, *, rank=4, modules=("q_proj",), scale=0.5, arrays=None, **config):
    """LoRA in the form of peft, written by hand."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": str(base), "r": rank} | config))
    generator = np.random.default_rng(0)
    made = {}
    for number in range(2):
        for module in modules:
            place = f"base_model.model.model.layers.{number}.self_attn.{module}."
            made[place + "lora_A.weight"] = generator.standard_normal((rank, 32)).astype(np.float32) * scale
            made[place + "lora_B.weight"] = generator.standard_normal((32, rank)).astype(np.float32) * scale
    save_file(made | (arrays or {}), folder / "adapter_model.safetensors")
    return folder


PEFT = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1]},
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["k_proj", "up_proj"], "init_lora_weights": "gaussian"},
    "head": {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head", "o_proj"]},
    "gpt2": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "gpt2-dora": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    "ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}


@pytest.mark.parametrize("name", PEFT)
def test_adapters_of_peft_compute_what_peft_computes(bases, name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = bases["gpt2" if name.startswith("gpt2") else "qwen2" if name == "rslora" else "llama"]
    torch.manual_seed(0)
    make = peft.IA3Config if name == "ia3" else peft.LoraConfig
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), make(task_type="CAUSAL_LM", **PEFT[name])
    )
    with torch.no_grad():
        for key, value in model.named_parameters():
            if any(part in key for part in ("lora_", "ia3_l")):
                value.add_(torch.randn_like(value) * 0.3)
    # Of an adapted head, peft also saves the base unless it is told not to, which is refused.
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    tokens = rows()
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens[:, :-1]).long()).logits.numpy()
        before = AutoModelForCausalLM.from_pretrained(base)(torch.from_numpy(tokens[:, :-1]).long()).logits.numpy()
    assert np.abs(logits - before).max() > 0.1
    for backend in BACKENDS:
        np.testing.assert_allclose(
            losses_of(backend, tmp_path / "theirs", tokens), nll_of(logits, tokens[:, 1:]), atol=5e-5, rtol=2e-5
        )


@pytest.mark.skipif("mlx" not in BACKENDS, reason="needs MLX")
@pytest.mark.parametrize(("kind", "base"), [("lora", "llama"), ("dora", "qwen2"), ("lora", "gpt2")])
def test_adapters_of_mlx_lm_compute_what_mlx_lm_computes(bases, kind, base, tmp_path):
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model

    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0}
    module = "attn.c_attn" if base == "gpt2" else "mlp.up_proj"
    folder = bases[base]
    if base == "gpt2":
        # In the names of GPT-2's first files, which are the ones that mlx-lm reads.
        folder = shutil.copytree(bases[base], tmp_path / "bare")
        weights = load_file(folder / "model.safetensors")
        save_file({name.removeprefix("transformer."): value for name, value in weights.items()}, folder / "model.safetensors")
    config = {
        "fine_tune_type": kind,
        "num_layers": 1,
        "lora_parameters": {**parameters, "keys": [module]},
        "model": str(folder),
    }
    whole = older_keys(read_config(folder)) | {"n_ctx": CONTEXT}
    model, _ = load_model(folder, model_config=whole)
    linear_to_lora_layers(model, 1, config["lora_parameters"], use_dora=kind == "dora")
    names = [name for name, _ in tree_flatten(model.parameters()) if name.endswith(("lora_a", "lora_b", ".m"))]
    mx.random.seed(0)
    arrays = {
        name: value + 0.3 * mx.random.normal(value.shape) for name, value in tree_flatten(model.parameters()) if name in names
    }
    (tmp_path / "theirs").mkdir()
    mx.save_safetensors(str(tmp_path / "theirs" / "adapters.safetensors"), arrays)
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    tokens = rows()
    adapted = load_adapters(load_model(folder, model_config=whole)[0], str(tmp_path / "theirs"))
    logits = np.array(adapted(mx.array(tokens[:, :-1])).astype(mx.float32))
    for backend in BACKENDS:
        np.testing.assert_allclose(
            losses_of(backend, tmp_path / "theirs", tokens), nll_of(logits, tokens[:, 1:]), atol=5e-5, rtol=2e-5
        )
        assert np.abs(losses_of(backend, tmp_path / "theirs", tokens) - losses_of(backend, folder, tokens)).max() > 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_commands_take_an_adapter_where_they_take_a_model(bases, backend, run_forget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = write_adapter(tmp_path / "theirs", bases["llama"])
    notes, on = write_texts(tmp_path / "notes.jsonl"), ("--backend", backend)
    readings = []
    for named in ("auto", bases["llama"]):
        code, out, err = run_forget("audit", named, adapter, "--data", "notes=notes.jsonl", *on, "--json")
        assert code == 0, err
        readings.append(json.loads(out))
    assert readings[0]["texts"][0]["losses"] == readings[1]["texts"][0]["losses"]
    assert readings[0]["tuned"]["description"] == f"adapters {readings[0]['tuned']['name']} on {bases['llama']}"
    moved = {tensor["name"].split(".")[-2] for tensor in readings[0]["weights"]["tensors"] if tensor["distance"] > 0}
    assert moved == {"q_proj"}
    code, out, err = run_forget("fuse", adapter, "-o", "whole", "--json")
    assert code == 0, err
    assert json.loads(out)["fused_from"]["base"]["folder"] == str(bases["llama"])
    tokens = rows()
    np.testing.assert_array_equal(losses_of(backend, "whole", tokens), losses_of(backend, adapter, tokens))
    code, out, err = run_forget("replay", adapter, "-o", "store", "--num-tokens", "200", "--length", "20", *on)
    assert code == 0, err
    # Finetuning goes on from both together, at the rate for models of other tools where nobody says.
    rate = STEPS.index("--learning-rate")
    arguments = ("--init", adapter, "--target", notes, "--pretrain", "none", "--p", "0", *STEPS[:rate], *STEPS[rate + 2 :], *on)
    code, out, err = run_forget("train", *arguments, "--fine-tune-type", "lora", "--output", "run", "--json")
    assert code == 0, err
    assert json.loads(out)["learning_rate"] == 1e-5
    assert "rows start with '<|bos|>'" in err
    assert f"which are taken on {bases['llama']}" in err
    found = find_checkpoint(tmp_path / "run")
    assert found.state["base"]["weights_sha256"] == whole_checkpoint(find_checkpoint(adapter)).state["files"]["model.safetensors"]


def test_adapters_whose_base_is_elsewhere_take_the_one_that_is_given(bases, run_forget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapter = write_adapter(tmp_path / "theirs", "somebody/small-llama", revision="main")
    write_texts(tmp_path / "notes.jsonl")
    code, _, err = run_forget("audit", bases["llama"], adapter, "--data", "notes=notes.jsonl", "--json")
    assert code == 0, err
    assert f"are taken on {bases['llama']}" in " ".join(err.split())
    code, _, err = run_forget("train", "--init", adapter, "--target", "notes.jsonl", "--pretrain", "none", "--p", "0", *STEPS)
    assert code == 2
    assert "adapters for somebody/small-llama@main" in err
    assert "--base BASE -o WHOLE" in err
    assert run_forget("fuse", adapter, "--base", bases["llama"], "-o", "whole")[0] == 0
    assert (
        run_forget("train", "--init", "whole", "--target", "notes.jsonl", "--pretrain", "none", "--p", "0", *STEPS, "--dry-run")[0]
        == 0
    )
    # The scale is not in the weights: another one is another model.
    shutil.copytree(adapter, tmp_path / "twice")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "twice" / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 16, "base_model_name_or_path": str(bases["llama"])})
    )
    tokens = rows()
    assert np.abs(losses_of(BACKENDS[0], "twice", tokens) - losses_of(BACKENDS[0], "whole", tokens)).max() > 0.01


def test_half_precision_adapters_are_read(bases, tmp_path):
    adapter = write_adapter(tmp_path / "whole", bases["llama"])
    stored = load_file(adapter / "adapter_model.safetensors")
    half = write_adapter(tmp_path / "half", bases["llama"])
    save_file({name: value.astype(np.float16) for name, value in stored.items()}, half / "adapter_model.safetensors")
    tokens = rows(2)
    left, right = (losses_of(BACKENDS[0], folder, tokens) for folder in (adapter, half))
    assert 0 < np.abs(left - right).max() < 0.05


def test_a_copy_of_the_base_is_named_where_it_is(bases, run_forget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "notes.jsonl")
    copied = shutil.copytree(bases["llama"], tmp_path / "copied")
    for base in (bases["llama"], copied):
        adapter = write_adapter(tmp_path / f"on-{base.name}", base)
        code, out, err = run_forget("audit", "auto", adapter, "--data", "notes=notes.jsonl", "--json")
        assert code == 0, err
        assert json.loads(out)["tuned"]["description"].endswith(f" on {base}")


LAYER = "base_model.model.model.layers.0."
REFUSED = [
    ({"peft_type": "PREFIX_TUNING"}, {}, "an adapter of peft's type PREFIX_TUNING"),
    ({"modules_to_save": ["lm_head"]}, {}, "an adapter with modules_to_save"),
    ({"rank_pattern": {"q_proj": 2}}, {}, "an adapter with rank_pattern"),
    ({"alpha_pattern": {"q_proj": 2}}, {}, "an adapter with alpha_pattern"),
    ({"bias": "lora_only"}, {}, "an adapter with bias: lora_only"),
    ({"init_lora_weights": "pissa"}, {}, "started as pissa, which changes the base"),
    ({"an_option_of_tomorrow": 3}, {}, "an adapter with an_option_of_tomorrow"),
    ({"r": 0}, {}, "does not describe an adapter"),
    ({"base_model_name_or_path": 3}, {}, "does not describe an adapter"),
    ({"lora_alpha": "much"}, {}, "does not describe an adapter"),
    ({"r": 3}, {}, "has rank 4, where adapter_config.json says 3"),
    ({"use_dora": True}, {}, "has the parts .lora_A.weight, .lora_B.weight instead of"),
    ({}, {LAYER + "self_attn.q_proj.bias": (32,)}, "is no factor of a linear map"),
    ({}, {"base_model.model.lm_head.base_layer.weight": (4, 32)}, "is no factor of a linear map"),
    ({}, {LAYER + "mlp.experts.lora_A.weight": (4, 32)}, "which is no linear map of"),
    ({}, {LAYER + "self_attn.q_proj.lora_A.weight": (4, 48)}, "does not fit the map of 32 to 32"),
    ({"fine_tune_type": "full"}, {}, "a finetune of mlx-lm's type full"),
    ({"lora_parameters": {"rank": 4, "alpha": 8}}, {}, "does not describe an adapter"),
]


@pytest.mark.parametrize(("config", "arrays", "message"), REFUSED)
def test_what_is_no_such_change_of_weights_is_refused(bases, tmp_path, config, arrays, message):
    made = {name: np.ones(shape, np.float32) for name, shape in arrays.items()}
    rank = 4
    folder = write_adapter(tmp_path / "theirs", bases["llama"], arrays=made, rank=rank, **config)
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as refused:
        fuse(find_checkpoint(folder), tmp_path / "whole")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "whole").exists()


def test_damaged_and_pickled_adapters_are_refused(bases, tmp_path):
    folder = write_adapter(tmp_path / "theirs", bases["llama"])
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    with pytest.raises(UserError, match="is cut short"):
        fuse(find_checkpoint(folder), tmp_path / "whole")
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights only"):
        find_checkpoint(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors"):
        find_checkpoint(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        find_checkpoint(folder)


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", "bfloat16"), ("F16", "float16")])
def test_fused_weights_have_the_type_of_the_base_or_the_one_asked_for(bases, tmp_path, run_forget, kind, dtype):
    torch = pytest.importorskip("torch")
    narrow = shutil.copytree(bases["llama"], tmp_path / "narrow")
    ours = {name: read_tensor(narrow / "model.safetensors", name) for name in tensor_names(narrow / "model.safetensors")}
    shapes = {name: value.shape for name, value in ours.items()}
    # One of another type, as routers and norms have it.
    dtypes = dict.fromkeys(shapes, kind) | {"model.norm.weight": "F32"}
    write_tensors(narrow / "model.safetensors", shapes, ours.values(), dtypes)
    folder = write_adapter(tmp_path / "theirs", narrow)
    assert run_forget("fuse", folder, "-o", tmp_path / "same")[0] == 0
    code, out, _ = run_forget("fuse", folder, "-o", tmp_path / "wide", "--dtype", "float32", "--json")
    assert (code, json.loads(out)["fused_from"]["dtype"]) == (0, "float32")
    same, wide = (tmp_path / name / "model.safetensors" for name in ("same", "wide"))
    assert {name: tensor_dtype(same, name) for name in shapes} == dtypes
    assert {tensor_dtype(wide, name) for name in shapes} == {"F32"}
    for place, name in (("same", dtype), ("wide", "float32")):
        config = json.loads((tmp_path / place / "config.json").read_text())
        assert (config["torch_dtype"], "dtype" in config) == (name, False)
    for name in shapes:
        exact = torch.from_numpy(read_tensor(wide, name))
        rounded = exact.to(getattr(torch, dtype)).float() if dtypes[name] == kind else exact
        np.testing.assert_array_equal(read_tensor(same, name), rounded.numpy())
    assert any((read_tensor(same, name) != read_tensor(wide, name)).any() for name in shapes)


def test_numbers_that_are_none_stay_so_in_every_type(tmp_path):
    value = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0x3F808000, 0x3F818000], np.uint32).view(np.float32)
    for kind in ("F32", "BF16", "F16"):
        write_tensors(tmp_path / "w.safetensors", {"w": (6,)}, [value], {"w": kind})
        read = read_tensor(tmp_path / "w.safetensors", "w")
        assert np.isnan(read[:3]).all()
        assert np.isposinf(read[3])
        # Halfway between two numbers of bfloat16: to the even one.
        assert kind != "BF16" or read[4:].view(np.uint32).tolist() == [0x3F800000, 0x3F820000]
    with pytest.raises(UserError, match="w holds numbers that BF16 cannot"):
        write_tensors(tmp_path / "w.safetensors", {"w": (2,)}, [np.array([3.4e38, np.inf], np.float32)], {"w": "BF16"})


def test_numbers_that_a_type_cannot_hold_are_refused(bases, tmp_path):
    wide = shutil.copytree(bases["llama"], tmp_path / "wide")
    ours = {name: read_tensor(wide / "model.safetensors", name) for name in tensor_names(wide / "model.safetensors")}
    ours["model.norm.weight"] = ours["model.norm.weight"] + 7e4
    write_tensors(wide / "model.safetensors", {name: value.shape for name, value in ours.items()}, ours.values())
    found = find_checkpoint(write_adapter(tmp_path / "theirs", wide))
    with pytest.raises(UserError, match=r"model\.norm\.weight holds numbers that F16 cannot"):
        fuse(found, tmp_path / "whole", dtype="float16")
    assert not (tmp_path / "whole").exists()
    with pytest.raises(UserError, match="Unknown --dtype 'int8'"):
        fuse(found, tmp_path / "whole", dtype="int8")


def test_whoever_fuses_later_takes_what_the_first_made_and_forget_fuse_overwrites_nothing(bases, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGET_HOME", str(tmp_path / "home"))
    found = find_checkpoint(write_adapter(tmp_path / "theirs", bases["llama"]))
    faster = imported_adapters.read_parts

    def read_parts(*arguments):
        # Another process does all of it while this one reads.
        monkeypatch.setattr(imported_adapters, "read_parts", faster)
        whole_checkpoint(found)
        return faster(*arguments)

    monkeypatch.setattr(imported_adapters, "read_parts", read_parts)
    made = whole_checkpoint(found)
    assert [path.name for path in (tmp_path / "home" / "fused").iterdir()] == [made.folder.name]
    monkeypatch.setattr(imported_adapters, "read_parts", lambda *arguments: (tmp_path / "whole").mkdir() or faster(*arguments))
    with pytest.raises(UserError, match="exists already"):
        fuse(found, tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"home", "theirs", "whole"}


def test_adapters_of_a_quantised_base_are_refused_with_a_command_that_there_is(bases, tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "theirs", bases["llama"])
    quantised = SimpleNamespace(folder=bases["llama"], model_spec=lambda: SimpleNamespace(bits=4))
    monkeypatch.setattr("mlx_forget.fuse._open_base", lambda found, base: quantised)
    with pytest.raises(UserError, match=r"quantised to 4 bits.*forget fuse .*theirs --base ORIGINAL -o WHOLE"):
        fuse(find_checkpoint(folder), tmp_path / "whole")
