"""Recomputed activations, quantised bases and frozen blocks lower the measured peak of a training step."""

import gc
import sys

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.pretrained import read_pretrained
from mlx_forget.trainer import AdapterSpec, Batch, RuntimeSpec, TrainerSpec
from tests.benchmarks import bench_memory

pytest.importorskip("transformers")

BACKENDS = available_backends()


@pytest.mark.skipif("mlx" not in BACKENDS, reason="needs MLX")
def test_mlx_allocates_less(tmp_path):
    import mlx.core as mx

    base = bench_memory.write_base(tmp_path / "base", layers=6, width=64)
    # Weights that outweigh the activations of a row.
    wide = bench_memory.write_base(tmp_path / "wide", layers=2, width=256)
    packed = bench_memory.quantise(wide)
    lora = AdapterSpec(rank=2)

    def peak(folder, rows, adapter=None, num_layers=None, **runtime):
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        spec = TrainerSpec(
            read_pretrained(folder), adapter=adapter, num_layers=num_layers, runtime=RuntimeSpec(num_threads=1, **runtime)
        )
        trainer = load_backend("mlx")(spec)
        tokens = np.random.default_rng(0).integers(0, 512, (rows, 65)).astype(np.int32)
        zeros = np.zeros(rows, np.uint8)
        mx.reset_peak_memory()
        trainer.train_step(Batch(tokens, np.ones((rows, 64), np.uint8), None, zeros, zeros), 1e-4).read()
        return mx.get_peak_memory() - before

    plain = peak(base, 8)
    assert peak(base, 8, grad_checkpoint=True) < 0.7 * plain
    assert peak(base, 8, num_layers=1) < 0.7 * plain
    assert peak(packed, 1, lora) < 0.6 * peak(wide, 1, lora)


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_process_takes_less(backend, tmp_path):
    if backend == "cuda" and sys.platform != "linux":
        pytest.skip("reads Linux's count of resident memory")
    base = bench_memory.write_base(tmp_path / "base", layers=8, width=128)
    sizes = {"rows": 8, "length": 512}
    whole, recomputed = (
        bench_memory.measure(backend, base, bench_memory.CASES[name], **sizes)
        for name in ("all weights", "all weights, recomputed activations")
    )
    assert recomputed < 0.7 * whole
