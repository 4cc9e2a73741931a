"""Small runs trained as one against one by one: run-steps per second, of a stack of K against one trainer, in turns.

    python tests/benchmarks/bench_stack.py [--backend cuda] [--model 0.65m] [--threads 1] [--rounds 5] [--wall]

One thread and CPU time compare what a core does in a second: one by one, a sweep runs as many processes as there are cores. On a GPU, use
--wall. The ratio is that of run-steps: above 1, a stack is faster.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlx_forget.backends import load_backend
from mlx_forget.ladder import model_spec, num_params
from mlx_forget.trainer import Batch, RuntimeSpec, TrainerSpec
from tests.benchmarks.measure import interleaved, print_ratios

BATCH, CONTEXT, VOCAB = 16, 128, 2048
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--model", default="0.65m")
    parser.add_argument("--members", default="2,4,8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wall", action="store_true", help="wall-clock time instead of CPU time")
    args = parser.parse_args()
    clock = time.perf_counter if args.wall else time.process_time
    spec = TrainerSpec(model=model_spec(args.model, VOCAB, CONTEXT), runtime=RuntimeSpec(num_threads=args.threads))
    backend = load_backend(args.backend)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, CONTEXT + 1)).astype(np.int32)
    zeros = np.zeros(BATCH, np.uint8)
    batch = Batch(tokens, np.ones((BATCH, CONTEXT), np.uint8), None, zeros, zeros)

    def of_one():
        trainer = backend(spec)

        def measure() -> float:
            start = clock()
            for _ in range(STEPS):
                trainer.train_step(batch, 1e-3).read()
            return STEPS / (clock() - start)

        return measure

    def of_stack(count: int):
        stack = backend.stack(spec, list(range(count)))

        def measure() -> float:
            start = clock()
            for _ in range(STEPS):
                for result in stack.train_step([batch] * count, [1e-3] * count, [True] * count):
                    result.read()
            return count * STEPS / (clock() - start)

        return measure

    contenders = {"one by one": of_one()} | {f"stack of {k}": of_stack(int(k)) for k in args.members.split(",")}
    interleaved(contenders, rounds=1)
    title = f"{args.backend}, {num_params(spec.model):,} parameters, batch {BATCH} x {CONTEXT}, {args.threads} threads"
    unit = "run-steps/s" if args.wall else "run-steps per CPU-second"
    print_ratios(title, interleaved(contenders, rounds=args.rounds), baseline="one by one", unit=unit)


if __name__ == "__main__":
    main()
