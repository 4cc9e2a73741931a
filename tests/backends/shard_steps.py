"""One rank of the sharding test: `torchrun -m tests.backends.shard_steps FOLDER` trains a few steps of shared models and writes what each rank saw."""

import json
import sys
from pathlib import Path

import numpy as np

from mlx_forget.backends import load_backend
from mlx_forget.ladder import ModelSpec, model_spec
from mlx_forget.methods import method_spec
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from tests.backends.parity import SPEC, injection_batch
from tests.backends.rank_steps import share

STEPS = 4
# name -> (model, method, what the runtime adds). 97 rows of vocabulary do not divide by two.
CASES: dict[str, tuple[ModelSpec, str, dict[str, object]]] = {
    "plain": (SPEC, "plain", {}),
    "recomputed": (SPEC, "plain", {"grad_checkpoint": True, "micro_batch_size": 3}),
    "anchored": (SPEC, "anchored-adamw", {}),
    "qknorm": (model_spec("qknorm-3x48", SPEC.vocab_size, SPEC.context_length), "plain", {}),
}


def train(folder, case, name, *, shard, start=None):
    """Train a case from the start, or from another run's files; returns losses and norms of each step and the losses of some rows after."""
    model, method, runtime = CASES[case]
    options = RuntimeSpec(device="cpu", num_threads=1, shard=shard, **runtime)
    trainer = load_backend("cuda")(TrainerSpec(model=model, method=method_spec(method), runtime=options, seed=3))
    if method == "anchored-adamw":
        trainer.set_reference("start")
    first = 0
    if start is not None:
        trainer.load(folder / f"{case}-{start}.safetensors")
        trainer.load_state(folder / f"{case}-{start}.state.safetensors")
        first = STEPS
    seen = []
    for step in range(first, first + STEPS):
        # The last batch has one row: the other rank has none, and takes the step for its sake.
        batch = injection_batch(step) if step % STEPS < STEPS - 1 else share(injection_batch(0), 0, 20)
        reading = trainer.train_step(share(batch, trainer.group.rank, trainer.group.size), 3e-3).read()
        seen.append([*reading.loss_sums.ravel(), *reading.counts.ravel(), reading.grad_norm, reading.skipped])
    # Three rows for two ranks.
    probe = injection_batch(50).tokens[:3]
    own = slice(trainer.group.rank, None, trainer.group.size)
    losses = np.zeros(3)
    losses[own] = trainer.token_losses(probe[own]).mean(axis=1)
    seen.append(trainer.group.all_sum(losses).tolist())
    with trainer.gathered(with_training_state=True):
        if trainer.group.rank == 0:
            trainer.save(folder / f"{case}-{name}.safetensors")
            trainer.save_state(folder / f"{case}-{name}.state.safetensors")
    trainer.group.barrier()
    return trainer, seen


def main():
    folder = Path(sys.argv[1])
    result = {}
    for case in CASES:
        trainer, seen = train(folder, case, "two", shard=True)
        held = sum(value.numel() for value in trainer._weights.values()) + sum(
            v.numel() for v in trainer._optimizer.moments.values()
        )
        result[case] = {"seen": seen, "held": held}
    # `one` was left there by a single process.
    _, result["from one"] = train(folder, "plain", "two-from-one", shard=True, start="one")
    (folder / f"rank{trainer.group.rank}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
