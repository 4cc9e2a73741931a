"""The benchmark for a GPU, as far as a machine without one can go: what it says there, its arithmetic, and its code on tiny shapes."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_forget.ladder import model_spec

torch = pytest.importorskip("torch")

FILE = Path(__file__).parent / "benchmarks" / "bench_cuda.py"


def run(*arguments):
    done = subprocess.run([sys.executable, FILE, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_needs_one():
    assert run() == "This benchmark needs an NVIDIA GPU, and PyTorch sees none here: nothing was measured.\n"


def test_mfu_is_the_published_formula():
    from tests.benchmarks.bench_cuda import H100_PEAK, mfu, products_share

    medium = model_spec("medium", 32_000, 1024)
    per_token = 6 * 336_128_000 + 12 * 24 * 1024 * 1024
    assert mfu(medium, 200_000, H100_PEAK) == pytest.approx(per_token * 200_000 / 989e12)
    # The products of blocks and head; a tenth or so is attention.
    assert 0.8 < products_share(medium) < 1


@pytest.mark.full
def test_every_contender_runs_on_tiny_shapes():
    shapes = ("--device", "cpu", "--models", "2x32", "--rows", "2", "--context", "16", "--vocabulary", "64", "--precision", "fp32")
    out = run(*shapes, "--eager", "--steps", "1", "--rounds", "1", "--turns", "1")
    assert out.count("tokens/s") == 2
    assert "times the loop" in out
    assert "of the ceiling" in out
