"""Attention and its gradient in bf16 on a CPU, as the trainer computes them, against PyTorch's kernel for bf16 alone.

    python tests/benchmarks/bench_attention.py [--threads 1] [--rounds 9]

Ratios above 1 are the trainer's gain. The rows that are long for their heads take PyTorch's kernel, and say 1.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cuda_backend.attention import attention
from tests.benchmarks.measure import interleaved, print_ratios, rate

SHAPES = (
    (16, 6, 128, 32),
    (16, 6, 128, 64),
    (32, 4, 256, 32),
    (8, 6, 512, 32),
    (8, 6, 256, 64),
    (4, 12, 512, 64),
    (4, 12, 1024, 64),
)
KERNEL, OURS = "PyTorch's bf16 kernel", "mlx-forget"


def contender(shape: tuple[int, ...], function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(shape, generator=generator).bfloat16() for _ in range(4))
    inputs = [part.requires_grad_() for part in (q, k, v)]
    return lambda: rate(lambda: torch.autograd.grad(function(*inputs), inputs, grad), shape[0] * shape[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for shape in SHAPES:
        contenders = {
            KERNEL: contender(shape, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
            OURS: contender(shape, lambda q, k, v: attention(q, k, v, None)),
        }
        rows, heads, tokens, size = shape
        title = f"attention and its gradient, {rows} rows, {heads} heads, {tokens} tokens, head size {size}"
        print_ratios(title, interleaved(contenders, rounds=options.rounds), baseline=KERNEL, unit="tokens/s")


if __name__ == "__main__":
    main()
