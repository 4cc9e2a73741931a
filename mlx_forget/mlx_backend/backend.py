"""What the registry knows of this backend: the trainer of a run, and stacks."""

from collections.abc import Sequence

from mlx_forget.mlx_backend.stack import MLXStack
from mlx_forget.mlx_backend.trainer import MLXTrainer
from mlx_forget.trainer import Stack, TrainerSpec


class MLXBackend(MLXTrainer):
    """A trainer of one model, and of several models of one shape."""

    @classmethod
    def stack(cls, spec: TrainerSpec, seeds: Sequence[int]) -> Stack:
        return MLXStack(spec, seeds)
