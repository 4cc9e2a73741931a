"""Training on MLX's CPU build: this backend against a plain loop on MLX as installed, in the same run.

    python -m tests.benchmarks.bench_mlx [--steps 3] [--shape 4x128] [--batch 32]

Each runs alone in its own process, in turns; medians are compared. On a machine that others use, read the ratio per CPU-second, which
leaves out the waiting (and the second core: the plain loop uses one).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 2
ROOT = Path(__file__).parents[2]


def ours(args):
    """Print the rate of this backend as one JSON line."""
    import numpy as np

    from mlx_forget.ladder import model_spec, num_params
    from mlx_forget.mlx_backend.trainer import MLXTrainer
    from mlx_forget.trainer import Batch, TrainerSpec

    spec = model_spec(args.shape, args.vocab, args.context)
    trainer = MLXTrainer(TrainerSpec(model=spec))
    tokens = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.context + 1)).astype(np.int32)
    zeros = np.zeros(args.batch, np.uint8)
    batch = Batch(tokens, np.ones((args.batch, args.context), np.uint8), None, zeros, zeros)
    trainer.train_step(batch, 1e-3).read()
    seconds, cpu_seconds = [], []
    for _ in range(args.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train_step(batch, 1e-3).read()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    result = {
        "tokens_per_second": args.batch * args.context / statistics.median(seconds),
        "tokens_per_cpu_second": args.batch * args.context / statistics.median(cpu_seconds),
        "num_params": num_params(spec),
        "device": trainer.device,
        "notes": trainer.notes,
    }
    print(json.dumps(result))


def measure(module, args, *, steps, extra=()):
    shared = [f"--{name}={getattr(args, name)}" for name in ("shape", "batch", "context", "vocab")]
    command = [sys.executable, "-m", module, f"--steps={steps}", *shared, *extra]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900, cwd=ROOT).stdout
    return json.loads(output.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4x128")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of this backend per round; the plain loop gets one")
    parser.add_argument("--only-ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_ours:
        ours(args)
        return
    fast, plain = [], []
    for _ in range(ROUNDS):
        fast.append(measure("tests.benchmarks.bench_mlx", args, steps=args.steps, extra=["--only-ours"]))
        plain.append(measure("tests.benchmarks.plain_mlx", args, steps=1))
    print(
        f"{fast[0]['num_params']:,} parameters, batch {args.batch} x {args.context}, vocabulary {args.vocab}; {fast[0]['device']}"
    )
    for note in fast[0]["notes"]:
        print(note)
    for key, unit in (("tokens_per_second", "tokens/s"), ("tokens_per_cpu_second", "tokens per CPU-second")):
        left, right = (statistics.median(result[key] for result in results) for results in (fast, plain))
        print(f"{unit:<22} this backend {left:>8,.0f}   plain {right:>8,.0f}   ratio {left / right:.1f}")


if __name__ == "__main__":
    main()
