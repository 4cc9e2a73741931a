"""Kalajdzievski's laws of finetuning loss and forgetting in trainable parameters and update steps.

The published form, c [(a/P)^alpha + (b/steps)^beta]^rho + s, has an exactly flat direction: c joins a and b. The canonical scale
here is c = 1; `canonical_scale` converts published coefficients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mlx_forget.laws.forms import Array, Evaluate, Features, Law, Parameter, Partial, Starts, register

SOURCE = "Kalajdzievski 2024, arXiv 2401.05605"


def _line(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    slope, offset = theta
    return offset - slope * f["L_ft"], (-f["L_ft"], 1.0)


register(
    Law(
        name="kalajdzievski-linear",
        formula="loss = s - c L_ft",
        latex=r"L_f = s - c L_{ft}",
        source=f"{SOURCE}, Eq. 4",
        columns=("L_ft",),
        parameters=(
            Parameter("c", "forgetting per nat of finetuning loss", linear=True),
            Parameter("s", "forgetting at zero finetuning loss", "nats", linear=True),
        ),
        evaluate=_line,
        response="forgetting",
    )
)


def canonical_scale(*, a: float, b: float, c: float, alpha: float, beta: float, rho: float) -> tuple[float, float]:
    """The (a, b) that give the same law at c = 1."""
    return a * c ** (1 / (alpha * rho)), b * c ** (1 / (beta * rho))


def _bracket(f: Features, theta: Sequence[Array]) -> tuple[Array, list[Array]]:
    log_a, log_b, alpha, beta, log_rho = theta[:5]
    rho = np.exp(log_rho)
    params, steps = np.exp(log_a - alpha * f["P"]), np.exp(log_b - beta * f["steps"])
    total = params + steps
    term = total**rho
    slope = rho * term / total
    partials = [
        slope * params,
        slope * steps,
        -f["P"] * slope * params,
        -f["steps"] * slope * steps,
        rho * term * np.log(total),
    ]
    return term, partials


def _finetuning(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    term, partials = _bracket(f, theta)
    return term + theta[5], [*partials, 1.0]


def _forgetting(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    term, partials = _bracket(f, theta)
    return theta[5] - term, [*(-partial for partial in partials), 1.0]


def _to_natural(theta: Array, references: Mapping[str, float]) -> Array:
    # The internal amplitude is the logarithm of the term at the reference, alpha log(a / P_ref): linear in what the data see.
    values = np.array(theta)
    with np.errstate(over="ignore"):
        values[..., 0] = np.exp(theta[..., 0] / theta[..., 2]) * references["P"]
        values[..., 1] = np.exp(theta[..., 1] / theta[..., 3]) * references["steps"]
        values[..., 4] = np.exp(theta[..., 4])
    return values


def _to_internal(values: Array, references: Mapping[str, float]) -> Array:
    theta = np.array(values)
    theta[..., 0] = values[..., 2] * np.log(values[..., 0] / references["P"])
    theta[..., 1] = values[..., 3] * np.log(values[..., 1] / references["steps"])
    theta[..., 4] = np.log(values[..., 4])
    return theta


def _plainly(evaluate: Evaluate) -> Evaluate:
    """The law in log a and log b instead of the terms' sizes, where a and b can be held."""

    def plain(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
        log_a, log_b, alpha, beta = theta[0] - f["ref:P"], theta[1] - f["ref:steps"], theta[2], theta[3]
        value, (by_a, by_b, by_alpha, by_beta, *rest) = evaluate(f, [alpha * log_a, beta * log_b, *theta[2:]])
        return value, [alpha * by_a, beta * by_b, by_alpha + log_a * by_a, by_beta + log_b * by_b, *rest]

    return plain


def _plain_starts(starts: Starts) -> Starts:
    def plain(f: Features, response: Array, weights: Array) -> Array:
        made = np.array(starts(f, response, weights))
        made[:, 0] = made[:, 0] / made[:, 2] + f["ref:P"][0, 0]
        made[:, 1] = made[:, 1] / made[:, 3] + f["ref:steps"][0, 0]
        return made

    return plain


def _starts(sign: float) -> Starts:
    def starts(f: Features, response: Array, weights: Array) -> Array:
        """For each shape (alpha, beta, rho, ratio of the terms), scale and offset by weighted least squares."""
        exponents, powers, ratios = (0.03, 0.1, 0.3, 0.8), (1.0, 3.0, 8.0), (-2.0, 0.0, 2.0)
        grid = np.array(np.meshgrid(exponents, exponents, powers, ratios)).reshape(4, -1).T
        alpha, beta, rho, ratio = (grid[:, j, None] for j in range(4))
        basis = (np.exp(ratio / 2 - alpha * f["P"]) + np.exp(-ratio / 2 - beta * f["steps"])) ** rho
        mass = weights / weights.sum()
        mean, centre = basis @ mass, float(response @ mass)
        spread = ((basis - mean[:, None]) ** 2) @ mass
        scale = ((basis - mean[:, None]) * (response - centre)) @ mass / np.maximum(spread, 1e-300)
        scale = np.maximum(sign * scale, 1e-3 * np.abs(response).mean() / np.maximum(mean, 1e-300))
        offset = centre - sign * scale * mean
        shift = np.log(scale)[:, None] / rho
        return np.concatenate([shift + ratio / 2, shift - ratio / 2, alpha, beta, np.log(rho), offset[:, None]], axis=1)

    return starts


PARAMETERS = (
    Parameter("a", "scale of the trainable-parameter term", "parameters", log=True, low=0.0, high=np.inf),
    Parameter("b", "scale of the step term", "steps", log=True, low=0.0, high=np.inf),
    Parameter("alpha", "exponent of trainable parameters", low=1e-4, high=10.0),
    Parameter("beta", "exponent of update steps", low=1e-4, high=10.0),
    Parameter("rho", "power of the bracket", log=True, low=0.05, high=50.0),
    Parameter("s", "loss that neither removes", "nats", linear=True),
)

for _name, _text, _latex, _equation, _evaluate, _sign, _response in (
    (
        "kalajdzievski-finetuning",
        "loss = ((a / P)^alpha + (b / steps)^beta)^rho + s",
        "L_{ft} = [{}]^{\\rho} + s",
        5,
        _finetuning,
        1.0,
        "target",
    ),
    (
        "kalajdzievski-forgetting",
        "loss = s - ((a / P)^alpha + (b / steps)^beta)^rho",
        "L_f = s - [{}]^{\\rho}",
        6,
        _forgetting,
        -1.0,
        "forgetting",
    ),
):
    _law = Law(
        name=_name,
        formula=_text,
        latex=_latex.replace("{}", r"(a/P)^{\alpha} + (b/n)^{\beta}"),
        source=f"{SOURCE}, Eq. {_equation}, at the canonical scale c = 1",
        columns=("P", "steps"),
        parameters=PARAMETERS,
        evaluate=_evaluate,
        logs=("P", "steps"),
        to_natural=_to_natural,
        to_internal=_to_internal,
        starts=_starts(_sign),
        mixed=("a", "b"),
        response=_response,
    )
    _held = replace(
        _law, evaluate=_plainly(_evaluate), starts=_plain_starts(_starts(_sign)), to_natural=None, to_internal=None, mixed=()
    )
    register(replace(_law, plain=_held))
