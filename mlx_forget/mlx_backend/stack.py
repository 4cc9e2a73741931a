"""Several small models of one shape trained as one: forward and backward passes are batched over a leading dimension K.

Every member keeps weights and moments of its own. They are laid side by side for a pass, which costs one copy, and AdamW steps each
member with the loops that a single model has.
"""

import copy
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_forget.ladder import initial_weights
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS
from mlx_forget.mlx_backend import adamw
from mlx_forget.mlx_backend.trainer import SUMS, Arrays, MLXStep, MLXTrainer
from mlx_forget.trainer import Batch, Stack, StepResult, Trainer, TrainerSpec, group_counts, token_weights


class MLXStack(Stack):
    """K ladder models on one device."""

    def __init__(self, spec: TrainerSpec, seeds: Sequence[int]) -> None:
        self._spec = spec
        self._single = MLXTrainer(spec)
        self._members = [copy.copy(self._single) for _ in seeds]
        self.members: Sequence[Trainer] = self._members
        for member, seed in zip(self._members, seeds, strict=True):
            member._weights = {name: mx.array(value) for name, value in initial_weights(spec.model, seed)}
        self._chunk = self._single._chunk

    def train_step(self, batches: Sequence[Batch], learning_rates: Sequence[float], active: Sequence[bool]) -> list[StepResult]:
        rows = [k for k, on in enumerate(active) if on]
        mine, members = [batches[k] for k in rows], [self._members[k] for k in rows]
        counts = [group_counts(batch) for batch in mine]
        single = self._single
        # As many logits at once as one model has: the chunk of a CPU stays in its cache.
        single._chunk = max(64, self._chunk // len(rows))
        gradients = self._gradients(
            {name: mx.stack([m._weights[name] for m in members]) for name in members[0]._weights}, mine, counts
        )
        results: list[StepResult] = [MLXStep(mx.array(float("nan")), np.zeros(counts[0].shape))] * len(active)
        pending: list[mx.array | Arrays] = []
        for row, (k, member) in enumerate(zip(rows, members, strict=True)):
            own = {name: value[row] for name, value in gradients.items()}
            sums = own.pop(SUMS)
            rate = mx.array(learning_rates[k], dtype=mx.float32)
            scalars, member._step, outcome = adamw.step_scalars(member._step, own, rate, single._hyper)
            state = single._update(member._weights, member._exp_avg, member._exp_avg_sq, own, scalars)
            member._weights, member._exp_avg, member._exp_avg_sq = state
            packed = mx.concatenate([sums, outcome])
            pending.extend([*state, member._step, packed])
            results[k] = MLXStep(packed, counts[row])
        # One step runs while the host prepares the next; more would only hold memory.
        mx.eval(single._in_flight)
        mx.async_eval(pending)  # type: ignore[no-untyped-call]
        single._in_flight = packed
        single._check_memory()
        return results

    def _gradients(self, weights: Arrays, batches: list[Batch], counts: list[npt.NDArray[np.float64]]) -> Arrays:
        """Gradients of each member's batch, [K, ...], and its loss sums."""
        token_weight = np.stack([token_weights(batch, n, self._spec.method) for batch, n in zip(batches, counts, strict=True)])
        tokens = np.stack([batch.tokens for batch in batches])
        mask = np.stack([batch.loss_mask for batch in batches])
        segment = None if batches[0].segment is None else np.stack([batch.segment for batch in batches])  # type: ignore[misc]
        group = np.stack([batch.term.astype(np.int64) * NUM_SOURCES + batch.source for batch in batches])
        groups = np.eye(NUM_TERMS * NUM_SOURCES, dtype=np.float32)[group]
        size = self._spec.runtime.micro_batch_size or tokens.shape[1]
        total: Arrays | None = None
        for start in range(0, tokens.shape[1], size):
            rows = slice(start, start + size)
            part = self._single._gradient(
                weights,
                mx.array(tokens[:, rows]),
                mx.array(token_weight[:, rows]),
                mx.array(mask[:, rows]),
                mx.array(groups[:, rows]),
                None if segment is None else mx.array(segment[:, rows]),
            )
            total = part if total is None else {name: value + part[name] for name, value in total.items()}
            if size < tokens.shape[1]:
                mx.eval(total)
        assert total is not None
        return total
