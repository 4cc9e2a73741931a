"""AdamW with bias correction, clipping and the mask of non-finite steps, as one function of arrays that compiles.

Hyperparameters enter as 0-d arrays: as constants, each value would be another loop for the C++ compiler of the CPU build.
"""

import math

import mlx.core as mx

from mlx_forget.ladder import decays
from mlx_forget.trainer import OptimSpec

Arrays = dict[str, mx.array]


def hyperparameters(optim: OptimSpec) -> Arrays:
    """The constants of `update`, float32 scalars."""
    values = {
        "beta1": optim.beta1,
        "beta2": optim.beta2,
        "rest1": 1 - optim.beta1,
        "rest2": 1 - optim.beta2,
        # log(0) stands for a decay so fast that every correction is 1.
        "log_beta1": math.log(optim.beta1) if optim.beta1 else -1e9,
        "log_beta2": math.log(optim.beta2) if optim.beta2 else -1e9,
        "epsilon": optim.epsilon,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm or math.inf,
    }
    return {name: mx.array(value, dtype=mx.float32) for name, value in values.items()}


def update(
    weights: Arrays, exp_avg: Arrays, exp_avg_sq: Arrays, gradients: Arrays, scalars: Arrays
) -> tuple[Arrays, Arrays, Arrays]:
    """New weights and moments, given `scalars` of this step; where they say that it is not finite, the old ones."""
    new_weights, new_avg, new_sq = {}, {}, {}
    s = scalars
    for name, weight in weights.items():
        gradient = gradients[name] * s["scale"]
        avg = s["beta1"] * exp_avg[name] + s["rest1"] * gradient
        square = s["beta2"] * exp_avg_sq[name] + s["rest2"] * gradient * gradient
        kept = (s["keep"] if decays(name) else s["one"]) * weight
        stepped = kept - s["rate"] * avg / (mx.sqrt(square) * s["deviation_scale"] + s["epsilon"])
        new_weights[name] = mx.where(s["finite"], stepped, weight)
        new_avg[name] = mx.where(s["finite"], avg, exp_avg[name])
        new_sq[name] = mx.where(s["finite"], square, exp_avg_sq[name])
    return new_weights, new_avg, new_sq


def step_scalars(step: mx.array, gradients: Arrays, learning_rate: mx.array, hyper: Arrays) -> tuple[Arrays, mx.array, mx.array]:
    """What `update` needs of a step, the new step count, and float32[2]: gradient norm before clipping, 1 if the step is masked.

    A gradient that is not finite changes nothing, the count included.
    """
    norm = mx.sqrt(mx.stack([g.square().sum() for g in gradients.values()]).sum())
    finite = mx.isfinite(norm)
    next_step = step + finite.astype(step.dtype)
    # The step count is at least 1 wherever the result is used.
    correction1 = -mx.expm1(next_step * hyper["log_beta1"])
    correction2 = -mx.expm1(next_step * hyper["log_beta2"])
    scalars = {
        **hyper,
        "finite": finite,
        "scale": 1 / mx.maximum(1.0, norm / hyper["max_grad_norm"]),
        "rate": learning_rate / correction1,
        "deviation_scale": mx.rsqrt(correction2),
        "keep": 1 - learning_rate * hyper["weight_decay"],
        "one": mx.array(1.0),
    }
    return scalars, next_step, mx.stack([norm, 1 - finite.astype(mx.float32)])
