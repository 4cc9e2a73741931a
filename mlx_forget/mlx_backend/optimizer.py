"""AdamW and Adafactor, clipping and the mask of non-finite steps, as functions of arrays that compile.

The moments are one dict, in the names of `ladder.moment_shapes`.

Hyperparameters enter as 0-d arrays: as constants, each value would be another loop for the C++ compiler of the CPU build.
"""

import math
from collections.abc import Callable, Mapping

import mlx.core as mx

from mlx_forget.ladder import decays, is_factored, moment_shapes
from mlx_forget.trainer import OptimSpec

Arrays = dict[str, mx.array]
Update = Callable[[Arrays, Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]

# Of Adafactor (Shazeer and Stern 2018): decay 1 - t^EXPONENT, what is added to squares, and the largest root mean square of an update.
_EXPONENT, _EPSILON, _THRESHOLD = -0.8, 1e-30, 1.0


def initial_moments(optim: OptimSpec, weights: Mapping[str, mx.array]) -> Arrays:
    """The moments before the first step, float32 zeros."""
    shapes = moment_shapes(optim.name, {name: tuple(value.shape) for name, value in weights.items()})
    return {name: mx.zeros(shape) for name, shape in shapes.items()}


def update_of(optim: OptimSpec) -> Update:
    """(weights, moments, gradients, scalars of this step) -> new weights and moments; the old ones where the step is not finite."""
    return adamw if optim.name == "adamw" else adafactor


def hyperparameters(optim: OptimSpec) -> Arrays:
    """The constants of both updates, float32 scalars."""
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


def adamw(weights: Arrays, moments: Arrays, gradients: Arrays, scalars: Arrays) -> tuple[Arrays, Arrays]:
    """AdamW with bias correction and epsilon outside the square root; see `update_of`."""
    new_weights, new_avg, new_sq = {}, {}, {}
    s = scalars
    for name, weight in weights.items():
        exp_avg, exp_avg_sq = moments["exp_avg." + name], moments["exp_avg_sq." + name]
        gradient = gradients[name] * s["scale"]
        avg = s["beta1"] * exp_avg + s["rest1"] * gradient
        square = s["beta2"] * exp_avg_sq + s["rest2"] * gradient * gradient
        kept = (s["keep"] if decays(name) else s["one"]) * weight
        stepped = kept - s["rate"] * avg / (mx.sqrt(square) * s["deviation_scale"] + s["epsilon"])
        new_weights[name] = mx.where(s["finite"], stepped, weight)
        new_avg["exp_avg." + name] = mx.where(s["finite"], avg, exp_avg)
        new_sq["exp_avg_sq." + name] = mx.where(s["finite"], square, exp_avg_sq)
    return new_weights, new_avg | new_sq


def adafactor(weights: Arrays, moments: Arrays, gradients: Arrays, scalars: Arrays) -> tuple[Arrays, Arrays]:
    """Factored second moments, no first ones; see `update_of`."""
    new_weights: Arrays = {}
    new_moments: Arrays = {}
    s = scalars
    for name, weight in weights.items():
        gradient = gradients[name] * s["scale"]
        squares = gradient * gradient + _EPSILON
        if is_factored(tuple(weight.shape)):
            means = {"exp_avg_sq_row." + name: squares.mean(axis=1), "exp_avg_sq_col." + name: squares.mean(axis=0)}
        else:
            means = {"exp_avg_sq." + name: squares}
        found = [moments[key] + s["factored_rest"] * (mean - moments[key]) for key, mean in means.items()]
        if len(found) == 2:
            update = gradient * mx.rsqrt(found[0] / found[0].mean())[:, None] * mx.rsqrt(found[1])
        else:
            update = gradient * mx.rsqrt(found[0])
        update = update / mx.maximum(1.0, mx.sqrt((update * update).mean()) / _THRESHOLD)
        stepped = (s["keep"] if decays(name) else s["one"]) * weight - s["learning_rate"] * update
        new_weights[name] = mx.where(s["finite"], stepped, weight)
        new_moments |= {key: mx.where(s["finite"], new, moments[key]) for key, new in zip(means, found, strict=True)}
    return new_weights, {name: new_moments[name] for name in moments}


def step_scalars(step: mx.array, gradients: Arrays, learning_rate: mx.array, hyper: Arrays) -> tuple[Arrays, mx.array, mx.array]:
    """What an update needs of a step, the new step count, and float32[2]: gradient norm before clipping, 1 if the step is masked.

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
        "learning_rate": learning_rate,
        "factored_rest": mx.maximum(next_step, 1.0) ** _EXPONENT,
        "deviation_scale": mx.rsqrt(correction2),
        "keep": 1 - learning_rate * hyper["weight_decay"],
        "one": mx.array(1.0),
    }
    return scalars, next_step, mx.stack([norm, 1 - finite.astype(mx.float32)])
