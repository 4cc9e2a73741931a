"""One rank of the distribution test: `LAUNCHER python -m tests.backends.rank_steps BACKEND FOLDER` trains a few steps and writes what each rank saw."""

import json
import sys
from pathlib import Path

import numpy as np

from mlx_forget.backends import load_backend
from mlx_forget.trainer import Batch, RuntimeSpec, TrainerSpec
from tests.backends.parity import SPEC, injection_batch

STEPS = 6


def share(batch, rank, world_size):
    """The rows of a batch that belong to a rank."""
    mine = slice(rank, None, world_size)
    return Batch(batch.tokens[mine], batch.loss_mask[mine], None, batch.term[mine], batch.source[mine])


def train(backend, folder, name, *, start=None):
    """Train from the start, or from another run's files; returns losses, norms and counts of each step, and the final weights' file."""
    trainer = load_backend(backend)(TrainerSpec(model=SPEC, runtime=RuntimeSpec(device="cpu", num_threads=1), seed=3))
    first = 0
    if start is not None:
        trainer.load(folder / f"{start}.safetensors")
        trainer.load_state(folder / f"{start}.state.safetensors")
        first = STEPS
    seen = []
    for step in range(first, first + STEPS):
        batch = share(injection_batch(step), trainer.group.rank, trainer.group.size)
        reading = trainer.train_step(batch, 3e-3).read()
        seen.append([*reading.loss_sums.ravel(), *reading.counts.ravel(), reading.grad_norm])
    # One row for two ranks: the other has none, and still takes the step.
    lonely = share(injection_batch(0), 0, 20)
    mine = lonely if trainer.group.rank == 0 else share(lonely, 1, 2)
    reading = trainer.train_step(mine, 3e-3).read()
    seen.append([*reading.loss_sums.ravel(), *reading.counts.ravel(), reading.grad_norm])
    if trainer.group.rank == 0:
        trainer.save(folder / f"{name}.safetensors")
        trainer.save_state(folder / f"{name}.state.safetensors")
    trainer.group.barrier()
    return trainer.group, seen


def main():
    backend, folder = sys.argv[1], Path(sys.argv[2])
    group, seen = train(backend, folder, "two")
    _, later = train(backend, folder, "two-resumed", start="two")
    result = {
        "world_size": group.size,
        "seen": seen,
        "later": later,
        "sum": group.all_sum(np.array([group.rank + 1 + 1e-12, 2.0])).tolist(),
        "broadcast": group.broadcast(np.array([10.0 + group.rank])).tolist(),
        "agree": group.agree(group.rank == 1, False),
        "smallest": group.smallest(8 - group.rank),
    }
    (folder / f"rank{group.rank}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
