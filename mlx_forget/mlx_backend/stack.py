"""Several small models of one shape trained as one: forward and backward passes are batched over a leading dimension K.

Every member keeps weights and moments of its own. They are laid side by side for a pass, which costs one copy, and AdamW steps each
member with the loops that a single model has.
"""

import copy
from collections.abc import Sequence

import mlx.core as mx

from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec, initial_weights
from mlx_forget.mlx_backend import devices, optimizer
from mlx_forget.mlx_backend.passes import SUMS, Arrays
from mlx_forget.mlx_backend.step import MLXStep
from mlx_forget.mlx_backend.trainer import MLXTrainer
from mlx_forget.mlx_backend.warmup import compiler_errors
from mlx_forget.trainer import Batch, NoStep, Stack, StackedBatch, StepResult, Trainer, TrainerSpec


class MLXStack(Stack):
    """K ladder models on one device."""

    def __init__(self, spec: TrainerSpec, seeds: Sequence[int]) -> None:
        if not isinstance(spec.model, ModelSpec):
            raise UserError(f"{spec.model.architecture} does not stack: start its runs one by one.")
        self._spec = spec
        self._single = MLXTrainer(spec)
        self._members = [copy.copy(self._single) for _ in seeds]
        self.members: Sequence[Trainer] = self._members
        for member, seed in zip(self._members, seeds, strict=True):
            member._weights = {name: mx.array(value) for name, value in initial_weights(spec.model, seed)}

    @compiler_errors()
    def train_step(self, batches: Sequence[Batch], learning_rates: Sequence[float], active: Sequence[bool]) -> list[StepResult]:
        rows = [k for k, on in enumerate(active) if on]
        members = [self._members[k] for k in rows]
        batch = StackedBatch.of([batches[k] for k in rows], self._spec.method)
        single = self._single
        gradients = self._gradients({name: mx.stack([m._weights[name] for m in members]) for name in members[0]._weights}, batch)
        results: list[StepResult] = [NoStep()] * len(active)
        pending: list[mx.array | Arrays] = []
        for row, (k, member) in enumerate(zip(rows, members, strict=True)):
            own = {name: value[row] for name, value in gradients.items()}
            sums = own.pop(SUMS)
            rate = mx.array(learning_rates[k], dtype=mx.float32)
            scalars, member._step, outcome = optimizer.step_scalars(member._step, own, rate, single._hyper)
            state = single._update(member._weights, member._moments, own, scalars)
            member._weights, member._moments = state
            packed = mx.concatenate([sums, outcome])
            pending.extend([*state, member._step, packed])
            results[k] = MLXStep(packed, batch.counts[row])
        # One step runs while the host prepares the next; more would only hold memory.
        mx.eval(single._in_flight)
        mx.async_eval(pending)  # type: ignore[no-untyped-call]
        single._in_flight = packed
        devices.check_memory(self._spec.runtime.memory_limit_gb, packed)
        return results

    def _gradients(self, weights: Arrays, batch: StackedBatch) -> Arrays:
        """Gradients of each member's batch, [K, ...], and its loss sums."""
        micro, total = self._spec.runtime.micro_batch_size, None
        for part in batch.parts(micro):
            found: Arrays = self._single._passes.gradient(
                weights,
                mx.array(part.tokens),
                mx.array(part.token_weight),
                mx.array(part.loss_mask),
                mx.array(part.groups),
                None if part.segment is None else mx.array(part.segment),
            )
            total = found if total is None else {name: value + found[name] for name, value in total.items()}
            if micro is not None:
                mx.eval(total)
        assert total is not None
        return total
