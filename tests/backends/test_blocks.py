"""What every block of a checkpoint adds, on every backend, against the hidden states that transformers shows of the whole model.

The logits after block k are those of the checkpoint cut off after it: a folder of its own, so that nothing of a backend is opened.
"""

import json

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import find_checkpoint
from mlx_forget.ladder import ModelSpec
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from tests.small_checkpoints import CONTEXT, config_of, vocab_size, write_checkpoint

pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

BACKENDS = available_backends()
NUM_LAYERS = 3
# Of the largest logit: what is summed in another order in float32.
BAND = 3e-6
# A rotary base of its own, rescaled places, biases of queries and keys, norms of queries and keys, learned places.
KINDS = ["llama", "llama3-rope", "qwen2", "qwen3", "gpt2"]


def make_config(kind):
    config = config_of("llama" if kind == "llama3-rope" else kind)
    setattr(config, "n_layer" if kind == "gpt2" else "num_hidden_layers", NUM_LAYERS)
    if kind == "llama3-rope":
        scaled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": CONTEXT // 4}
        config.rope_parameters = {"rope_type": "llama3", "rope_theta": 500000.0, **scaled}
    if kind.startswith("qwen"):
        config.layer_types = ["full_attention"] * NUM_LAYERS
    return config


def cut_off(whole, folder, num_layers):
    """The checkpoint's first blocks with its embeddings, last norm and head."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((whole / name).read_bytes())
    config = json.loads((whole / "config.json").read_text())
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    types = {"layer_types": config["layer_types"][:num_layers]} if config.get("layer_types") else {}
    (folder / "config.json").write_text(json.dumps(config | {key: num_layers} | types))
    kept = {
        name: value
        for name, value in load_file(whole / "model.safetensors").items()
        if not any(f".{part}.{number}." in name for part in ("layers", "h") for number in range(num_layers, NUM_LAYERS))
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=KINDS)
def shown(request, tmp_path_factory):
    """(folder of the first k blocks for each k, tokens, transformers' logits after each block, is a rung of the ladder)."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    whole = write_checkpoint(folder / "whole", request.param, config=make_config(request.param))
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, vocab_size(), (2, 33)).astype(np.int32)
    states = {}
    layers = model.transformer.h if request.param == "gpt2" else model.model.layers
    hooks = [
        layer.register_forward_hook(lambda _, inputs, out, k=k: states.__setitem__(k, out[0] if isinstance(out, tuple) else out))
        for k, layer in enumerate(layers, 1)
    ]
    norm = model.transformer.ln_f if request.param == "gpt2" else model.model.norm
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:, :-1]).long()).logits
        after = {k: model.lm_head(norm(state)).numpy() for k, state in states.items()}
    for hook in hooks:
        hook.remove()
    np.testing.assert_array_equal(after[NUM_LAYERS], logits.numpy())
    folders = {k: cut_off(whole, folder / f"first-{k}", k) for k in range(1, NUM_LAYERS + 1)}
    return folders, tokens, after, request.param == "gpt2"


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_after_every_block_are_those_of_transformers(shown, backend):
    folders, tokens, after, on_the_ladder = shown
    for k, folder in folders.items():
        found = find_checkpoint(folder)
        model = found.model_spec()
        assert isinstance(model, ModelSpec) == on_the_ladder
        trainer = load_backend(backend)(TrainerSpec(model, runtime=RuntimeSpec(num_threads=1)))
        trainer.load(found.weights)
        log_probs, logits = trainer.log_probs(tokens), torch.from_numpy(after[k])
        expected = torch.log_softmax(logits.double(), -1).numpy()
        worst = np.abs(log_probs - expected).max() / np.abs(after[k]).max()
        assert worst < BAND, (k, worst)
        if k > 1:
            # A block that did nothing would be seen.
            assert np.abs(after[k] - after[k - 1]).max() > 1e-2
