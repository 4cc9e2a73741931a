"""The models that the trainer drives, behind one interface: functions of a dict of weights in Hugging Face names.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from cuda_backend import architectures, lora
from cuda_backend.sample import sample
from mlx_forget.ladder import ModelSpec, head_name, initial_weights, num_shared_blocks, param_shapes
from mlx_forget.pretrained import PretrainedSpec

Weights = Mapping[str, Tensor]


class Decoder(Protocol):
    """What the trainer asks of a model.

    A model whose logits are more than a product with its output matrix gives logits instead of hidden states, and no head.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every weight that `start_weights` gives."""

    def start_weights(self, seed: int) -> Iterable[tuple[str, Tensor]]:
        """The weights to train, float32 on the device, by their names."""

    def hidden_states(
        self, weights: Weights, tokens_BT: Tensor, segment_BT: Tensor | None = None, *, grad_checkpoint: bool = False
    ) -> Tensor:
        """Final hidden states [B, T, D] of int64[B, T] tokens, or logits [B, T, V] where there is no head."""

    def hidden_states_of_two(
        self, weights: Weights, reference: Weights, tokens_BT: Tensor, *, shared: int
    ) -> tuple[Tensor, Tensor]:
        """The same of two sets of weights, whose first `shared` blocks are the same."""

    def num_shared_blocks(self, weights: Weights, reference: Weights) -> int:
        """How many of the first blocks are the same in two sets of weights; -1 where the embeddings already differ."""

    def head(self, weights: Weights) -> Tensor | None:
        """The output matrix [V, D], or None where `hidden_states` gives logits."""

    def sample(
        self, weights: Weights, prompts_BP: Tensor, u_BT: Tensor, temperature: float, dtype: torch.dtype, *, num_ids: int | None
    ) -> Tensor:
        """Continue int64[B, P] prompts by inverse-CDF sampling among the first `num_ids`; int64[B, T] for uniforms float64[B, T]."""


class Ladder:
    """A rung of the ladder."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return param_shapes(self._spec)

    def start_weights(self, seed: int) -> Iterable[tuple[str, Tensor]]:
        return ((name, torch.from_numpy(value).to(self._device)) for name, value in initial_weights(self._spec, seed))

    def hidden_states(
        self, weights: Weights, tokens_BT: Tensor, segment_BT: Tensor | None = None, *, grad_checkpoint: bool = False
    ) -> Tensor:
        return architectures.hidden_states(lora.scaled(weights), self._spec, tokens_BT, segment_BT, grad_checkpoint=grad_checkpoint)

    def hidden_states_of_two(
        self, weights: Weights, reference: Weights, tokens_BT: Tensor, *, shared: int
    ) -> tuple[Tensor, Tensor]:
        weights, reference = lora.scaled(weights), lora.scaled(reference)
        return architectures.hidden_states_of_two(weights, reference, self._spec, tokens_BT, shared=shared)

    def num_shared_blocks(self, weights: Weights, reference: Weights) -> int:
        return num_shared_blocks(self._spec, lora.scaled(weights), reference, torch.equal)

    def head(self, weights: Weights) -> Tensor | None:
        return weights[head_name(self._spec)]

    def sample(
        self, weights: Weights, prompts_BP: Tensor, u_BT: Tensor, temperature: float, dtype: torch.dtype, *, num_ids: int | None
    ) -> Tensor:
        own = {name: value.detach().to(dtype) for name, value in lora.scaled(weights).items()}
        return sample(own, self._spec, prompts_BP, u_BT, temperature, num_ids)


def build_decoder(spec: ModelSpec | PretrainedSpec, device: torch.device, *, reads_only: bool) -> Decoder:
    """The model of a spec.

    Args:
        reads_only: weights come from elsewhere and are never trained.

    Raises:
        UserError: transformers is not installed or does not know the architecture.
    """
    if isinstance(spec, ModelSpec):
        return Ladder(spec, device)
    from cuda_backend.hf import Pretrained

    return Pretrained(spec, device, reads_only=reads_only)
