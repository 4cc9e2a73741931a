"""What the registry knows of this backend: the trainer of a run, which may share its model among processes, and stacks."""

from collections.abc import Sequence

from cuda_backend.distributed import join
from cuda_backend.sharded_trainer import ShardedTrainer
from cuda_backend.stack import TorchStack
from cuda_backend.trainer import TorchTrainer
from mlx_forget.trainer import Stack, TrainerSpec


class TorchBackend(TorchTrainer):
    """A trainer with the whole model; where `--shard` is asked for and there are several processes, a `ShardedTrainer` instead."""

    def __new__(cls, spec: TrainerSpec) -> TorchTrainer:  # type: ignore[misc]
        if spec.runtime.shard and not spec.runtime.reads_only and join().size > 1:
            return ShardedTrainer(spec)
        return super().__new__(cls)

    @classmethod
    def stack(cls, spec: TrainerSpec, seeds: Sequence[int]) -> Stack:
        return TorchStack(spec, seeds)
