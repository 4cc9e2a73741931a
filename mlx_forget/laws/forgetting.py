"""Bethune's law of forgetting, the rivals that it is compared with, and its form for someone with one model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mlx_forget.laws.forms import Alternative, Array, Features, Law, Parameter, Partial, Rescale, register
from mlx_forget.laws.parameters import REPLAY, SOURCE_BETHUNE, amplitude, exponent


def _forgetting(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, alpha, beta, b = theta[:4]
    capacity = np.log1p(np.exp(b) * f["p"])
    log_size = f["N"] + capacity
    term = np.exp(a + beta * f["D"] - alpha * log_size)
    partials: list[Partial] = [term, -log_size * term, f["D"] * term, alpha * term * np.expm1(-capacity)]
    value = f["L0"] + term
    if len(theta) == 5:
        value = value + theta[4]
        partials.append(1.0)
    return value, partials


FORGETTING_PARAMETERS = (
    amplitude("A", "size of the forgetting term", "nats x parameters^alpha / tokens^beta"),
    exponent("alpha", "how fast forgetting falls with capacity, replay's share of it included"),
    exponent("beta", "how fast forgetting grows with finetuning tokens"),
    REPLAY,
)
FORGETTING_RESCALES = (Rescale("A", "N", "alpha", 1.0), Rescale("A", "D", "beta", -1.0))
FORGETTING_RIVALS = (
    Alternative(
        "no p",
        "bethune-forgetting/no-p",
        inside=("p on N", "p on D", "p added to N", "p saturates", "with E"),
    ),
    Alternative("p on N", "bethune-forgetting", inside=("p saturates", "with E")),
    Alternative("p on D", "bethune-forgetting/on-d"),
    Alternative("p added to N", "bethune-forgetting/additive"),
    Alternative("p saturates", "bethune-forgetting/saturating"),
    Alternative("with E", "bethune-forgetting-e"),
    Alternative(
        "tied exponents",
        "bethune-forgetting",
        tied={"beta": "alpha"},
        inside=("p on N", "p on D", "p saturates", "with E"),
    ),
    Alternative("log limit", "bethune-forgetting/log-limit", inside=("with E",)),
)

register(
    Law(
        name="bethune-forgetting",
        formula="loss = L0 + A D^beta / ((1 + B p) N)^alpha",
        latex=r"L_{pt} = L^0_{pt} + A \frac{D^{\beta}}{((1 + B p) N)^{\alpha}}",
        source=f"{SOURCE_BETHUNE}, Eq. 7",
        columns=("N", "D", "p", "L0"),
        parameters=FORGETTING_PARAMETERS,
        evaluate=_forgetting,
        logs=("N", "D"),
        rescales=FORGETTING_RESCALES,
        alternatives=FORGETTING_RIVALS,
        response="pretraining",
    )
)
register(
    Law(
        name="bethune-forgetting-e",
        formula="loss = L0 + A D^beta / ((1 + B p) N)^alpha + E",
        latex=r"L_{pt} = L^0_{pt} + A \frac{D^{\beta}}{((1 + B p) N)^{\alpha}} + E",
        source=f"{SOURCE_BETHUNE}, Eq. 7 with the constant of Eq. 6 (whether the paper has it is open)",
        columns=("N", "D", "p", "L0"),
        parameters=(
            *FORGETTING_PARAMETERS,
            Parameter("E", "forgetting that neither size nor replay removes; may be negative", "nats", linear=True),
        ),
        evaluate=_forgetting,
        logs=("N", "D"),
        rescales=FORGETTING_RESCALES,
        alternatives=FORGETTING_RIVALS,
        response="pretraining",
    )
)


def _no_replay(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, alpha, beta = theta
    term = np.exp(a + beta * f["D"] - alpha * f["N"])
    return f["L0"] + term, (term, -f["N"] * term, f["D"] * term)


def _replay_on_data(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, alpha, beta, b = theta
    capacity = np.log1p(np.exp(b) * f["p"])
    log_data = f["D"] - capacity
    term = np.exp(a + beta * log_data - alpha * f["N"])
    return f["L0"] + term, (term, -f["N"] * term, log_data * term, beta * term * np.expm1(-capacity))


def _replay_added(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, alpha, beta, b = theta
    size, added = np.exp(f["N"]), np.exp(b) * f["p"]
    log_size = np.log(size + added)
    term = np.exp(a + beta * f["D"] - alpha * log_size)
    return f["L0"] + term, (term, -log_size * term, f["D"] * term, -alpha * term * added / (size + added))


def _replay_saturates(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, alpha, beta, b, share = theta
    capacity = np.log1p(np.exp(b) * f["p"])
    whole = np.exp(a + beta * f["D"] - alpha * f["N"])
    left = np.exp(-alpha * capacity)
    term = whole * (share + (1 - share) * left)
    by_alpha = -f["N"] * term - capacity * whole * (1 - share) * left
    by_b = alpha * whole * (1 - share) * left * np.expm1(-capacity)
    return f["L0"] + term, (term, by_alpha, f["D"] * term, by_b, whole * (1 - left))


def _own_exponent(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, alpha, beta, b, gamma = theta
    capacity = np.log1p(np.exp(b) * f["p"])
    term = np.exp(a + beta * f["D"] - alpha * f["N"] - gamma * capacity)
    return f["L0"] + term, (term, -f["N"] * term, f["D"] * term, gamma * term * np.expm1(-capacity), -capacity * term)


def _log_limit(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    c, slope_data, slope_size, b = theta
    capacity = np.log1p(np.exp(b) * f["p"])
    value = f["L0"] + c + slope_data * f["D"] - slope_size * (f["N"] + capacity)
    return value, (1.0, f["D"], -(f["N"] + capacity), slope_size * np.expm1(-capacity))


def _log_limit_plain(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    """The same with C at one token and one parameter instead of at the middle of the data."""
    c, slope_data, slope_size, b = theta
    middle = slope_data * f["ref:D"] - slope_size * f["ref:N"]
    value, (by_c, by_data, by_size, by_b) = _log_limit(f, [c + middle, slope_data, slope_size, b])
    return value, (by_c, by_data + f["ref:D"], by_size - f["ref:N"], by_b)


def _log_limit_natural(theta: Array, references: Mapping[str, float]) -> Array:
    values = np.array(theta)
    values[..., 0] = theta[..., 0] - theta[..., 1] * np.log(references["D"]) + theta[..., 2] * np.log(references["N"])
    values[..., 3] = np.exp(theta[..., 3])
    return values


def _log_limit_internal(values: Array, references: Mapping[str, float]) -> Array:
    theta = np.array(values)
    theta[..., 0] = values[..., 0] + values[..., 1] * np.log(references["D"]) - values[..., 2] * np.log(references["N"])
    theta[..., 3] = np.log(values[..., 3])
    return theta


register(
    Law(
        name="bethune-forgetting/no-p",
        formula="loss = L0 + A D^beta / N^alpha",
        latex=r"L_{pt} = L^0_{pt} + A D^{\beta} / N^{\alpha}",
        source="Eq. 7 without replay",
        columns=("N", "D", "L0"),
        parameters=FORGETTING_PARAMETERS[:3],
        evaluate=_no_replay,
        logs=("N", "D"),
        rescales=FORGETTING_RESCALES,
        alternatives=FORGETTING_RIVALS,
        response="pretraining",
    )
)
register(
    Law(
        name="bethune-forgetting/on-d",
        formula="loss = L0 + A (D / (1 + B p))^beta / N^alpha",
        latex=r"L_{pt} = L^0_{pt} + A (D / (1 + B p))^{\beta} / N^{\alpha}",
        source="rival of Eq. 7: replay divides the data",
        columns=("N", "D", "p", "L0"),
        parameters=FORGETTING_PARAMETERS,
        evaluate=_replay_on_data,
        logs=("N", "D"),
        rescales=FORGETTING_RESCALES,
        alternatives=FORGETTING_RIVALS,
        response="pretraining",
    )
)
register(
    Law(
        name="bethune-forgetting/additive",
        formula="loss = L0 + A D^beta / (N + B p)^alpha",
        latex=r"L_{pt} = L^0_{pt} + A D^{\beta} / (N + B p)^{\alpha}",
        source="rival of Eq. 7: replay adds capacity instead of multiplying it",
        columns=("N", "D", "p", "L0"),
        parameters=(
            *FORGETTING_PARAMETERS[:3],
            Parameter(
                "B",
                "capacity that a share of 1 would add",
                "parameters",
                log=True,
                # Within a fit it is a multiple of a typical N; where it is held, parameters.
                low=1e-6,
                high=1e16,
                grid=(3.0, 50.0, 500.0, 1e9),
            ),
        ),
        evaluate=_replay_added,
        logs=("N", "D"),
        rescales=(*FORGETTING_RESCALES, Rescale("B", "N", None, 1.0)),
        alternatives=FORGETTING_RIVALS,
        response="pretraining",
    )
)
register(
    Law(
        name="bethune-forgetting/saturating",
        formula="loss = L0 + A D^beta / N^alpha (S + (1 - S) / (1 + B p)^alpha)",
        latex=r"L_{pt} = L^0_{pt} + A D^{\beta} / N^{\alpha} (S + (1 - S)(1 + B p)^{-\alpha})",
        source="rival of Eq. 7: replay removes at most the share 1 - S of forgetting",
        columns=("N", "D", "p", "L0"),
        parameters=(
            *FORGETTING_PARAMETERS,
            Parameter("S", "share of forgetting that no replay removes", low=0.0, high=1.0, grid=(0.02, 0.3)),
        ),
        evaluate=_replay_saturates,
        logs=("N", "D"),
        rescales=FORGETTING_RESCALES,
        alternatives=FORGETTING_RIVALS,
        response="pretraining",
    )
)
register(
    Law(
        name="bethune-forgetting/own-exponent",
        formula="loss = L0 + A D^beta / (N^alpha (1 + B p)^gamma)",
        latex=r"L_{pt} = L^0_{pt} + A D^{\beta} / (N^{\alpha} (1 + B p)^{\gamma})",
        source="Eq. 7 where replay is no factor of the size: its exponent is its own",
        columns=("N", "D", "p", "L0"),
        parameters=(*FORGETTING_PARAMETERS, exponent("gamma", "how fast forgetting falls with (1 + B p)")),
        evaluate=_own_exponent,
        logs=("N", "D"),
        rescales=FORGETTING_RESCALES,
        alternatives=FORGETTING_RIVALS,
        response="pretraining",
    )
)
log_limit = Law(
    name="bethune-forgetting/log-limit",
    formula="loss = L0 + C + b log D - a log((1 + B p) N)",
    latex=r"L_{pt} = L^0_{pt} + C + b \log D - a \log((1 + B p) N)",
    source="the limit alpha, beta -> 0 of Eq. 7 with E",
    columns=("N", "D", "p", "L0"),
    parameters=(
        Parameter("C", "offset", "nats", linear=True),
        Parameter("b", "nats per factor e of tokens", "nats", linear=True),
        Parameter("a", "nats per factor e of capacity", "nats", linear=True),
        REPLAY,
    ),
    evaluate=_log_limit,
    logs=("N", "D"),
    to_natural=_log_limit_natural,
    to_internal=_log_limit_internal,
    mixed=("C",),
    alternatives=FORGETTING_RIVALS,
    response="pretraining",
)
register(replace(log_limit, plain=replace(log_limit, evaluate=_log_limit_plain, to_natural=None, to_internal=None, mixed=())))


# ------------------------------------------------------------------------------------------------ one model


def _fixed_size(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, beta, b, alpha = theta
    capacity = np.log1p(np.exp(b) * f["p"])
    term = np.exp(a + beta * f["D"] - alpha * capacity)
    return f["L0"] + term, (term, f["D"] * term, alpha * term * np.expm1(-capacity), -capacity * term)


register(
    Law(
        name="forgetting-fixed-n",
        formula="loss = L0 + A D^beta (1 + B p)^-alpha",
        latex=r"L_{pt} = L^0_{pt} + A D^{\beta} (1 + B p)^{-\alpha}",
        source=f"{SOURCE_BETHUNE}, Eq. 7 at one model size (N^-alpha joins A)",
        columns=("D", "p", "L0"),
        parameters=(
            amplitude("A", "forgetting of this model at one token and no replay", "nats / tokens^beta"),
            exponent("beta", "how fast forgetting grows with finetuning tokens"),
            REPLAY,
            exponent("alpha", "how fast forgetting falls with (1 + B p)"),
        ),
        evaluate=_fixed_size,
        logs=("D",),
        rescales=(Rescale("A", "D", "beta", -1.0),),
        alternatives=(
            Alternative("with p", "forgetting-fixed-n"),
            Alternative("no p", "forgetting-fixed-n/no-p", inside=("with p",)),
        ),
        response="pretraining",
    )
)


def _fixed_size_no_replay(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, beta = theta
    term = np.exp(a + beta * f["D"])
    return f["L0"] + term, (term, f["D"] * term)


register(
    Law(
        name="forgetting-fixed-n/no-p",
        formula="loss = L0 + A D^beta",
        latex=r"L_{pt} = L^0_{pt} + A D^{\beta}",
        source="Eq. 7 at one model size, without replay",
        columns=("D", "L0"),
        parameters=(
            amplitude("A", "forgetting of this model at one token", "nats / tokens^beta"),
            exponent("beta", "how fast forgetting grows with finetuning tokens"),
        ),
        evaluate=_fixed_size_no_replay,
        logs=("D",),
        rescales=(Rescale("A", "D", "beta", -1.0),),
        response="pretraining",
    )
)
