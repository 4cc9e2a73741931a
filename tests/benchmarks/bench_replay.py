"""What self-generated replay costs: sampling against transformers' `generate` and mlx-lm, and a KL replay step against a plain one.

    python tests/benchmarks/bench_replay.py [--threads 2] [--rounds 5] [--cpu-time] [--only cost] [--backend cuda] [--task-rows 32]

Sampling: the 10M ladder model (vocabulary 4,096, context 256), 32 rows of 256 tokens from BOS, temperature 1, no truncation, the same
weights for every contender, which take turns. The cost of KL replay is that of 8 stored replay rows added to 32 task rows, per task
token, with the reference computed live or its log-probabilities kept. With --cpu-time, rates count CPU seconds instead of wall seconds: on a machine that others use too, they say more.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.ladder import hf_config, model_spec, num_params
from mlx_forget.methods import TERM_REPLAY_KL, MethodSpec, method_spec
from mlx_forget.pipeline.batches import Batch
from mlx_forget.pipeline.reference_rows import ReferenceRows
from mlx_forget.replay.sampling import uniforms
from mlx_forget.trainer import RuntimeSpec, Trainer, TrainerSpec
from tests.benchmarks.measure import interleaved, print_ratios

SPEC = model_spec("8x320", 4096, 256)
ROWS = 32
BOS = 1

Clock = Callable[[], float]


def trainer_of(backend: str, threads: int, method: MethodSpec | None = None) -> Trainer:
    runtime = RuntimeSpec(precision="fp32", device="cpu", num_threads=threads)
    return load_backend(backend)(TrainerSpec(model=SPEC, method=method or MethodSpec(), runtime=runtime))


def with_transformers(folder: Path) -> Callable[[int], object]:
    """`generate` on the same weights, as its documentation says to sample without truncation."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt = torch.full((ROWS, 1), BOS)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True, "pad_token_id": 0}

    def generate(length: int) -> object:
        with torch.no_grad():
            return model.generate(
                prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=length, max_new_tokens=length, **options
            )

    return generate


def with_mlx_lm(folder: Path) -> Callable[[int], object]:
    """mlx-lm's batch generator on the same weights."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.gpt2 import Model, ModelArgs

    config = json.loads((folder / "config.json").read_text()) | {"n_ctx": SPEC.context_length}
    model = Model(ModelArgs.from_dict(config))
    weights = mx.load(str(folder / "model.safetensors"))
    model.load_weights(list(model.sanitize({name.removeprefix("transformer."): w for name, w in weights.items()}).items()))
    mx.eval(model.parameters())

    def generate(length: int) -> object:
        options = {"completion_batch_size": ROWS, "prefill_batch_size": ROWS, "sampler": mx.random.categorical}
        generator = BatchGenerator(model, **options)
        generator.insert([[BOS]] * ROWS, [length] * ROWS)
        count = 0
        while responses := generator.next_generated():
            count += len(responses)
        generator.close()
        assert count == ROWS * length
        return count

    return generate


def sampling(threads: int, rounds: int, clock: Clock, length: int) -> None:
    contenders: dict[str, Callable[[int], object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        u = uniforms(0, 0, ROWS, length)
        prompts = np.full((ROWS, 1), BOS, np.int32)
        for backend in available_backends():
            trainer = trainer_of(backend, threads)
            if not contenders:
                trainer.save(folder / "model.safetensors")
                (folder / "config.json").write_text(json.dumps(hf_config(SPEC, bos_token_id=BOS, eos_token_id=2)))
            contenders[f"forget replay, {backend}"] = lambda length, trainer=trainer: trainer.sample(prompts, u[:, :length])
        if "mlx" in available_backends():
            contenders["mlx-lm batch generator"] = with_mlx_lm(folder)
        baseline = "transformers generate"
        try:
            contenders = {baseline: with_transformers(folder), **contenders}
        except ImportError:
            baseline = next(iter(contenders))
            print("transformers is not installed: no baseline")
        for work in contenders.values():
            work(8)
        figures = interleaved(
            {name: lambda work=work: rate(lambda: work(length), ROWS * length, clock) for name, work in contenders.items()},
            rounds=rounds,
        )
    title = f"sampling, {num_params(SPEC):,} parameters, {ROWS} rows of {length}, fp32, {threads} threads"
    print_ratios(title, figures, baseline=baseline, unit="tokens/s")


def rate(work: Callable[[], object], amount: float, clock: Clock) -> float:
    """Amount of work per second of one call."""
    start = clock()
    work()
    return amount / (clock() - start)


def make_batch(task_rows: int, replay_rows: int, term: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    rows = task_rows + replay_rows
    kind = np.zeros(rows, np.uint8)
    kind[:: rows // replay_rows][:replay_rows] = 1 if replay_rows else 0
    return Batch(
        tokens=rng.integers(3, SPEC.vocab_size, (rows, SPEC.context_length + 1)).astype(np.int32),
        loss_mask=np.ones((rows, SPEC.context_length), np.uint8),
        segment=None,
        term=kind * np.uint8(term),
        source=kind,
    )


def replay_cost(backend: str, threads: int, rounds: int, clock: Clock, task_rows: int) -> None:
    """Task tokens per second of a step with and without replay rows, a quarter as many."""
    amount, replay_rows = task_rows * SPEC.context_length, task_rows // 4
    contenders: dict[str, Callable[[], float]] = {}
    for name in ("plain", "ntp-replay", "kl-replay", "kl-replay, kept in full", "kl-replay, kept top-64"):
        method = method_spec(name.partition(",")[0])
        trainer = trainer_of(backend, threads, method)
        kept = name.partition("kept ")[2]
        if not kept:
            trainer.set_reference(method.reference)
        batches = [
            make_batch(task_rows, replay_rows, method.replay_term, seed) if method.replay_term else plain_batch(task_rows, seed)
            for seed in range(2)
        ]
        if kept:
            top = None if kept == "in full" else int(kept.removeprefix("top-"))
            batches = [with_reference(batch, trainer, top) for batch in batches]
        trainer.train_step(batches[0], 1e-4).read()

        def work(trainer: Trainer = trainer, batch: Batch = batches[1]) -> float:
            return rate(lambda: trainer.train_step(batch, 1e-4).read(), amount, clock)

        contenders[name] = work
    title = f"{backend}: {replay_rows} replay rows beside {task_rows} task rows, {num_params(SPEC):,} parameters (cost = 1 / ratio)"
    print_ratios(title, interleaved(contenders, rounds=rounds), baseline="plain", unit="task tokens/s")


def with_reference(batch: Batch, trainer: Trainer, top: int | None) -> Batch:
    """The batch with what the trainer's model says about its KL rows."""
    rows = ReferenceRows.of(trainer.log_probs(batch.tokens[batch.term == TERM_REPLAY_KL]), top)
    return replace(batch, reference=rows)


def plain_batch(task_rows: int, seed: int) -> Batch:
    whole = make_batch(task_rows, 1, 1, seed)
    rows = np.flatnonzero(whole.term == 0)
    return Batch(whole.tokens[rows], whole.loss_mask[rows], None, whole.term[rows], whole.source[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=255)
    parser.add_argument("--cpu-time", action="store_true", help="rates per CPU second")
    parser.add_argument("--task-rows", type=int, default=32, help="of a step whose cost is measured")
    parser.add_argument("--backend", choices=available_backends(), help="only this one")
    parser.add_argument("--only", choices=("sampling", "cost"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    clock = time.process_time if options.cpu_time else time.perf_counter
    backends = [options.backend] if options.backend else available_backends()
    if options.only != "cost":
        sampling(options.threads, options.rounds, clock, options.length)
    for backend in backends if options.only != "sampling" else ():
        replay_cost(backend, options.threads, options.rounds, clock, options.task_rows)


if __name__ == "__main__":
    main()
