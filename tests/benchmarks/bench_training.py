"""CPU training speed against a nanoGPT-style loop, the loop's own overhead, and the cost of batches.

    python tests/benchmarks/bench_training.py [--threads 2] [--rounds 9]

Same shapes, threads and precision. The speed contenders live in processes of their own, because the trainer tells the allocator to keep
freed memory, and take turns; the baseline runs as its users run it, and once more with that setting.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cuda_backend.allocator import keep_freed_memory
from cuda_backend.trainer import TorchTrainer
from mlx_forget.evaluate import Windows
from mlx_forget.ladder import ModelSpec, model_spec, num_params
from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pipeline.mixture import Mixture, parse_share
from mlx_forget.pipeline.sides import RowSubset
from mlx_forget.pipeline.store import StoreWriter, open_store
from mlx_forget.schedule import Schedule
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from mlx_forget.training.loop import Cadence, RunState, drive
from mlx_forget.training.stop_rules import StopRules
from mlx_forget.training.watch import NoObserver
from tests.benchmarks.measure import interleaved, print_ratios, rate
from tests.benchmarks.nanogpt_style import NanoStyle

BATCH, CONTEXT, VOCABULARY = 32, 256, 4096
SEGMENT_STEPS = {"4x128": 4, "7x320": 1}
NANO, KEPT, TANH, OURS = "nanoGPT-style loop", "the same, freed memory kept", "the same, and GPT-2's tanh GELU", "mlx-forget"
TOKENIZER = Path(__file__).resolve().parents[1] / "pipeline" / "samples" / "store-v1" / "tokenizer.model"


def write_store(folder: Path, num_tokens: int, vocabulary: int = VOCABULARY) -> Path:
    """Random tokens in a real store; returns its folder."""
    tokenizer = folder / "t.model"
    tokenizer.write_bytes(b"benchmark")
    writer = StoreWriter(folder / "store", tokenizer, "benchmark", vocabulary, 1, 2, "random tokens")
    writer.add("train", np.random.default_rng(0).integers(3, vocabulary, num_tokens), num_tokens)
    writer.close()
    return folder / "store"


def open_subset(store: Path, spec: ModelSpec) -> RowSubset:
    return RowSubset.of_tokens(open_store(store, verify=False).split("train"), spec.context_length, None)


def make_stream(subset: RowSubset, num_steps: int, batch_size: int = BATCH) -> BatchStream:
    mixture = Mixture(subset.num_rows, subset.num_rows, parse_share("1%"), 0)
    return BatchStream(subset, subset, mixture, batch_size, num_steps)


class Contender:
    """One trainer in a process of its own, as its users run it; it works one segment at a time, when told to."""

    def __init__(self, kind: str, model: str, store: Path, options: argparse.Namespace, *, bf16: bool, compiled: bool) -> None:
        flags = [*(["--bf16"] if bf16 else []), *(["--compiled"] if compiled else [])]
        command = [sys.executable, __file__, "--worker", kind, model, str(store), "--threads", str(options.threads), *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def segment(self) -> float:
        """Tokens per second of one segment."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def work(kind: str, model: str, store: Path, *, bf16: bool, compiled: bool) -> None:
    """The worker: one warm segment, then one per line read, its tokens per second written back."""
    spec = model_spec(model, VOCABULARY, CONTEXT)
    subset = open_subset(store, spec)
    if kind == OURS:
        trainer = TorchTrainer(TrainerSpec(model=spec, runtime=runtime(bf16=bf16, compiled=compiled)))
        stream, counter = make_stream(subset, 1_000_000), iter(range(1_000_000))

        def step() -> object:
            return trainer.train_step(stream.batch(next(counter)), 1e-3).read()

    else:
        if kind in (KEPT, TANH):
            assert keep_freed_memory()
        gelu = "tanh" if kind == TANH else "none"
        nano = NanoStyle(spec, subset.split.tokens[0], batch_size=BATCH, bf16=bf16, compiled=compiled, gelu=gelu)

        def step() -> object:
            return nano.step().item()

    steps = SEGMENT_STEPS[model]
    step()
    for _ in sys.stdin:
        print(rate(lambda: [step() for _ in range(steps)], steps * BATCH * CONTEXT), flush=True)


def training_speed(model: str, store: Path, options: argparse.Namespace, *, bf16: bool, compiled: bool) -> None:
    """Tokens per second of the step, batches included, against the baseline."""
    contenders = {kind: Contender(kind, model, store, options, bf16=bf16, compiled=compiled) for kind in (NANO, KEPT, TANH, OURS)}
    figures = interleaved({kind: contender.segment for kind, contender in contenders.items()}, rounds=options.rounds)
    for contender in contenders.values():
        contender.close()
    size = f"{num_params(model_spec(model, VOCABULARY, CONTEXT)):,} parameters"
    kind = f"{'bf16' if bf16 else 'fp32'} {'compiled' if compiled else 'eager'}, {options.threads} threads"
    for baseline in (NANO, KEPT, TANH):
        print_ratios(f"training, {size}, {kind}", figures, baseline=baseline, unit="tokens/s")


def runtime(*, bf16: bool = False, compiled: bool = False) -> RuntimeSpec:
    return RuntimeSpec(precision="bf16" if bf16 else "fp32", compile=compiled, device="cpu")


def loop_overhead(subset: RowSubset, spec: ModelSpec, folder: Path, *, rounds: int, steps: int) -> None:
    """The driven loop against bare steps on the same batches, without evaluations, and the share of batches in a step."""
    trainer = TorchTrainer(TrainerSpec(model=spec, runtime=RuntimeSpec(device="cpu")))
    stream = make_stream(subset, 1_000_000)
    windows = Windows.of("one", subset, 1)
    amount = steps * BATCH * spec.context_length
    batches = [stream.batch(step) for step in range(steps)]
    number = iter(range(1000))

    def bare() -> float:
        def work() -> None:
            for batch in batches:
                result = trainer.train_step(batch, 1e-3)
            result.read()

        return rate(work, amount)

    def driven() -> float:
        place = folder / f"run{next(number)}"
        place.mkdir()
        run = RunState(
            folder=place,
            model=spec,
            tokenizer=TOKENIZER,
            schedule=Schedule(peak=1e-3, num_steps=steps),
            stream=stream,
            target_train=windows,
            target_val=windows,
            pretrain_val=windows,
            cadence=Cadence(report=10, evaluate=1_000_000, save=1_000_000),
            stop=StopRules(num_steps=steps),
            observer=Clock(),
        )
        drive(trainer, [run])
        return amount / (run.observer.last - run.observer.first)

    bare(), driven()
    print_ratios(
        f"loop overhead, {num_params(spec):,} parameters, {steps} steps a segment",
        interleaved({"bare step": bare, "driven loop": driven}, rounds=rounds),
        baseline="bare step",
        unit="tokens/s",
    )
    fresh = make_stream(subset, 1_000_000)
    per_batch = 1 / rate(lambda: [fresh.batch(step) for step in range(500)], 500)
    per_step = 1 / rate(lambda: [trainer.train_step(batch, 1e-3).read() for batch in batches], len(batches))
    print(f"  batches: {per_batch * 1e6:,.0f} us each, {per_batch / per_step:.3%} of a step of {per_step * 1e3:,.0f} ms")


class Clock(NoObserver):
    """Times from the first evaluation (before the first step) to the last report (after the last step, before the last evaluation)."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def on_evaluation(self, row: object) -> None:
        import time

        self.first = self.first or time.perf_counter()

    def on_report(self, report: object) -> None:
        import time

        self.last = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="compare both compiled too")
    parser.add_argument(
        "--bf16", action="store_true", help="compare bf16 too, which is many times slower on a CPU without units for it"
    )
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "MODEL", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        kind, model, store = options.worker
        return work(kind, model, Path(store), bf16=options.bf16, compiled=options.compiled)
    precisions = (False, True) if options.bf16 else (False,)
    with tempfile.TemporaryDirectory() as scratch:
        store = write_store(Path(scratch), 5_000_000)
        small = model_spec("4x128", VOCABULARY, CONTEXT)
        loop_overhead(open_subset(store, small), small, Path(scratch), rounds=options.rounds, steps=12)
        for bf16 in precisions:
            for compiled in (False, True) if options.compiled else (False,):
                for model in SEGMENT_STEPS:
                    training_speed(model, store, options, bf16=bf16, compiled=compiled)


if __name__ == "__main__":
    main()
