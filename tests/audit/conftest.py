"""Checkpoints and texts that are made by hand, small enough for a float64 computation."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_forget import checkpoint
from mlx_forget.ladder import initial_weights, model_spec
from mlx_forget.pipeline.catalog import builtin_tokenizer
from mlx_forget.pipeline.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(cache_folder):
    return builtin_tokenizer(512)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return Tokenizer.load(tokenizer_file)


@pytest.fixture(scope="session")
def spec(tokenizer):
    return model_spec("2x32", vocab_size=tokenizer.vocab_size, context_length=32)


class Weights:
    """What `save_checkpoint` asks of a trainer that is only saved."""

    def __init__(self, values):
        self.values = values

    def save(self, path, *, trainable_only=False):
        save_file(self.values, path)


@pytest.fixture
def make_checkpoint(spec, tokenizer_file):
    """A function that writes a checkpoint folder and returns the weights in it."""

    def make(folder, *, seed=0, moved=0.0, spec=spec, tokenizer=tokenizer_file, **state):
        random = np.random.default_rng(7)
        # Large enough that the model has opinions.
        weights = {name: 2 * value for name, value in initial_weights(spec, seed)}
        weights = {name: value + random.normal(0, moved, value.shape).astype(np.float32) for name, value in weights.items()}
        content = {"run_id": "0123456789ab", "is_pretraining": False, "step": 5, **state}
        checkpoint.save_checkpoint(folder, Weights(weights), spec, tokenizer, content, with_training_state=False)
        return weights

    return make


@pytest.fixture
def notes(tmp_path):
    """A text of 40 documents of uneven length."""
    path = tmp_path / "notes.jsonl"
    lines = []
    for i in range(40):
        sentences = [f"Note {i}, line {j}: the square of {j} is {j * j}.\n" for j in range(1 + (i * 7) % 6)]
        lines.append(json.dumps({"text": "".join(sentences)}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
