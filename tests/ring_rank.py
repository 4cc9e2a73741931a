"""One rank of the ring test: `mlx.launch -n 2 python -m tests.ring_rank FOLDER` trains a few steps and writes what each rank saw."""

import json
import sys
from pathlib import Path

import numpy as np

from mlx_forget.trainer import Batch, RuntimeSpec, TrainerSpec, load_backend
from tests.parity import SPEC, injection_batch

STEPS = 6


def share(batch, rank, world_size):
    """The rows of a batch that belong to a rank."""
    mine = slice(rank, None, world_size)
    return Batch(batch.tokens[mine], batch.loss_mask[mine], None, batch.term[mine], batch.source[mine])


def train(folder, name, *, start=None):
    """Train from the start, or from another run's files; returns losses, norms and counts of each step, and the final weights' file."""
    trainer = load_backend("mlx")(TrainerSpec(model=SPEC, runtime=RuntimeSpec(device="cpu", num_threads=1), seed=3))
    first = 0
    if start is not None:
        trainer.load(folder / f"{start}.safetensors")
        trainer.load_state(folder / f"{start}.state.safetensors")
        first = STEPS
    seen = []
    for step in range(first, first + STEPS):
        batch = share(injection_batch(step), trainer.rank, trainer.world_size)
        reading = trainer.train_step(batch, 3e-3).read()
        seen.append([*reading.loss_sums.ravel(), *reading.counts.ravel(), reading.grad_norm])
    if trainer.rank == 0:
        trainer.save(folder / f"{name}.safetensors")
        trainer.save_state(folder / f"{name}.state.safetensors")
    trainer.barrier()
    return trainer, seen


def main():
    folder = Path(sys.argv[1])
    trainer, seen = train(folder, "two")
    resumed, later = train(folder, "two-resumed", start="two")
    result = {
        "world_size": trainer.world_size,
        "seen": seen,
        "later": later,
        "sum": trainer.all_sum(np.array([trainer.rank + 1 + 1e-12, 2.0])).tolist(),
        "broadcast": resumed.broadcast(np.array([10.0 + trainer.rank])).tolist(),
    }
    (folder / f"rank{trainer.rank}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
