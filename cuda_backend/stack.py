"""Several small models of one shape trained as one: batched products over a leading dimension K, and AdamW of each member.

All weights of a member lie in one row of a [K, P] array, those that decay first, and so do its moments and its gradient: an update is two
calls of the fused kernel a member, whatever the number of tensors. Members read and write their rows in place.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cuda_backend import cross_entropy
from cuda_backend.step import TorchStep
from cuda_backend.trainer import TorchTrainer
from mlx_forget.errors import OutOfMemory, UserError
from mlx_forget.ladder import ModelSpec, decays, initial_weights, param_shapes
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS
from mlx_forget.trainer import Batch, NoStep, Stack, StackedBatch, StepResult, Trainer, TrainerSpec


class TorchStack(Stack):
    """K ladder models on one device."""

    def __init__(self, spec: TrainerSpec, seeds: Sequence[int]) -> None:
        if not isinstance(spec.model, ModelSpec):
            raise UserError(f"{spec.model.architecture} does not stack: start its runs one by one.")
        self._spec = spec
        self._single = TorchTrainer(spec)
        self._passes = self._single._passes
        self._device = self._passes.device
        self._shapes = dict(sorted(param_shapes(spec.model).items(), key=lambda item: not decays(item[0])))
        sizes = {name: int(np.prod(shape)) for name, shape in self._shapes.items()}
        stops = np.cumsum(list(sizes.values())).tolist()
        self._columns = {name: slice(stop - sizes[name], stop) for name, stop in zip(sizes, stops, strict=True)}
        self._num_decayed = sum(size for name, size in sizes.items() if decays(name))
        self._members = [copy.copy(self._single) for _ in seeds]
        self.members: Sequence[Trainer] = self._members
        # The members in the rows of the arrays; those that have ended keep the arrays of their last step.
        self._rows = list(range(len(seeds)))
        self._values = torch.empty(len(seeds), stops[-1], device=self._device)
        self._exp_avg, self._exp_avg_sq = torch.zeros_like(self._values), torch.zeros_like(self._values)
        self._steps = torch.zeros(len(seeds), 2, device=self._device)
        self._give_rows()
        for member, seed in zip(self._members, seeds, strict=True):
            for name, value in initial_weights(spec.model, seed):
                member._weights[name].data.copy_(torch.from_numpy(value))

    def train_step(self, batches: Sequence[Batch], learning_rates: Sequence[float], active: Sequence[bool]) -> list[StepResult]:
        try:
            return self._step(batches, learning_rates, active)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"A step of {sum(active)} models at once is more than the device holds ({error}).") from None

    def _step(self, batches: Sequence[Batch], learning_rates: Sequence[float], active: Sequence[bool]) -> list[StepResult]:
        self._keep([k for k in self._rows if active[k]])
        whole = StackedBatch.of([batches[k] for k in self._rows], self._spec.method)
        sums = torch.zeros(len(self._rows), NUM_TERMS * NUM_SOURCES, device=self._device)
        gradient: Tensor | None = None
        for part in whole.parts(self._spec.runtime.micro_batch_size):
            nll, own = self._batch_gradient(part)
            gradient = own if gradient is None else gradient.add_(own)
            per_row = (nll * self._passes.on_device(part.loss_mask)).sum(-1, keepdim=True)
            sums += (self._passes.on_device(part.groups) * per_row).sum(1)
        assert gradient is not None
        norm, skipped = self._update(gradient, [learning_rates[k] for k in self._rows])
        packed = torch.cat([sums, norm[:, None], skipped[:, None]], dim=1)
        results: list[StepResult] = [NoStep()] * len(active)
        for row, k in enumerate(self._rows):
            results[k] = TorchStep(packed[row], whole.counts[row])
        return results

    def _batch_gradient(self, batch: StackedBatch) -> tuple[Tensor, Tensor]:
        """The nll of some rows of each member, float32[K, B, T], and the gradients of its weighted sum, float32[K, P]."""
        on_device = self._passes.on_device(batch.tokens).long()
        inputs, labels = on_device[..., :-1], on_device[..., 1:].flatten(1)
        passes = self._passes
        with passes.autocast():
            x = passes.hidden_states(
                self._weights,
                inputs,
                None if batch.segment is None else self._passes.on_device(batch.segment).flatten(0, 1),
                grad_checkpoint=self._spec.runtime.grad_checkpoint,
            )
        # As many logits at once as one model has: the chunk of a CPU stays in its cache.
        chunk = max(64, passes.chunk // len(inputs))
        objective, nll = cross_entropy.FusedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x.view(*labels.shape, -1).to(passes.dtype),
            self._weights["transformer.wte.weight"],
            labels,
            self._passes.on_device(batch.token_weight).flatten(1),
            chunk,
        )
        gradients = torch.autograd.grad(objective, list(self._weights.values()))
        return nll.view(inputs.shape), torch.cat([value.flatten(1) for value in gradients], dim=1)

    def _update(self, gradient: Tensor, learning_rates: list[float]) -> tuple[Tensor, Tensor]:
        """Clip and step each member; returns (gradient norms, 1 where the step was masked), float32[K] each, on the device."""
        optim = self._spec.optim
        norm = torch.linalg.vector_norm(gradient, dim=1)
        skipped = (~torch.isfinite(norm)).float()
        limit = optim.max_grad_norm
        scale = torch.clamp(norm / limit, min=1.0) if limit > 0 else torch.ones_like(norm)
        parts = ((0, slice(None, self._num_decayed), optim.weight_decay), (1, slice(self._num_decayed, None), 0.0))
        for row, learning_rate in enumerate(learning_rates):
            for part, columns, weight_decay in parts:
                adamw(
                    [self._values[row, columns]],
                    [gradient[row, columns]],
                    [self._exp_avg[row, columns]],
                    [self._exp_avg_sq[row, columns]],
                    [],
                    [self._steps[row, part]],
                    fused=True,
                    grad_scale=scale[row],
                    found_inf=skipped[row],
                    amsgrad=False,
                    beta1=optim.beta1,
                    beta2=optim.beta2,
                    lr=learning_rate,
                    weight_decay=weight_decay,
                    eps=optim.epsilon,
                    maximize=False,
                )
        return norm, skipped

    def _keep(self, members: list[int]) -> None:
        """Go on with these members alone: the others would cost as much as if they still learnt."""
        if members == self._rows:
            return
        rows = torch.tensor([self._rows.index(k) for k in members], device=self._device)
        self._values, self._exp_avg, self._exp_avg_sq, self._steps = (
            array[rows] for array in (self._values, self._exp_avg, self._exp_avg_sq, self._steps)
        )
        self._rows = members
        self._give_rows()

    def _give_rows(self) -> None:
        """Point the weights of the stack and the state of each member into the arrays."""
        self._weights = {name: value.requires_grad_() for name, value in self._views(self._values).items()}
        exp_avg, exp_avg_sq = self._views(self._exp_avg), self._views(self._exp_avg_sq)
        for row, k in enumerate(self._rows):
            member = self._members[k]
            member._weights = {name: value.detach()[row].requires_grad_() for name, value in self._weights.items()}
            optimizer = copy.copy(self._single._optimizer)
            optimizer.moments = {f"exp_avg.{name}": value[row] for name, value in exp_avg.items()}
            optimizer.moments |= {f"exp_avg_sq.{name}": value[row] for name, value in exp_avg_sq.items()}
            optimizer.steps = {name: self._steps[row, 0 if decays(name) else 1] for name in self._weights}
            member._optimizer = optimizer

    def _views(self, array: Tensor) -> dict[str, Tensor]:
        """The columns of each parameter, [K, *shape]."""
        return {name: torch.unflatten(array[:, columns], 1, self._shapes[name]) for name, columns in self._columns.items()}
