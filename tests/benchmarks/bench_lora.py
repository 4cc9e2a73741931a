"""LoRA training speed: PyTorch against peft and a minimal loop, MLX against mlx-lm's layers in the loop of `mlx_lm.lora`, same BLAS.

    python -m tests.benchmarks.bench_lora [--model 4x128] [--rounds 5] [--threads 1] [--target attention]

Same shapes, rank, modules, batch and threads; each contender in a process of its own, in turns. Ratios are per second of the clock and, for
a machine that others use, per CPU-second.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RATE = 1e-3
PAIRS = {"cuda": "peft", "mlx": "mlx-lm"}
SUFFIXES = {"attention": ("attn.c_attn", "attn.c_proj"), "all-linear": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def ours(backend, args):
    """One step of this tool."""
    import numpy as np

    from mlx_forget.backends import load_backend
    from mlx_forget.ladder import model_spec
    from mlx_forget.trainer import AdapterSpec, Batch, RuntimeSpec, TrainerSpec

    spec = model_spec(args.model, args.vocab, args.context)
    adapter = AdapterSpec(rank=args.rank, alpha=2.0 * args.rank, target_modules=(args.target,))
    trainer = load_backend(backend)(
        TrainerSpec(model=spec, adapter=adapter, runtime=RuntimeSpec(device="cpu", num_threads=args.threads))
    )
    zeros, mask = np.zeros(args.batch, np.uint8), np.ones((args.batch, args.context), np.uint8)
    batch = Batch(tokens_of(args), mask, None, zeros, zeros)
    return lambda: trainer.train_step(batch, RATE).read()


def peft(args):
    """One step of transformers' GPT-2 with peft's LoRA, AdamW and clipping, as a training script has it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    from mlx_forget.ladder import hf_config, model_spec

    torch.set_num_threads(args.threads)
    config = hf_config(model_spec(args.model, args.vocab, args.context), bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(GPT2Config(**config)).train()
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=list(SUFFIXES[args.target]),
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(tokens_of(args)).long()

    def step():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def mlx_lm(args):
    """One step of mlx-lm's GPT-2 with its LoRA layers, compiled over its state as `mlx_lm.lora` does."""
    # Loads the BLAS that this backend uses, before MLX.
    import mlx_forget.mlx_backend  # noqa: F401  # isort: skip
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.models.gpt2 import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_forget.ladder import hf_config, model_spec

    mx.set_default_device(mx.cpu)
    config = hf_config(model_spec(args.model, args.vocab, args.context), bos_token_id=1, eos_token_id=2)
    model = Model(ModelArgs.from_dict({**config, "n_ctx": args.context}))
    model.freeze()
    parameters = {"rank": args.rank, "scale": 2.0, "dropout": 0.0, "keys": list(SUFFIXES[args.target])}
    linear_to_lora_layers(model, config["n_layer"], parameters)
    model.train()
    optimizer = optim.AdamW(learning_rate=RATE, betas=[0.9, 0.95], weight_decay=0.1)
    tokens = mx.array(tokens_of(args))

    def loss_of(model, tokens):
        return nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:]).mean()

    gradient = nn.value_and_grad(model, loss_of)
    state = [model.state, optimizer.state, mx.random.state]

    def update(tokens):
        loss, grads = gradient(model, tokens)
        optimizer.update(model, grads)
        return loss

    compiled = mx.compile(update, inputs=state, outputs=state)

    def step():
        loss = compiled(tokens)
        mx.eval(state, loss)
        return loss.item()

    return step


def tokens_of(args):
    import numpy as np

    return np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.context + 1)).astype(np.int32)


def work(args):
    """The worker: two warm steps, then one segment per line read, its two rates written back."""
    step = {"peft": lambda: peft(args), "mlx-lm": lambda: mlx_lm(args)}.get(args.worker, lambda: ours(args.worker, args))()
    step()
    step()
    amount = args.steps * args.batch * args.context
    for _ in sys.stdin:
        clock, cpu = time.perf_counter(), time.process_time()
        for _ in range(args.steps):
            step()
        print(json.dumps([amount / (time.perf_counter() - clock), amount / (time.process_time() - cpu)]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="4x128")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--target", choices=list(SUFFIXES), default="attention")
    parser.add_argument("--steps", type=int, default=3, help="steps of a segment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", choices=list(PAIRS), action="append", help="default: both")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    for backend in args.backend or PAIRS:
        names = (backend, PAIRS[backend])
        shared = [
            f"--{key}={getattr(args, key)}" for key in ("model", "batch", "context", "vocab", "rank", "target", "steps", "threads")
        ]
        workers = {
            name: subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.bench_lora", f"--worker={name}", *shared],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for name in names
        }
        rates = {name: [] for name in names}
        for _ in range(args.rounds):
            for name, process in workers.items():
                print(file=process.stdin, flush=True)
                rates[name].append(json.loads(process.stdout.readline()))
        for process in workers.values():
            process.communicate()
        print(
            f"LoRA r={args.rank} on {args.target}, {args.model}, batch {args.batch} x {args.context}, vocabulary {args.vocab}, fp32"
        )
        for k, unit in enumerate(("tokens/s", "tokens per CPU-second")):
            left, right = ([pair[k] for pair in rates[name]] for name in names)
            ratio = statistics.median(a / b for a, b in zip(left, right, strict=True))
            print(
                f"  {backend} {statistics.median(left):>8,.0f}   {names[1]} {statistics.median(right):>8,.0f} {unit:<21} ratio {ratio:.2f}"
            )


if __name__ == "__main__":
    main()
