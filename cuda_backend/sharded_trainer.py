"""The trainer of a run whose processes share one model (`--shard`): each holds a part of every weight, gradient and moment."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cuda_backend.sharded import Shards
from cuda_backend.trainer import TorchTrainer
from mlx_forget.comparison import Comparison
from mlx_forget.errors import OutOfMemory, UserError
from mlx_forget.ladder import ModelSpec, initial_weights
from mlx_forget.trainer import Batch


class ShardedTrainer(TorchTrainer):
    """All processes take every pass together, so one with fewer rows than the others adds rows that count for nothing."""

    def _start_weights(self) -> dict[str, Tensor]:
        spec = self.spec
        if not isinstance(spec.model, ModelSpec):
            raise UserError("--shard knows the models of the ladder: leave it out for a checkpoint of another tool.")
        if spec.method.has_kl or spec.method.ewc:
            raise UserError(f"Method {spec.method.name!r} reads a whole second model: it does not go with --shard.")
        if spec.adapter is not None:
            raise UserError("Adapters are small, and their base is not sharded: leave --shard out.")
        if spec.optim.name != "adamw":
            raise UserError(f"Optimizer {spec.optim.name!r} needs whole matrices: --shard takes adamw.")
        start = initial_weights(spec.model, spec.seed)
        options = {"grad_checkpoint": spec.runtime.grad_checkpoint}
        self._shards = Shards(
            spec.model, start, self._torch_device, self._passes.dtype, self._passes.chunk, self._compiled, **options
        )
        self._gathered: dict[str, Tensor] = {}
        return self._shards.weights

    def _gradients_that_fit(
        self, batch: Batch, token_weight: npt.NDArray[np.float32], kl_weight: npt.NDArray[np.float32] | None
    ) -> Tensor:
        batch, num_rows = self._filled(batch), len(batch.tokens)
        weight = np.zeros((len(batch.tokens), *token_weight.shape[1:]), np.float32)
        weight[:num_rows] = token_weight
        try:
            return self._batch_gradients(batch, weight, kl_weight)
        except torch.OutOfMemoryError as error:
            # None can take more passes than the others.
            rows = self._micro_batch_size or len(batch.tokens)
            raise OutOfMemory(
                f"{rows} rows at a time are more than the device holds ({str(error).splitlines()[0]}): "
                "lower --micro-batch-size, or use --grad-checkpoint, more processes, or a smaller model."
            ) from None

    def _accumulate_gradient(
        self, batch: Batch, rows: slice, weight: npt.NDArray[np.float32], kl_weight: npt.NDArray[np.float32] | None
    ) -> tuple[Tensor, Tensor | None]:
        inputs, labels = self._passes.split(batch.tokens[rows])
        segment = None if batch.segment is None else self._passes.on_device(batch.segment[rows])
        return self._shards.loss(inputs, labels, self._passes.on_device(weight).flatten(), segment).view(inputs.shape), None

    def _summed_gradients(self, sums: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        (sums,) = self._summed([sums])
        return self._shards.gradients(), sums

    def _norm(self, gradients: dict[str, Tensor]) -> Tensor:
        return self._shards.norm(gradients)

    def _clear_gradients(self) -> None:
        for value in self._shards.parameters():
            value.grad = None

    def token_losses(self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.float32]:
        num_rows = self._shards.largest(len(tokens))
        return super().token_losses(_padded(tokens, num_rows), None if segment is None else _padded(segment, num_rows))[
            : len(tokens)
        ]

    def _token_nll(self, weights: dict[str, Tensor], inputs: Tensor, labels: Tensor, segment: Tensor | None) -> Tensor:
        return self._shards.token_nll(inputs, labels, segment)

    @contextmanager
    def gathered(self, *, with_training_state: bool) -> Iterator[None]:
        self._gathered = self._shards.whole(self._weights | (self._optimizer.moments if with_training_state else {}))
        try:
            yield
        finally:
            self._gathered = {}

    def _own_weights(self) -> dict[str, Tensor]:
        return {name: self._gathered[name] for name in self._weights}

    def _own_state(self) -> dict[str, Tensor]:
        return self._optimizer.state() | {name: self._gathered[name] for name in self._optimizer.moments}

    def _read_weights(self, path: Path, *, or_adapters: bool = False) -> dict[str, Tensor]:
        parts = self._shards.read(path, {name: name for name in self._weights})
        if not parts:
            raise UserError(f"{path} does not hold the weights of this model: names or shapes differ.")
        return parts

    def _read_state(self, path: Path) -> dict[str, Tensor]:
        return self._shards.read(path, {name: name.split(".", 1)[1] for name in self._optimizer.moments})

    def compare(self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> Comparison:
        raise _whole_model_needed("Comparing two models")

    def log_probs(self, *arguments: Any, **options: Any) -> npt.NDArray[np.float32]:
        raise _whole_model_needed("Reading whole distributions")

    def set_fisher(self, *arguments: Any, **options: Any) -> None:
        raise _whole_model_needed("Measuring Fisher information")

    def sample(self, *arguments: Any, **options: Any) -> npt.NDArray[np.int32]:
        raise _whole_model_needed("Sampling")

    def _filled(self, batch: Batch) -> Batch:
        """The batch with as many rows as the process with most of them has; those added count for nothing."""
        num_rows = self._shards.largest(len(batch.tokens))
        if num_rows == len(batch.tokens):
            return batch
        return dataclasses.replace(
            batch,
            tokens=_padded(batch.tokens, num_rows),
            loss_mask=_padded(batch.loss_mask, num_rows),
            segment=None if batch.segment is None else _padded(batch.segment, num_rows),
            term=_padded(batch.term, num_rows),
            source=_padded(batch.source, num_rows),
        )


def _padded(rows: npt.NDArray[Any], num_rows: int) -> npt.NDArray[Any]:
    """The rows and zeros after them."""
    return np.concatenate([rows, np.zeros((num_rows - len(rows), *rows.shape[1:]), rows.dtype)])


def _whole_model_needed(what: str) -> UserError:
    return UserError(f"{what} needs a whole model on a device: leave --shard out.")
