"""Forward and backward passes of a model on one device: what a trainer does with its weights besides stepping them.

Shapes: B rows, T tokens, D width, V vocabulary, N = B * T.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cuda_backend import cross_entropy, losses
from cuda_backend.decoder import Decoder, Ladder
from cuda_backend.stored_reference import FusedStoredKL
from mlx_forget.errors import UserError
from mlx_forget.methods import TERM_REPLAY_KL
from mlx_forget.trainer import Batch, TrainerSpec

Weights = dict[str, Tensor]


class Passes:
    """The passes of one decoder.

    Args:
        compiled: what compiles a function of fixed shapes, or gives it back as it is.
    """

    def __init__(
        self,
        spec: TrainerSpec,
        decoder: Decoder,
        device: torch.device,
        compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self.decoder, self.device = decoder, device
        self.dtype = torch.bfloat16 if spec.runtime.precision == "bf16" else torch.float32
        self.chunk = cross_entropy.chunk_rows(spec.model.vocab_size, device)
        self._grad_checkpoint = spec.runtime.grad_checkpoint
        # What transformers builds branches on Python values; it is not compiled.
        self.hidden_states = compiled(decoder.hidden_states) if isinstance(decoder, Ladder) else decoder.hidden_states
        softmax = compiled(cross_entropy.softmax_gradient)
        # Eagerly, what FusedCrossEntropy does by itself makes fewer passes.
        self._softmax = None if softmax is cross_entropy.softmax_gradient else softmax

    def accumulate_gradient(
        self,
        weights: Weights,
        reference: Weights | None,
        batch: Batch,
        rows: slice,
        weight: npt.NDArray[np.float32],
        kl_weight: npt.NDArray[np.float32] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradient of the weighted token losses of some rows to those of the weights.

        Returns their nll and their KL to the reference, float32[B, T]: 0 where a row has no such term, None where no row has.
        """
        inputs, labels = self.split(batch.tokens[rows])
        segment = None if batch.segment is None else self.on_device(batch.segment[rows])
        with self.autocast():
            x = self.hidden_states(weights, inputs, segment, grad_checkpoint=self._grad_checkpoint)
        head, x = self.decoder.head(weights), x.to(self.dtype)
        nll_rows, kl_rows = self._rows_of(np.asarray(batch.term[rows] != TERM_REPLAY_KL)), None
        if kl_weight is not None and kl_weight.any():
            kl_rows = self._rows_of(np.asarray(kl_weight.any(axis=1)))
        objective, nll = losses.cross_entropy(
            x[nll_rows].flatten(0, 1),
            head,
            labels.view(inputs.shape)[nll_rows].flatten(),
            self.on_device(weight)[nll_rows].flatten(),
            self.chunk,
            self._softmax,
        )
        kl_BT = None
        if kl_rows is not None and batch.reference is not None:
            kl_objective, kl = self._stored_divergence(batch, rows.start, x[kl_rows].flatten(0, 1), head, kl_weight)
            objective = objective + kl_objective
            kl_BT = _in_rows(kl, kl_rows, inputs)
        elif kl_rows is not None:
            assert reference is not None
            assert kl_weight is not None
            with torch.no_grad(), self.autocast():
                part = None if segment is None else segment[kl_rows]
                ref_x = self.hidden_states(reference, inputs[kl_rows], part).to(self.dtype)
            kl_objective, kl = losses.kl_divergence(
                x[kl_rows].flatten(0, 1),
                head,
                ref_x.flatten(0, 1),
                self.decoder.head(reference),
                self.on_device(kl_weight)[kl_rows].flatten(),
                self.chunk,
            )
            objective = objective + kl_objective
            kl_BT = _in_rows(kl, kl_rows, inputs)
        objective.backward()  # type: ignore[no-untyped-call]
        return _in_rows(nll, nll_rows, inputs), kl_BT

    @torch.no_grad()
    def token_nll(self, weights: Weights, inputs: Tensor, labels: Tensor, segment: Tensor | None) -> Tensor:
        """Losses float32[N] of the labels of some rows."""
        return losses.token_nll(self._forward(weights, inputs, segment), self.decoder.head(weights), labels, self.chunk)

    @torch.no_grad()
    def log_probs(self, weights: Weights, inputs: Tensor, segment: Tensor | None) -> Tensor:
        """Log-probabilities float32[B, T, V] of what follows each token of some rows."""
        x, head = self._forward(weights, inputs, segment), self.decoder.head(weights)
        logits = (x if head is None else x @ head.to(x.dtype).T).float()
        logits.sub_(logits.logsumexp(1, keepdim=True))
        return logits.view(*inputs.shape, -1)

    @torch.no_grad()
    def measures(self, weights: Weights, reference: Weights, inputs: Tensor, labels: Tensor, *, shared: int, chunk: int) -> Tensor:
        """The measures of `Comparison`, float32[10, B, T]; the first `shared` blocks of both sets of weights are the same."""
        with self.autocast():
            pair = self.decoder.hidden_states_of_two(weights, reference, inputs, shared=shared)
        x, ref_x = (states.flatten(0, 1).to(self.dtype) for states in pair)
        head, ref_head = (self.decoder.head(own) for own in (weights, reference))
        return losses.measures(x, head, ref_x, ref_head, labels, chunk=chunk).view(-1, *inputs.shape)

    def on_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        """A copy on the device. From pinned memory a GPU fetches it while the host goes on; from pageable memory the host would wait."""
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def split(self, tokens: npt.NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Inputs int64[B, T] and labels int64[N] of int32[B, T + 1] tokens."""
        on_device = self.on_device(tokens).long()
        return on_device[:, :-1], on_device[:, 1:].reshape(-1)

    def autocast(self) -> torch.autocast:
        """Products in the type of the passes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _forward(self, weights: Weights, inputs: Tensor, segment: Tensor | None) -> Tensor:
        """Hidden states [N, D], always eager: evaluation shapes vary."""
        with self.autocast():
            return self.decoder.hidden_states(weights, inputs, segment).flatten(0, 1).to(self.dtype)

    def _stored_divergence(
        self, batch: Batch, first_row: int, x: Tensor, head: Tensor | None, kl_weight: npt.NDArray[np.float32] | None
    ) -> tuple[Tensor, Tensor]:
        """The weighted KL to what is kept of the reference, and the KL float32[n * T], of the hidden states of a micro-batch's KL rows."""
        assert kl_weight is not None
        chosen = np.flatnonzero(kl_weight.any(axis=1))
        stored = batch.reference_of(first_row + chosen)
        log_probs, top, tail = (
            None if part is None else torch.from_numpy(part).to(self.device).flatten(0, 1)
            for part in (stored.log_probs, stored.top, stored.tail)
        )
        weight = torch.from_numpy(kl_weight[chosen]).to(self.device).flatten()
        top = None if top is None else top.long()
        if head is None:
            raise UserError("Log-probabilities are not kept for a model that caps its logits: leave reference_log_probs live.")
        result: tuple[Tensor, Tensor] = FusedStoredKL.apply(x, head, log_probs, top, tail, weight, self.chunk)  # type: ignore[no-untyped-call]
        return result

    def _rows_of(self, chosen: npt.NDArray[np.bool_]) -> slice | Tensor:
        """The chosen rows as an index; a slice, which copies nothing, where it is all of them."""
        return slice(None) if chosen.all() else self.on_device(np.flatnonzero(chosen))


def _in_rows(values: Tensor, rows: slice | Tensor, inputs: Tensor) -> Tensor:
    """Values [n * T] of some rows as float32[B, T], 0 in the others."""
    if isinstance(rows, slice):
        return values.view(inputs.shape)
    out = torch.zeros(inputs.shape, device=inputs.device)
    out[rows] = values.view(-1, inputs.shape[1])
    return out
