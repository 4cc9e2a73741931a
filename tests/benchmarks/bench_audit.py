"""The audit: comparing two models against two bare forward passes, and the time of a whole audit.

    python -m tests.benchmarks.bench_audit [--backend cuda] [--shape 7x320] [--rounds 9] [--whole]

A bare pass is what an evaluation costs: the losses of one model on the same rows (`token_losses`), for each of the two models. The
contenders take turns in one process; CPU time leaves out the waiting on a machine that others use.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlx_forget import checkpoint
from mlx_forget.audit.config import AuditConfig
from mlx_forget.audit.run import execute_audit, plan_audit
from mlx_forget.backends import choose_backend, load_backend
from mlx_forget.ladder import initial_weights, model_spec, num_params
from mlx_forget.pipeline.tokenizer import train_tokenizer
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from tests.audit.conftest import Weights
from tests.benchmarks.measure import interleaved, print_ratios

ROWS = 32


def throughput(backend, spec, folder, *, rounds, threads):
    """Tokens per CPU-second of a comparison and of two bare passes."""
    for seed, name in enumerate(("base", "tuned")):
        save_file(dict(initial_weights(spec, seed)), folder / f"{name}.safetensors")
    runtime = RuntimeSpec(reads_only=True, compile=False, num_threads=threads)
    trainer, other = (load_backend(backend)(TrainerSpec(model=spec, runtime=runtime)) for _ in range(2))
    trainer.load(folder / "tuned.safetensors")
    trainer.set_reference(folder / "base.safetensors")
    other.load(folder / "base.safetensors")
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (ROWS, spec.context_length + 1)).astype(np.int32)
    mask = np.ones((ROWS, spec.context_length), np.uint8)

    def per_cpu_second(work):
        def measure():
            start = time.process_time()
            work()
            return ROWS * spec.context_length / (time.process_time() - start)

        return measure

    contenders = {
        "two bare passes": per_cpu_second(lambda: (trainer.token_losses(tokens), other.token_losses(tokens))),
        "one comparison": per_cpu_second(lambda: trainer.compare(tokens, mask)),
    }
    for work in contenders.values():
        work()
    title = f"{backend}, {num_params(spec) / 1e6:.1f}M parameters, vocabulary {spec.vocab_size:,}, {ROWS} x {spec.context_length} tokens"
    print_ratios(title, interleaved(contenders, rounds=rounds), baseline="two bare passes", unit="tokens/CPU-s")


def whole(backend, shape, folder, *, num_tokens, threads):
    """Seconds of a whole audit of a million tokens."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), random.integers(2, 9))) for _ in range(3000)]
    texts = [" ".join(random.choice(words, 700)) + ".\n" for _ in range(2000)]
    tokenizer_file = folder / "tokenizer.model"
    tokenizer = train_tokenizer(texts, vocab_size=2048)
    tokenizer.save(tokenizer_file)
    spec = model_spec(shape, vocab_size=tokenizer.vocab_size, context_length=256)
    for seed, name in enumerate(("base", "tuned")):
        state = {"run_id": name, "is_pretraining": False, "step": 1}
        weights = Weights(dict(initial_weights(spec, seed)))
        checkpoint.save_checkpoint(folder / name, weights, spec, tokenizer_file, state, with_training_state=False)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = AuditConfig(backend=backend, max_tokens=num_tokens, num_threads=threads)
    start, cpu_start = time.perf_counter(), time.process_time()
    plan = plan_audit(str(folder / "base"), str(folder / "tuned"), {"text": str(folder / "text.jsonl")}, config)
    found = execute_audit(plan)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    print(
        f"a whole audit, {num_params(spec) / 1e6:.1f}M parameters, {found.texts[0].num_tokens:,} tokens, {backend}: {seconds:.0f} s "
        f"({cpu_seconds:.0f} CPU-s, {found.tokens_per_second:,.0f} tokens/s)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default=None)
    parser.add_argument("--shape", default="7x320")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="time a whole audit too: minutes")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the whole audit")
    options = parser.parse_args()
    backend = options.backend or choose_backend()[0]
    with tempfile.TemporaryDirectory() as scratch:
        spec = model_spec(options.shape, vocab_size=4096, context_length=256)
        if options.rounds:
            throughput(backend, spec, Path(scratch), rounds=options.rounds, threads=options.threads)
        if options.whole:
            whole(backend, options.shape, Path(scratch), num_tokens=options.tokens, threads=options.threads)


if __name__ == "__main__":
    main()
