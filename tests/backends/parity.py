"""How far MLX and PyTorch are apart: each function measures one thing, on the CPU, from the same weights and batches.

`test_parity.py` holds the measurements to their bands; `parity_table.py` writes them into the README.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load_file

from mlx_forget.backends import load_backend
from mlx_forget.ladder import hf_config, initial_weights, model_spec
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, TrainerSpec

SPEC = model_spec("3x48", vocab_size=97, context_length=24)
TARGET_SHIFT, PRETRAIN_SHIFT = 7, 31
ROWS = 20


@dataclass(frozen=True)
class Measurement:
    """A difference, the band it must stay in, and its unit."""

    what: str
    value: float
    band: float
    unit: str


def trainer_of(name, *, optim=None, seed=3, **runtime):
    device = "cpu"
    return load_backend(name)(
        TrainerSpec(model=SPEC, optim=optim or OptimSpec(), runtime=RuntimeSpec(device=device, **runtime), seed=seed)
    )


def pair(**options):
    return trainer_of("mlx", **options), trainer_of("cuda", **options)


def rows(seed, count, shift):
    """Noisy arithmetic sequences: each token is the one before plus `shift`, or, one time in five, any token."""
    rng = np.random.default_rng(seed)
    tokens = np.empty((count, SPEC.context_length + 1), np.int32)
    tokens[:, 0] = rng.integers(0, SPEC.vocab_size, count)
    for t in range(1, tokens.shape[1]):
        noise = rng.random(count) < 0.2
        tokens[:, t] = np.where(noise, rng.integers(0, SPEC.vocab_size, count), (tokens[:, t - 1] + shift) % SPEC.vocab_size)
    return tokens


def injection_batch(step):
    """19 target rows and 1 pretraining row: p = 5%."""
    source = np.zeros(ROWS, np.uint8)
    source[step % ROWS] = 1
    tokens = np.where(source[:, None] == 1, rows([1, step], ROWS, PRETRAIN_SHIFT), rows([2, step], ROWS, TARGET_SHIFT))
    mask = np.ones((ROWS, SPEC.context_length), np.uint8)
    mask[::3, :4] = 0
    return Batch(tokens.astype(np.int32), mask, None, np.zeros(ROWS, np.uint8), source)


def pretraining_batch(step):
    batch = injection_batch(step)
    return replace(batch, tokens=rows([3, step], ROWS, PRETRAIN_SHIFT), source=np.zeros(ROWS, np.uint8))


def mean_loss(reading):
    return reading.loss_sums.sum() / reading.counts.sum()


def saved(trainer):
    with TemporaryDirectory() as folder:
        trainer.save(Path(folder) / "w.safetensors")
        return load_file(Path(folder) / "w.safetensors")


def largest_difference(left, right):
    """Over all weights."""
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def block_logits():
    """Largest difference of logits after 0, 1, 2 and 3 blocks, over the largest logit."""
    import mlx.core as mx
    import torch

    from cuda_backend import architectures as torch_ladder
    from mlx_forget.mlx_backend import architectures as mlx_ladder
    from mlx_forget.mlx_backend.operators import operators

    weights = {name: value * 3 for name, value in initial_weights(SPEC, 3)}
    inputs = rows(0, 8, TARGET_SHIFT)[:, :-1]
    head, worst = "transformer.wte.weight", 0.0
    for fused in (True, False):
        for num_layers in range(SPEC.num_layers + 1):
            spec = replace(SPEC, num_layers=num_layers)
            own = {name: mx.array(value) for name, value in weights.items()}
            ops = operators(dtype=mx.float32, on_cpu=True, fused=fused)
            left = mlx_ladder.hidden_states(own, spec, mx.array(inputs), operators=ops) @ own[head].T
            tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
            right = torch_ladder.hidden_states(tensors, spec, torch.from_numpy(inputs).long()) @ tensors[head].T
            size = float(right.abs().max())
            worst = max(worst, float(np.abs(np.array(left) - right.numpy()).max()) / size)
    return Measurement("logits after each block, largest difference / largest logit", worst, 5e-5, "")


def losses():
    left, right = pair()
    tokens = rows(0, 40, TARGET_SHIFT)
    worst = float(np.abs(left.token_losses(tokens) - right.token_losses(tokens)).max())
    return Measurement("loss of a token, largest difference", worst, 2e-5, "nats")


def gradients():
    """One step with beta1 = beta2 = 0 and a huge epsilon is a gradient step: the weights show the gradient."""
    optim = OptimSpec(beta1=0.0, beta2=0.0, epsilon=1e6, weight_decay=0.0, max_grad_norm=0.0)
    before, moved = dict(initial_weights(SPEC, 3)), []
    for trainer in pair(optim=optim):
        trainer.train_step(injection_batch(0), 1e6).read()
        after = saved(trainer)
        moved.append({name: before[name] - after[name] for name in after})
    size = max(float(np.abs(value).max()) for value in moved[1].values())
    return Measurement("gradient, largest difference / largest entry", largest_difference(*moved) / size, 1e-5, "")


def twenty_steps(**options):
    trainers = pair(optim=OptimSpec(max_grad_norm=0.5), **options)
    for step in range(20):
        for trainer in trainers:
            trainer.train_step(injection_batch(step), 3e-3)
    return Measurement(
        "weights after 20 AdamW steps (clipped, decayed), largest difference",
        largest_difference(*map(saved, trainers)),
        3e-4,
        "",
    )


def finetune(num_steps=50, **options):
    """Pretrain 20 steps, then finetune with 5% of pretraining rows: worst difference of the batch loss, and of both evaluations."""
    trainers = pair(optim=OptimSpec(max_grad_norm=1.0), **options)
    batch_loss = 0.0
    for step in range(20):
        for trainer in trainers:
            trainer.train_step(pretraining_batch(step), 3e-3)
    for step in range(num_steps):
        left, right = (mean_loss(trainer.train_step(injection_batch(step), 1e-3).read()) for trainer in trainers)
        batch_loss = max(batch_loss, abs(left - right))
    evaluation = 0.0
    for shift in (TARGET_SHIFT, PRETRAIN_SHIFT):
        left, right = (float(trainer.token_losses(rows(9, 40, shift)).mean()) for trainer in trainers)
        evaluation = max(evaluation, abs(left - right))
    return (
        Measurement(f"batch loss over {num_steps} finetuning steps, p = 5%, worst", batch_loss, 1e-3, "nats"),
        Measurement("evaluation losses after them (target, pretraining), worst", evaluation, 1e-3, "nats"),
    )


def u_curve(num_seeds=3, num_steps=120):
    """Overfit few rows: at the lowest validation loss, the largest difference between backends over the spread between seeds."""
    pool, held_out = rows(11, 60, TARGET_SHIFT), rows(12, 60, TARGET_SHIFT)
    lowest = {"mlx": [], "cuda": []}
    for seed in range(num_seeds):
        for name, found in lowest.items():
            trainer, losses = trainer_of(name, seed=seed), []
            for step in range(num_steps):
                batch = injection_batch(step)
                chosen = pool[np.random.default_rng([seed, step]).integers(0, len(pool), ROWS)]
                tokens = np.where(batch.source[:, None] == 1, batch.tokens, chosen)
                trainer.train_step(replace(batch, tokens=tokens), 1e-2)
                if step % 5 == 4:
                    losses.append(float(trainer.token_losses(held_out).mean(dtype=np.float64)))
            assert min(losses) < losses[-1], "the minimum must lie inside the run"
            found.append(min(losses))
    spread = float(np.std(lowest["cuda"], ddof=1))
    worst = max(abs(left - right) for left, right in zip(lowest["mlx"], lowest["cuda"], strict=True))
    return Measurement(
        "validation loss at the U-curve's minimum, largest difference / seed standard deviation", worst / spread, 1 / 3, ""
    )


def micro_batches():
    return replace(
        finetune(10, micro_batch_size=7, grad_checkpoint=True)[0],
        what="the same in micro-batches of 7 with recomputed activations, 10 steps, worst",
    )


def bf16():
    trainers, worst = pair(precision="bf16"), 0.0
    for step in range(20):
        left, right = (mean_loss(trainer.train_step(injection_batch(step), 1e-3).read()) for trainer in trainers)
        worst = max(worst, abs(left - right))
    return Measurement("batch loss over 20 steps in bf16, worst", worst, 2e-2, "nats")


def switch(first, second):
    """Train 5 steps on one backend, continue on the other: worst difference of the next 5 losses to staying."""
    here, there = trainer_of(first), trainer_of(second, seed=8)
    for step in range(5):
        here.train_step(injection_batch(step), 3e-3)
    with TemporaryDirectory() as folder:
        weights, state = Path(folder) / "w.safetensors", Path(folder) / "s.safetensors"
        here.save(weights)
        here.save_state(state)
        there.load(weights)
        there.load_state(state)
    worst = 0.0
    for step in range(5, 10):
        left, right = (mean_loss(trainer.train_step(injection_batch(step), 3e-3).read()) for trainer in (here, there))
        worst = max(worst, abs(left - right))
    names = {"mlx": "MLX", "cuda": "PyTorch"}
    return Measurement(f"5 losses after moving a run from {names[first]} to {names[second]}, worst", worst, 1e-3, "nats")


def samples():
    """Share of sampled tokens that differ, of models trained a little (so that rows are not uniform)."""
    left, right = pair()
    for step in range(5):
        left.train_step(injection_batch(step), 3e-3)
    with TemporaryDirectory() as folder:
        left.save(Path(folder) / "w.safetensors")
        right.load(Path(folder) / "w.safetensors")
    u = np.random.default_rng(5).random((16, 20))
    prompts = rows(4, 16, TARGET_SHIFT)[:, :3]
    different = left.sample(prompts, u) != right.sample(prompts, u)
    # Once one token of a row differs, the rest of it may: count rows.
    return Measurement(
        "rows sampled from the same weights and uniforms that differ",
        float(different.any(axis=1).mean()),
        0.0,
        "of 16 rows",
    )


def transformers_logits():
    """Largest difference to GPT2LMHeadModel, loaded from a checkpoint of ours: -log p of every token at every place."""
    import torch
    from transformers import GPT2LMHeadModel

    trainer = trainer_of("mlx")
    for step in range(5):
        trainer.train_step(injection_batch(step), 3e-3)
    tokens = rows(6, 8, TARGET_SHIFT)
    with TemporaryDirectory() as folder:
        trainer.save(Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(SPEC, bos_token_id=1, eos_token_id=2)))
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens[:, :-1]).long()).logits.double().numpy()
    import mlx.core as mx

    from mlx_forget.mlx_backend import architectures
    from mlx_forget.mlx_backend.operators import operators

    weights = {name: mx.array(value) for name, value in saved(trainer).items()}
    ops = operators(dtype=mx.float32, on_cpu=True, fused=True)
    ours = architectures.hidden_states(weights, SPEC, mx.array(tokens[:, :-1]), operators=ops) @ weights["transformer.wte.weight"].T
    worst = float(np.abs(np.array(ours).astype(np.float64) - logits).max())
    return Measurement("logits against transformers' GPT2LMHeadModel, largest difference", worst, 1e-4, "")


def operators_agree():
    """The operators of a GPU against those of a CPU, on the CPU: one gradient step."""
    import mlx.core as mx

    from mlx_forget.mlx_backend import architectures
    from mlx_forget.mlx_backend.operators import operators

    weights = {name: mx.array(value) for name, value in initial_weights(SPEC, 3)}
    tokens, found = mx.array(rows(0, 4, TARGET_SHIFT)), []
    share = mx.full((4, SPEC.context_length), 1 / tokens[:, 1:].size)
    for on_cpu in (True, False):
        ops = operators(dtype=mx.float32, on_cpu=on_cpu, fused=True)
        _, grads = architectures.gradients(weights, SPEC, tokens[:, :-1], tokens[:, 1:], share, chunk=64, operators=ops)
        found.append({name: np.array(value) for name, value in grads.items()})
    size = max(float(np.abs(value).max()) for value in found[1].values())
    return Measurement("MLX's GPU operators against its CPU operators: gradient, largest difference / largest entry",
                       largest_difference(*found) / size, 1e-5, "")  # fmt: skip


def everything():
    """Every measurement, in the order of the table."""
    return [
        block_logits(), losses(), gradients(), twenty_steps(), *finetune(), u_curve(), micro_batches(), bf16(),
        switch("mlx", "cuda"), switch("cuda", "mlx"), samples(), transformers_logits(), operators_agree(),
    ]  # fmt: skip
