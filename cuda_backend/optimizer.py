"""AdamW and Adafactor on dicts of tensors, in place; clipping and the mask of non-finite steps are scalars on the device."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mlx_forget.ladder import decays, is_factored, moment_shapes
from mlx_forget.trainer import OptimSpec

Tensors = Mapping[str, Tensor]

# Of Adafactor (Shazeer and Stern 2018): decay 1 - t^EXPONENT, what is added to squares, and the largest root mean square of an update.
_EXPONENT, _EPSILON, _THRESHOLD = -0.8, 1e-30, 1.0


class Optimizer(ABC):
    """The moments of a model's weights and how a step is made of them.

    Args:
        moments: `MOMENT.PARAMETER` -> float32 tensor, in the names of `ladder.moment_shapes`.
        steps: updates so far of each parameter, float32 scalars.
    """

    def __init__(self, spec: OptimSpec, weights: Tensors) -> None:
        self.spec = spec
        shapes = moment_shapes(spec.name, {name: tuple(value.shape) for name, value in weights.items()})
        device = next((value.device for value in weights.values()), None)
        self.moments = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self.steps = {name: torch.zeros((), device=device) for name in weights}

    @abstractmethod
    def step(self, weights: Tensors, gradients: Tensors, learning_rate: float, scale: Tensor, skipped: Tensor) -> None:
        """Update weights and moments in place; `scale` divides the gradients, and nothing changes where `skipped` is 1."""

    def state(self) -> dict[str, Tensor]:
        """Moments and step count, as a checkpoint has them."""
        return self.moments | {"step": next(iter(self.steps.values())).reshape(1)}

    def num_steps(self) -> int:
        """Updates so far."""
        return int(next(iter(self.steps.values())).item())

    def load(self, state: Tensors) -> bool:
        """Go on from a state; False, and nothing is changed, where it is that of other weights or another optimiser."""
        shapes = {name: value.shape for name, value in self.moments.items()}
        if {name: value.shape for name, value in state.items() if name != "step"} != shapes or "step" not in state:
            return False
        for name, value in self.moments.items():
            value.copy_(state[name])
        for count in self.steps.values():
            count.copy_(state["step"][0])
        return True


@final
class AdamW(Optimizer):
    """The fused kernel, which divides by the clipping scale and masks a step by itself: neither costs a pass."""

    def __init__(self, spec: OptimSpec, weights: Tensors) -> None:
        super().__init__(spec, weights)
        self._groups = (
            ([name for name in weights if decays(name)], spec.weight_decay),
            ([name for name in weights if not decays(name)], 0.0),
        )

    def step(self, weights: Tensors, gradients: Tensors, learning_rate: float, scale: Tensor, skipped: Tensor) -> None:
        for names, weight_decay in self._groups:
            if not names:
                continue
            adamw(
                [weights[name].detach() for name in names],
                [gradients[name] for name in names],
                [self.moments["exp_avg." + name] for name in names],
                [self.moments["exp_avg_sq." + name] for name in names],
                [],
                [self.steps[name] for name in names],
                fused=True,
                grad_scale=scale,
                found_inf=skipped,
                amsgrad=False,
                beta1=self.spec.beta1,
                beta2=self.spec.beta2,
                lr=learning_rate,
                weight_decay=weight_decay,
                eps=self.spec.epsilon,
                maximize=False,
            )


@final
class Adafactor(Optimizer):
    """Factored second moments, no first ones: the state of a matrix is a row and a column."""

    @torch.no_grad()
    def step(self, weights: Tensors, gradients: Tensors, learning_rate: float, scale: Tensor, skipped: Tensor) -> None:
        taken = skipped == 0
        # Weights share their number of steps: one count, one decay.
        count = next(iter(self.steps.values())) + taken
        decay = 1 - count.clamp(min=1) ** _EXPONENT
        for name, weight in weights.items():
            gradient = gradients[name] / scale
            squares = gradient.square() + _EPSILON
            if is_factored(tuple(weight.shape)):
                row, column = self.moments["exp_avg_sq_row." + name], self.moments["exp_avg_sq_col." + name]
                new_row = row.lerp(squares.mean(1), 1 - decay)
                new_column = column.lerp(squares.mean(0), 1 - decay)
                update = gradient * (new_row / new_row.mean()).rsqrt()[:, None] * new_column.rsqrt()
                _keep_where(taken, ((row, new_row), (column, new_column)))
            else:
                square = self.moments["exp_avg_sq." + name]
                new_square = square.lerp(squares, 1 - decay)
                update = gradient * new_square.rsqrt()
                _keep_where(taken, ((square, new_square),))
            update = update / (update.square().mean().sqrt() / _THRESHOLD).clamp(min=1)
            value = weight.detach()
            kept = value * (1 - learning_rate * self.spec.weight_decay) if decays(name) else value
            _keep_where(taken, ((value, kept - learning_rate * update),))
        for own in self.steps.values():
            own.copy_(own + taken)


def _keep_where(taken: Tensor, pairs: tuple[tuple[Tensor, Tensor], ...]) -> None:
    """Put new values into old ones where the step is taken."""
    for old, new in pairs:
        old.copy_(torch.where(taken, new, old))


def make_optimizer(spec: OptimSpec, weights: Tensors) -> Optimizer:
    return AdamW(spec, weights) if spec.name == "adamw" else Adafactor(spec, weights)
