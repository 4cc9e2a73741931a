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
    weights: Arrays, exp_avg: Arrays, exp_avg_sq: Arrays, step: mx.array, gradients: Arrays, learning_rate: mx.array, hyper: Arrays
) -> tuple[Arrays, Arrays, Arrays, mx.array, mx.array]:
    """One step: new weights, moments and step count, and float32[2]: gradient norm before clipping, 1 if the step was masked.

    A gradient that is not finite changes nothing, the count included.
    """
    norm = mx.sqrt(sum((g.square().sum() for g in gradients.values()), start=mx.array(0.0)))
    finite = mx.isfinite(norm)
    scale = 1 / mx.maximum(1.0, norm / hyper["max_grad_norm"])
    next_step = step + finite.astype(step.dtype)
    # The step count is at least 1 wherever the result is used.
    correction1 = -mx.expm1(next_step * hyper["log_beta1"])
    correction2 = -mx.expm1(next_step * hyper["log_beta2"])
    rate = learning_rate / correction1
    deviation_scale = mx.rsqrt(correction2)
    new_weights, new_avg, new_sq = {}, {}, {}
    for name, weight in weights.items():
        gradient = gradients[name] * scale
        avg = hyper["beta1"] * exp_avg[name] + hyper["rest1"] * gradient
        square = hyper["beta2"] * exp_avg_sq[name] + hyper["rest2"] * gradient * gradient
        kept = weight - learning_rate * hyper["weight_decay"] * weight if decays(name) else weight
        stepped = kept - rate * avg / (mx.sqrt(square) * deviation_scale + hyper["epsilon"])
        new_weights[name] = mx.where(finite, stepped, weight)
        new_avg[name] = mx.where(finite, avg, exp_avg[name])
        new_sq[name] = mx.where(finite, square, exp_avg_sq[name])
    return new_weights, new_avg, new_sq, next_step, mx.stack([norm, 1 - finite.astype(mx.float32)])
