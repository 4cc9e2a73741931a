"""What adapters drop: a hash of seed, step, row, module, token and feature, the same on both backends and in parts of a batch."""

import dataclasses

import numpy as np
import pytest

from mlx_forget.adapter_dropout import FEATURE, FIRST, SECOND, SHIFTS, TOKEN, row_keys
from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import find_checkpoint
from mlx_forget.ladder import model_spec
from mlx_forget.trainer import AdapterSpec, Batch, RuntimeSpec, TrainerSpec
from tests.small_checkpoints import write_checkpoint

BACKENDS = available_backends()
MODULES = ["a.first", "a.second"]


def mixed(x):
    for shift, factor in zip(SHIFTS, (FIRST, SECOND, 1), strict=True):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x


def stays(key, num_tokens, width, share):
    """The documented hash, bool[B, T, width], in NumPy."""
    places, features = np.arange(num_tokens, dtype=np.uint32), np.arange(width, dtype=np.uint32)
    h = mixed(key[:, None] + places * np.uint32(TOKEN))[..., None] ^ mixed(features * np.uint32(FEATURE))
    h = h * np.uint32(FIRST)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(SECOND)
    return (h >> np.uint32(8)) < np.uint32(share * 2**24)


def kept_by(backend, key, num_tokens, width, share):
    ones = np.ones((len(key) * num_tokens, width), np.float32)
    if backend == "mlx":
        import mlx.core as mx

        from mlx_forget.mlx_backend.lora import dropped

        found = np.array(dropped(mx.array(ones), mx.array(key), mx.array(share, dtype=mx.float32)))
    else:
        import torch

        from cuda_backend.lora import KEPT, KEY, _dropped

        weights = {"m" + KEY: torch.from_numpy(key.view(np.int32)), KEPT: torch.tensor(share)}
        found = _dropped(torch.from_numpy(ones), weights, "m").numpy()
    assert set(np.unique(found)) <= {np.float32(0), np.float32(1) / np.float32(share)}
    return found.reshape(len(key), num_tokens, width) > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.5, 0.7, 0.95, 1 - 2**-30])
def test_both_backends_keep_what_the_hash_says(backend, share):
    for key in row_keys(3, 7, 0, num_rows=5, modules=MODULES):
        wanted = stays(key, 11, 32, np.float32(share))
        np.testing.assert_array_equal(kept_by(backend, key, 11, 32, share), wanted)


def test_the_hash_looks_like_chance():
    """Shares of the whole, of rows, tokens and features, and pairs that should have nothing to do with each other."""
    first, second = (stays(key, 64, 96, 0.7) for key in row_keys(0, 0, 0, num_rows=32, modules=MODULES))
    later = stays(row_keys(0, 1, 0, num_rows=32, modules=MODULES)[0], 64, 96, 0.7)
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        means = first.mean(axis=axes)
        error = np.sqrt(0.21 * np.size(means) / first.size)
        assert np.abs(means - 0.7).max() < 4.5 * error, axes
    pairs = {
        "module": (first, second),
        "step": (first, later),
        "row": (first[1:], first[:-1]),
        "token": (first[:, 1:], first[:, :-1]),
        "feature": (first[..., 1:], first[..., :-1]),
    }
    for name, (left, right) in pairs.items():
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 4.5 / np.sqrt(left.size), name


def batch_of(rows, vocab, length, *, step=0):
    rng = np.random.default_rng(0)
    zeros = np.zeros(rows, np.uint8)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    return Batch(tokens, np.ones((rows, length), np.uint8), None, zeros, zeros, step=step)


@pytest.fixture(scope="module", params=["ladder", "qknorm", "llama"])
def model(request, tmp_path_factory):
    if request.param == "llama":
        pytest.importorskip("transformers")
        return find_checkpoint(write_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama")).model_spec()
    return model_spec("2x32" if request.param == "ladder" else "qknorm-2x32", vocab_size=61, context_length=12)


def readings(backend, model, *, dropout=0.3, batches=None, **runtime):
    adapter = AdapterSpec(rank=4, alpha=8.0, dropout=dropout, target_modules=("all-linear",))
    spec = TrainerSpec(model=model, adapter=adapter, runtime=RuntimeSpec(device="cpu", **{"num_threads": 1, **runtime}), seed=3)
    trainer = load_backend(backend)(spec)
    batches = batches or [batch_of(7, 61, 12, step=step) for step in range(4)]
    found = [trainer.train_step(batch, 1e-2).read() for batch in batches]
    return np.array([[reading.grad_norm, reading.loss_sums.sum()] for reading in found])


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_batch_drop_what_the_whole_drops(backend, model):
    whole = readings(backend, model)
    np.testing.assert_allclose(readings(backend, model, micro_batch_size=3), whole, rtol=1e-4)
    np.testing.assert_allclose(readings(backend, model, num_threads=2), whole, rtol=1e-4)
    np.testing.assert_allclose(readings(backend, model, grad_checkpoint=True), whole, rtol=1e-4)
    same_step = [dataclasses.replace(batch_of(7, 61, 12), step=0)] * 4
    assert np.abs(readings(backend, model, batches=same_step) / whole - 1)[1:].max() > 1e-3
    assert np.abs(readings(backend, model, dropout=0.0) / whole - 1).max() > 1e-2


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs both backends")
def test_both_backends_train_alike_with_dropout(model):
    one, other = (readings(backend, model) for backend in BACKENDS)
    np.testing.assert_allclose(one, other, rtol=2e-4)
