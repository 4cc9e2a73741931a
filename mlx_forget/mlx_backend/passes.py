"""Forward and backward passes of a model: what a trainer does with its weights besides stepping them.

On a CPU the rows of a batch are shared among threads, each an MLX stream.

Shapes: B rows, T tokens, N = B * T.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_forget.adapters import trained_names
from mlx_forget.comparison import MEASURES
from mlx_forget.ladder import outputs_first
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS, TERM_REPLAY_KL
from mlx_forget.mlx_backend import cross_entropy, lora
from mlx_forget.mlx_backend.decoder import Decoder
from mlx_forget.mlx_backend.losses import KLTerm
from mlx_forget.trainer import Batch, TrainerSpec

# A thread that gets fewer logits at a time would multiply by a few rows.
_LEAST_LOGITS = 64
# The key of the loss sums beside the gradients: both are added up over micro-batches and ranks.
SUMS = "loss_sums"

Arrays = dict[str, mx.array]


class Passes:
    """The passes of one decoder.

    Args:
        streams: the threads that share rows.
        compiled: compile a pass as a whole.
    """

    def __init__(self, spec: TrainerSpec, decoder: Decoder, streams: Sequence[mx.Stream], *, on_cpu: bool, compiled: bool) -> None:
        self.spec, self.decoder, self._streams = spec, decoder, streams
        self.chunk = cross_entropy.chunk_rows(spec.model.vocab_size, on_cpu=on_cpu)
        self._outputs_first = outputs_first(spec.model)
        self.num_traces = 0
        self.gradient = self.traced(self._batch_gradient, compiled=compiled)
        self.nll = self.traced(self._batch_nll, compiled=compiled)

    def traced(self, function: Callable[..., Any], *, compiled: bool) -> Callable[..., Any]:
        """The function, compiled where that is wanted; each time it is traced is counted."""
        if not compiled:
            return function

        def traced(*args: Any) -> Any:
            self.num_traces += 1
            return function(*args)

        result: Callable[..., Any] = mx.compile(traced)
        return result

    def kl_terms(
        self, batch: Batch, part: slice, kl_weight: npt.NDArray[np.float32] | None, frozen: Arrays | None
    ) -> list[KLTerm] | None:
        """What each thread's share of some rows needs for their KL term to the frozen weights, or to what a batch keeps of them;
        None where no row has one."""
        term, source = batch.term[part], batch.source[part]
        if kl_weight is None and not (term == TERM_REPLAY_KL).any():
            return None
        weight = np.zeros((len(term), 0), np.float32) if kl_weight is None else kl_weight
        terms: list[KLTerm] = []
        for rows in _shares(len(term), len(self._streams)):
            kl_rows = np.flatnonzero(weight[rows].any(axis=1))
            groups = TERM_REPLAY_KL * NUM_SOURCES + source[rows][kl_rows].astype(np.int64)
            if batch.reference is None:
                reference: dict[str, Any] = {"reference": frozen}
            else:
                kept = batch.reference_of(part.start + rows.start + kl_rows)
                arrays = {"log_probs": kept.log_probs, "top": kept.top, "tail": kept.tail}
                reference = {"stored": {name: mx.array(value) for name, value in arrays.items() if value is not None}}
            terms.append(
                {
                    "nll_rows": mx.array(np.flatnonzero(term[rows] != TERM_REPLAY_KL).astype(np.int32)),
                    "kl_rows": mx.array(kl_rows.astype(np.int32)),
                    "kl_groups": mx.array(np.eye(NUM_TERMS * NUM_SOURCES, dtype=np.float32)[groups]),
                    "kl_weight": mx.array(weight[rows][kl_rows]),
                    **reference,
                }
            )
        return terms

    def measures(self, weights: Arrays, reference: Arrays, tokens: mx.array, *, shared: int, chunk: int) -> mx.array:
        """The measures of `Comparison`, float32[10, B, T], of int32[B, T+1]; each thread takes its share of the rows."""
        parts = []
        streams = self._streams[: max(1, chunk // _LEAST_LOGITS)]
        for stream, rows in zip(streams, _shares(len(tokens), len(streams)), strict=False):
            with mx.stream(stream):
                found = self.decoder.measures(
                    weights,
                    reference,
                    tokens[rows, :-1],
                    tokens[rows, 1:].reshape(-1),
                    shared=shared,
                    chunk=max(1, chunk // len(streams)),
                )
                parts.append(found.reshape(len(MEASURES), -1, tokens.shape[1] - 1))
        return mx.concatenate(parts, axis=1)

    def _batch_gradient(
        self,
        weights: Arrays,
        tokens: mx.array,
        token_weight: mx.array,
        mask: mx.array,
        groups: mx.array,
        segment: mx.array | None,
        kl_terms: list[KLTerm] | None = None,
        dropout_keys: mx.array | None = None,
    ) -> Arrays:
        """Gradients of the weighted token losses of some rows, and their loss sums; each thread takes its share of the rows.

        Everything may have the leading dimension of a stack; the threads share the rows of every member.
        """
        parts: list[Arrays] = []
        # Of a stack, as many logits at once as one model has: the chunk of a CPU stays in its cache.
        chunk = self.chunk if tokens.ndim == 2 else max(64, self.chunk // len(tokens))
        adapter, shares = self.spec.adapter, _shares(tokens.shape[-2], len(self._streams))
        own, weights = weights, lora.folded(weights, adapter, outputs_first=self._outputs_first)
        for number, rows in enumerate(shares):
            kl_term = None if kl_terms is None else kl_terms[number]
            with mx.stream(self._streams[number]):
                losses, gradients = self.decoder.gradients(
                    weights if adapter is None or dropout_keys is None else lora.with_keys(weights, adapter, dropout_keys[:, rows]),
                    tokens[..., rows, :-1],
                    tokens[..., rows, 1:],
                    token_weight[..., rows, :],
                    None if segment is None else segment[..., rows, :],
                    chunk=chunk,
                    grad_checkpoint=self.spec.runtime.grad_checkpoint,
                    penalty=kl_term,
                )
                row_mask, row_groups = mask[..., rows, :], groups[..., rows, :]
                if kl_term is not None:
                    both = mx.concatenate([kl_term["nll_rows"], kl_term["kl_rows"]])
                    row_mask = row_mask[both]
                    row_groups = mx.concatenate([row_groups[kl_term["nll_rows"]], kl_term["kl_groups"]])
                per_row = (losses * row_mask).sum(axis=-1, keepdims=True)
                parts.append({**gradients, SUMS: (row_groups * per_row).sum(axis=-2)})
        total = parts[0]
        for part in parts[1:]:
            total = {name: value + part[name] for name, value in total.items()}
        sums = total.pop(SUMS)
        found = lora.parameter_gradients(total, own, weights, adapter, outputs_first=self._outputs_first)
        # What is not trained is never computed: arrays are lazy.
        return {**{name: found[name] for name in trained_names(own, adapter, self.spec.num_layers)}, SUMS: sums}

    def _batch_nll(self, weights: Arrays, tokens: mx.array, segment: mx.array | None) -> mx.array:
        """Next-token losses float32[B, T] of int32[B, T+1]."""
        parts = []
        weights = lora.folded(weights, self.spec.adapter, outputs_first=self._outputs_first)
        for stream, rows in zip(self._streams, _shares(len(tokens), len(self._streams)), strict=False):
            with mx.stream(stream):
                own = None if segment is None else segment[rows]
                labels = tokens[rows, 1:].reshape(-1)
                parts.append(self.decoder.token_nll(weights, tokens[rows, :-1], labels, own, chunk=self.chunk))
        return mx.concatenate(parts).reshape(len(tokens), -1)


def _shares(num_rows: int, num_shares: int) -> list[slice]:
    """Contiguous shares of the rows, as even as can be; never an empty one."""
    bounds = np.linspace(0, num_rows, min(num_shares, num_rows) + 1).round().astype(int).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
