"""CPU training speed against a nanoGPT-style loop, the loop's own overhead, and the cost of batches.

    python tests/benchmarks/bench_training.py [--threads 2] [--rounds 9]

The baseline is written here from nanoGPT's description: modules with Linear, GELU, LayerNorm and scaled-dot-product attention, one
cross-entropy over all logits, AdamW with two groups, clipping at 1, batches stacked from a memory map as int64. Same shapes, threads and
precision; the contenders take turns.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cuda_backend.trainer import TorchTrainer
from mlx_forget.evaluate import Windows
from mlx_forget.ladder import ModelSpec, model_spec, num_params
from mlx_forget.loop import Cadence, RunState, StopRules, drive
from mlx_forget.pipeline.batches import BatchStream, RowSubset
from mlx_forget.pipeline.mixture import Mixture, parse_share
from mlx_forget.pipeline.store import StoreWriter
from mlx_forget.run import NoObserver
from mlx_forget.schedule import Schedule
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from tests.benchmarks.measure import interleaved, print_ratios, rate

BATCH = 32
TOKENIZER = Path(__file__).resolve().parents[1] / "pipeline" / "samples" / "store-v1" / "tokenizer.model"


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        d, self.heads = spec.width, spec.num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.c_fc, self.c_out, self.gelu = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = (t.view(B, T, self.heads, D // self.heads).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(D, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, D))
        return x + self.c_out(self.gelu(self.c_fc(self.ln_2(x))))


class NanoStyle(nn.Module):
    """The baseline: model, optimiser and loop."""

    def __init__(self, spec: ModelSpec, tokens: np.ndarray, *, bf16: bool, compiled: bool) -> None:
        super().__init__()
        self.spec, self.tokens, self.bf16 = spec, tokens, bf16
        self.wte, self.wpe = nn.Embedding(spec.vocab_size, spec.width), nn.Embedding(spec.context_length, spec.width)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.ln_f, self.head = nn.LayerNorm(spec.width), nn.Linear(spec.width, spec.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
        self.call = torch.compile(self) if compiled else self

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.ln_f(h))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        T = self.spec.context_length
        starts = torch.randint(len(self.tokens) - T - 1, (BATCH,))
        x = torch.stack([torch.from_numpy(self.tokens[i : i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(self.tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        return x, y

    def step(self) -> torch.Tensor:
        x, y = self.batch()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.call(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss


def make_subset(folder: Path, spec: ModelSpec, num_tokens: int) -> RowSubset:
    """Random tokens in a real store."""
    tokenizer = folder / "t.model"
    tokenizer.write_bytes(b"benchmark")
    writer = StoreWriter(folder / "store", tokenizer, "benchmark", spec.vocab_size, 1, 2, "random tokens")
    writer.add("train", np.random.default_rng(0).integers(3, spec.vocab_size, num_tokens), num_tokens)
    return RowSubset.of_tokens(writer.close().split("train"), spec.context_length, None)


def make_stream(subset: RowSubset, num_steps: int) -> BatchStream:
    mixture = Mixture(subset.num_rows, subset.num_rows, parse_share("1%"), 0)
    return BatchStream(subset, subset, mixture, BATCH, num_steps)


def training_speed(name: str, subset: RowSubset, spec: ModelSpec, *, rounds: int, steps: int, bf16: bool, compiled: bool) -> None:
    """Tokens per second of the step, batches included, against the baseline."""
    runtime = RuntimeSpec(precision="bf16" if bf16 else "fp32", compile=compiled, device="cpu")
    ours = TorchTrainer(TrainerSpec(model=spec, runtime=runtime))
    stream = make_stream(subset, 1_000_000)
    nano = NanoStyle(spec, subset.split.tokens[0], bf16=bf16, compiled=compiled)
    counter = iter(range(1_000_000))

    def our_steps() -> None:
        for _ in range(steps):
            result = ours.train_step(stream.batch(next(counter)), 1e-3)
        result.read()

    def nano_steps() -> None:
        for _ in range(steps):
            loss = nano.step()
        loss.item()

    amount = steps * BATCH * spec.context_length
    our_steps(), nano_steps()
    figures = interleaved(
        {"nanoGPT-style loop": lambda: rate(nano_steps, amount), "mlx-forget": lambda: rate(our_steps, amount)}, rounds=rounds
    )
    kind = f"{'bf16' if bf16 else 'fp32'} {'compiled' if compiled else 'eager'}, {torch.get_num_threads()} threads"
    print_ratios(
        f"training, {name}, {num_params(spec):,} parameters, {kind}", figures, baseline="nanoGPT-style loop", unit="tokens/s"
    )


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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    small, large = model_spec("4x128", 4096, 256), model_spec("7x320", 4096, 256)
    bf16 = (False, True) if TorchTrainer.describe().fast_bf16 else (False,)
    with tempfile.TemporaryDirectory() as scratch:
        subset = make_subset(Path(scratch), small, 5_000_000)
        loop_overhead(subset, small, Path(scratch), rounds=options.rounds, steps=12)
        for precision in bf16:
            for compiled in (False, True) if options.compiled else (False,):
                for name, spec, steps in (("1.3M", small, 4), ("10M", large, 1)):
                    training_speed(name, subset, spec, rounds=options.rounds, steps=steps, bf16=precision, compiled=compiled)


if __name__ == "__main__":
    main()
