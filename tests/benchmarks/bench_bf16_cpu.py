"""bf16 on a CPU: attention and its gradient against PyTorch's kernel for bf16 alone, then whole training steps against fp32.

    python -m tests.benchmarks.bench_bf16_cpu [--threads 1] [--rounds 5]

Rows that are long for their heads take PyTorch's kernel, and say 1. A CPU without AMX has no units for bf16: its steps are many times
slower than fp32's.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_backend.attention import attention
from cuda_backend.trainer import TorchTrainer
from mlx_forget.ladder import model_spec, num_params
from mlx_forget.trainer import Precision, RuntimeSpec, TrainerSpec
from tests.benchmarks.bench_training import make_stream, open_subset, write_store
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
# Model, rows, context, vocabulary.
STEPS = (("2.6m", 16, 128, 2048), ("4x128", 32, 256, 4096))
KERNEL, OURS = "PyTorch's bf16 kernel", "mlx-forget"


def contender(shape: tuple[int, ...], function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(shape, generator=generator).bfloat16() for _ in range(4))
    inputs = [part.requires_grad_() for part in (q, k, v)]
    return lambda: rate(lambda: torch.autograd.grad(function(*inputs), inputs, grad), shape[0] * shape[2])


def step(name: str, rows: int, context: int, vocabulary: int, precision: Precision) -> Callable[[], float]:
    """Tokens per second of one training step, batch included; the first, which allocates, is taken here."""
    spec = model_spec(name, vocabulary, context)
    with tempfile.TemporaryDirectory() as scratch:
        subset = open_subset(write_store(Path(scratch), 500_000, vocabulary), spec)
        stream = make_stream(subset, 1_000_000, rows)
        batches = itertools.cycle([stream.batch(number) for number in range(8)])
    trainer = TorchTrainer(TrainerSpec(model=spec, runtime=RuntimeSpec(precision=precision, compile=False, device="cpu")))

    def work() -> None:
        trainer.train_step(next(batches), 1e-3).read()

    work()
    return lambda: rate(work, rows * context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
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
    for name, batch, context, vocabulary in STEPS:
        precisions: tuple[Precision, ...] = ("fp32", "bf16")
        trainers = {one: step(name, batch, context, vocabulary, one) for one in precisions}
        title = f"a training step, {num_params(model_spec(name, vocabulary, context)):,} parameters, {batch} x {context} tokens"
        print_ratios(title, interleaved(dict(trainers), rounds=options.rounds), baseline="fp32", unit="tokens/s")


if __name__ == "__main__":
    main()
