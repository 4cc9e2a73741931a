"""The models that the trainer drives, behind one interface: functions of a dict of weights in Hugging Face names.

Shapes: B rows, T tokens, D width, V vocabulary, N = B * T.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_forget.ladder import ModelSpec, head_name, initial_weights, num_shared_blocks, param_shapes
from mlx_forget.mlx_backend import architectures, compare, cross_entropy
from mlx_forget.mlx_backend.losses import KLTerm
from mlx_forget.mlx_backend.operators import Operators
from mlx_forget.mlx_backend.sample import sample
from mlx_forget.pretrained import PretrainedSpec

Weights = Mapping[str, mx.array]
Arrays = dict[str, mx.array]


class Decoder(Protocol):
    """What the trainer asks of a model."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every weight that `start_weights` gives."""

    def start_weights(self, seed: int) -> Iterable[tuple[str, mx.array]]:
        """The weights to train, float32, by their names."""

    def gradients(
        self,
        weights: Weights,
        tokens_BT: mx.array,
        labels_BT: mx.array,
        weight_BT: mx.array,
        segment_BT: mx.array | None = None,
        *,
        chunk: int,
        grad_checkpoint: bool = False,
        penalty: KLTerm | None = None,
    ) -> tuple[mx.array, Arrays]:
        """Losses and the gradients of their weighted sum, as `architectures.gradients` says."""

    def token_nll(
        self, weights: Weights, tokens_BT: mx.array, labels_N: mx.array, segment: mx.array | None, *, chunk: int
    ) -> mx.array:
        """Next-token losses in nats, float32[N]."""

    def logits(self, weights: Weights, tokens_BT: mx.array, segment: mx.array | None) -> mx.array:
        """Logits float32[B, T, V]."""

    def measures(
        self, weights: Weights, reference: Weights, tokens_BT: mx.array, labels_N: mx.array, *, shared: int, chunk: int
    ) -> mx.array:
        """The measures of `Comparison`, float32[10, N]; the first `shared` blocks of both sets of weights are the same."""

    def num_shared_blocks(self, weights: Weights, reference: Weights) -> int:
        """How many of the first blocks are the same in two sets of weights; -1 where the embeddings already differ."""

    def sample(
        self,
        weights: Weights,
        prompts_BP: npt.NDArray[np.int32],
        u_BT: npt.NDArray[np.float64],
        *,
        temperature: float,
        num_ids: int | None,
    ) -> npt.NDArray[np.int32]:
        """Continue int32[B, P] prompts by inverse-CDF sampling among the first `num_ids`; int32[B, T] for uniforms float64[B, T]."""


class Ladder:
    """A rung of the ladder."""

    def __init__(self, spec: ModelSpec, operators: Operators, streams: Sequence[mx.Stream]) -> None:
        self._spec, self._operators, self._streams = spec, operators, streams

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return param_shapes(self._spec)

    def start_weights(self, seed: int) -> Iterable[tuple[str, mx.array]]:
        return ((name, mx.array(value)) for name, value in initial_weights(self._spec, seed))

    def gradients(
        self,
        weights: Weights,
        tokens_BT: mx.array,
        labels_BT: mx.array,
        weight_BT: mx.array,
        segment_BT: mx.array | None = None,
        *,
        chunk: int,
        grad_checkpoint: bool = False,
        penalty: KLTerm | None = None,
    ) -> tuple[mx.array, Arrays]:
        return architectures.gradients(
            weights,
            self._spec,
            tokens_BT,
            labels_BT,
            weight_BT,
            segment_BT,
            chunk=chunk,
            operators=self._operators,
            grad_checkpoint=grad_checkpoint,
            penalty=penalty,
        )

    def token_nll(
        self, weights: Weights, tokens_BT: mx.array, labels_N: mx.array, segment: mx.array | None, *, chunk: int
    ) -> mx.array:
        x = architectures.hidden_states(weights, self._spec, tokens_BT, segment, operators=self._operators)
        head = weights[head_name(self._spec)]
        return cross_entropy.token_nll(x.reshape(-1, x.shape[-1]), head, labels_N, chunk=chunk, operators=self._operators)

    def logits(self, weights: Weights, tokens_BT: mx.array, segment: mx.array | None) -> mx.array:
        x = architectures.hidden_states(weights, self._spec, tokens_BT, segment, operators=self._operators)
        head = weights[head_name(self._spec)].astype(self._operators.dtype)
        return self._operators.matmul(x.astype(self._operators.dtype), head.T).astype(mx.float32)

    def measures(
        self, weights: Weights, reference: Weights, tokens_BT: mx.array, labels_N: mx.array, *, shared: int, chunk: int
    ) -> mx.array:
        pair = architectures.hidden_states_of_two(
            weights, reference, self._spec, tokens_BT, shared=shared, operators=self._operators
        )
        x, ref_x = (states.reshape(-1, states.shape[-1]) for states in pair)
        head, ref_head = (own[head_name(self._spec)] for own in (weights, reference))
        return compare.measures(x, head, ref_x, ref_head, labels_N, chunk=chunk, operators=self._operators)

    def num_shared_blocks(self, weights: Weights, reference: Weights) -> int:
        return num_shared_blocks(self._spec, weights, reference, lambda own, other: bool(mx.array_equal(own, other).item()))

    def sample(
        self,
        weights: Weights,
        prompts_BP: npt.NDArray[np.int32],
        u_BT: npt.NDArray[np.float64],
        *,
        temperature: float,
        num_ids: int | None,
    ) -> npt.NDArray[np.int32]:
        how: dict[str, Any] = {
            "temperature": temperature,
            "num_ids": num_ids,
            "operators": self._operators,
            "streams": self._streams,
        }
        return sample(weights, self._spec, prompts_BP, u_BT, **how)


def build_decoder(
    spec: ModelSpec | PretrainedSpec, operators: Operators, streams: Sequence[mx.Stream], *, reads_only: bool
) -> Decoder:
    """The model of a spec.

    Args:
        streams: the threads that share the rows of a sample.
        reads_only: weights come from elsewhere and are never trained.

    Raises:
        UserError: mlx-lm is not installed or does not know the architecture.
    """
    if isinstance(spec, ModelSpec):
        return Ladder(spec, operators, streams)
    from mlx_forget.mlx_backend.hf import Pretrained

    return Pretrained(spec, operators, reads_only=reads_only)
