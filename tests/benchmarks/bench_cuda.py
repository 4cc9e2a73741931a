"""Training on one GPU: tokens/s, memory, MFU, the share of what matrix products reach, and the ratio to a nanoGPT-style compiled loop.

    python tests/benchmarks/bench_cuda.py [--models medium,xl] [--rows 16] [--context 1024] [--steps 20] [--rounds 5]

bf16, vocabulary 32,000, the same shapes for all. Each contender has the GPU to itself, in a process of its own that compiles and warms up
before it is timed; they take turns, and what is quoted is the median. MFU counts (6 N + 12 L D T) FLOPs a token against the data sheet's
dense bf16 peak (989 TFLOP/s of an H100 SXM). The ceiling is what this GPU's library reaches in the products of the same step, and nothing
but those. Batches come from a store on disk through the pipeline that every run uses.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cuda_backend.trainer import TorchTrainer
from mlx_forget.costs import device_like
from mlx_forget.errors import OutOfMemory
from mlx_forget.ladder import ModelSpec, model_spec, num_params
from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pipeline.mixture import Mixture, parse_share
from mlx_forget.pipeline.sides import RowSubset
from mlx_forget.pipeline.store import open_store
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from tests.benchmarks.bench_training import write_store
from tests.benchmarks.nanogpt_style import NanoStyle

OURS, NANO, CEILING = "mlx-forget", "nanoGPT-style compiled loop", "matrix products alone"
H100_PEAK = 989e12
WARM_STEPS = 5


def flops_per_token(spec: ModelSpec) -> int:
    """(6 N + 12 L D T), N being all parameters: the convention of MFU."""
    return 6 * num_params(spec) + 12 * spec.num_layers * spec.width * spec.context_length


def mfu(spec: ModelSpec, tokens_per_second: float, peak: float) -> float:
    return flops_per_token(spec) * tokens_per_second / peak


def ours(spec: ModelSpec, store: Path, options: argparse.Namespace) -> Callable[[], object]:
    """A step of the trainer on the batches of a run, as the loop takes it: the host reads nothing."""
    subset = RowSubset.of_tokens(open_store(store, verify=False).split("train"), spec.context_length, None)
    stream = BatchStream(subset, subset, Mixture(subset.num_rows, subset.num_rows, parse_share("1%"), 0), options.rows, 1_000_000)
    runtime = RuntimeSpec(
        precision=options.precision,
        device=options.device,
        compile=not options.eager,
        micro_batch_size=options.micro_rows,
        grad_checkpoint=options.grad_checkpoint,
    )
    trainer, counter = TorchTrainer(TrainerSpec(model=spec, runtime=runtime)), iter(range(1_000_000))
    return lambda: trainer.train_step(stream.batch(next(counter)), 1e-4)


def nano(spec: ModelSpec, store: Path, options: argparse.Namespace) -> Callable[[], object]:
    tokens = open_store(store, verify=False).split("train").tokens[0]
    loop = NanoStyle(
        spec, tokens, batch_size=options.rows, bf16=options.precision == "bf16", compiled=not options.eager, device=options.device
    )
    return loop.step


def ceiling(spec: ModelSpec, store: Path, options: argparse.Namespace) -> Callable[[], object]:
    """All products of a step: each map forward, and twice backward; attention's two products as one batched product each."""
    N, d, dtype = options.rows * spec.context_length, spec.width, torch.bfloat16 if options.precision == "bf16" else torch.float32
    maps = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)] * spec.num_layers + [(d, spec.vocab_size)]
    made = {
        shape: [torch.randn(size, dtype=dtype, device=options.device) for size in ((N, shape[0]), shape, (N, shape[1]))]
        for shape in set(maps)
    }

    def work() -> None:
        for shape in maps:
            x, weight, grad = made[shape]
            x @ weight, grad @ weight.T, x.T @ grad

    return work


CONTENDERS = {OURS: ours, NANO: nano, CEILING: ceiling}


def products_share(spec: ModelSpec) -> float:
    """What the ceiling's products are of the FLOPs that MFU counts; attention and embeddings are the rest."""
    products = 6 * (12 * spec.num_layers * spec.width**2 + spec.vocab_size * spec.width)
    return products / flops_per_token(spec)


def work(kind: str, model: str, store: Path, options: argparse.Namespace) -> None:
    """The worker: warm up, then time segments; one JSON object on the last line."""
    spec = model_spec(model, options.vocabulary, options.context)
    on_gpu = options.device == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    try:
        step = CONTENDERS[kind](spec, store, options)
        for _ in range(WARM_STEPS):
            step()
        wait()
        rates = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            wait()
            rates.append(options.steps * options.rows * spec.context_length / (time.perf_counter() - start))
    except (torch.OutOfMemoryError, OutOfMemory):
        print(json.dumps({"rates": [], "memory": None}))
        return
    print(json.dumps({"rates": rates, "memory": torch.cuda.max_memory_allocated() if on_gpu else None}))


def measure(kind: str, model: str, store: Path, arguments: list[str]) -> dict[str, object]:
    """One turn of a contender in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--worker", kind, model, str(store)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(model: str, store: Path, options: argparse.Namespace, arguments: list[str]) -> None:
    spec = model_spec(model, options.vocabulary, options.context)
    rates: dict[str, list[float]] = {kind: [] for kind in CONTENDERS}
    memory: dict[str, object] = {}
    for _ in range(options.turns):
        for kind in CONTENDERS:
            found = measure(kind, model, store, arguments)
            rates[kind] += found["rates"]  # type: ignore[arg-type, operator]
            memory[kind] = found["memory"]
    print(f"{model}, {num_params(spec):,} parameters, {options.rows} rows of {options.context}, {options.precision}")
    sheet = device_like(torch.cuda.get_device_name()) if options.device == "cuda" else None
    peak = sheet.flops["bf16"] if sheet is not None else H100_PEAK
    medians = {kind: statistics.median(values) for kind, values in rates.items() if values}
    # FLOPs a second that products alone reach.
    reached = medians[CEILING] * flops_per_token(spec) * products_share(spec) if CEILING in medians else None
    for kind in CONTENDERS:
        if kind not in medians:
            print(f"  {kind:<30} out of memory")
            continue
        rate, used = medians[kind], memory[kind]
        flops = rate * flops_per_token(spec) * (products_share(spec) if kind == CEILING else 1)
        line = f"  {kind:<30} {flops / 1e12:>8.1f} TFLOP/s, {flops / peak:.3f} of {peak / 1e12:.0f}"
        if kind != CEILING:
            line += f"; {rate:,.0f} tokens/s (min {min(rates[kind]):,.0f}, max {max(rates[kind]):,.0f})"
            line += "" if used is None else f"; {float(used) / 1e9:.1f} GB"  # type: ignore[arg-type]
            line += "" if reached is None else f"; {flops / reached:.3f} of the ceiling"
        if kind == OURS and NANO in medians:
            line += f"; {rate / medians[NANO]:.3f} times the loop"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="medium,xl")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--micro-rows", type=int, default=None, help="rows of a forward pass")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--steps", type=int, default=20, help="steps of a timed segment")
    parser.add_argument("--rounds", type=int, default=5, help="segments of a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the benchmark itself; its figures mean nothing"
    )
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "MODEL", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, model, store = options.worker
        return work(kind, model, Path(store), options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs an NVIDIA GPU, and PyTorch sees none here: nothing was measured.")
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = write_store(Path(scratch), 40 * options.rows * options.context, options.vocabulary)
        for model in options.models.split(","):
            compare(model, place, options, sys.argv[1:])


if __name__ == "__main__":
    main()
