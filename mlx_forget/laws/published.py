"""The published laws, and the rivals that each is compared with. Importing this module registers them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mlx_forget.laws.forms import (
    Alternative,
    Array,
    Contrast,
    Features,
    Law,
    Parameter,
    Partial,
    Rescale,
    register,
)

EXPONENTS = (0.03, 0.1, 0.25, 0.5, 1.0)
SOURCE_BETHUNE = "Bethune et al., ICML 2025, arXiv 2502.06042"


def amplitude(name: str, meaning: str, unit: str = "nats x units of the columns") -> Parameter:
    return Parameter(name, meaning, unit, log=True, low=1e-200, high=1e200, linear=True)


def exponent(name: str, meaning: str, *, grid: tuple[float, ...] = EXPONENTS, low: float = 0.0, high: float = 10.0) -> Parameter:
    return Parameter(name, meaning, low=low, high=high, grid=grid)


def floor(meaning: str = "loss that no amount of the columns removes") -> Parameter:
    return Parameter("E", meaning, "nats", low=0.0, high=50.0, linear=True)


REPLAY = Parameter(
    "B",
    "how much a share of pretraining data multiplies the capacity left for pretraining: (1 + B p)",
    log=True,
    low=1e-3,
    high=1e8,
    grid=(3.0, 50.0, 500.0, 5000.0),
)


# ------------------------------------------------------------------------------------------------ Chinchilla


def _chinchilla(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    e, a, b, alpha, beta = theta
    x, z = f["N"], f["D"]
    size, data = np.exp(a - alpha * x), np.exp(b - beta * z)
    return e + size + data, (1.0, size, data, -x * size, -z * data)


def _compute_split(params: Mapping[str, Array], references: Mapping[str, float]) -> Array:
    return np.asarray(params["beta"] / (params["alpha"] + params["beta"]))


chinchilla = register(
    Law(
        name="chinchilla",
        formula="loss = E + A / N^alpha + B / D^beta",
        latex=r"L = E + \frac{A}{N^{\alpha}} + \frac{B}{D^{\beta}}",
        source="Hoffmann et al. 2022, arXiv 2203.15556, Eq. 2; refit by Besiroglu et al., arXiv 2404.10102",
        columns=("N", "D"),
        parameters=(
            floor("irreducible loss"),
            amplitude("A", "size of the model term", "nats x parameters^alpha"),
            amplitude("B", "size of the data term", "nats x tokens^beta"),
            exponent("alpha", "how fast the loss falls with parameters"),
            exponent("beta", "how fast the loss falls with tokens"),
        ),
        evaluate=_chinchilla,
        logs=("N", "D"),
        rescales=(Rescale("A", "N", "alpha", 1.0), Rescale("B", "D", "beta", 1.0)),
        contrasts=(
            Contrast(
                "beta / (alpha + beta)",
                "exponent of the compute-optimal model size in compute",
                _compute_split,
            ),
        ),
        alternatives=(
            Alternative("chinchilla", "chinchilla"),
            Alternative("tied exponents", "chinchilla", tied={"beta": "alpha"}, inside=("chinchilla",)),
            Alternative("E = 0", "chinchilla", fixed={"E": 0.0}, inside=("chinchilla",)),
        ),
    )
)


# ------------------------------------------------------------------------------------------------ Bethune:
# forgetting


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
                low=1.0,
                high=1e16,
                grid=(1e8, 1e10, 1e12),
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


# ------------------------------------------------------------------------------------------------ Bethune:
# finetuning


def _finetuning(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, alpha, beta, e = theta
    term = np.exp(a - alpha * f["N"] - beta * f["D"])
    return term + e, (term, -f["N"] * term, -f["D"] * term, 1.0)


register(
    Law(
        name="bethune-finetuning",
        formula="loss = A / (N^alpha D^beta) + E",
        latex=r"L_{ft} = \frac{A}{N^{\alpha} D^{\beta}} + E",
        source=f"{SOURCE_BETHUNE}, Eq. 6",
        columns=("N", "D"),
        parameters=(
            amplitude("A", "size of the reducible loss", "nats x parameters^alpha x tokens^beta"),
            exponent("alpha", "how fast the loss falls with parameters"),
            exponent("beta", "how fast the loss falls with finetuning tokens"),
            floor("irreducible loss of the target"),
        ),
        evaluate=_finetuning,
        logs=("N", "D"),
        rescales=(Rescale("A", "N", "alpha", 1.0), Rescale("A", "D", "beta", 1.0)),
        alternatives=(
            Alternative("finetuning", "bethune-finetuning"),
            Alternative("tied exponents", "bethune-finetuning", tied={"beta": "alpha"}, inside=("finetuning",)),
            Alternative("E = 0", "bethune-finetuning", fixed={"E": 0.0}, inside=("finetuning",)),
        ),
        response="target",
    )
)


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


# ------------------------------------------------------------------------------------------------ data
# mixtures


def _dcpt(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    e, a, alpha, b, eta, beta, c, gamma, log_eps = theta
    x, z, share = f["N"], f["D"], f["r"]
    eps = np.exp(log_eps)
    log_share = np.log(np.maximum(share, 1e-300))
    log_shifted = np.log(share + eps)
    size = np.exp(a - alpha * x)
    data = np.exp(b + eta * log_share - beta * z)
    mix = np.exp(c - gamma * log_shifted)
    by_eps = -gamma * mix * eps / (share + eps)
    log_share = np.where(share > 0, log_share, 0.0)
    value = e + size + data + mix
    return value, (1.0, size, -x * size, data, log_share * data, -z * data, mix, -log_shifted * mix, by_eps)


register(
    Law(
        name="d-cpt",
        formula="loss = E + A / N^alpha + B r^eta / D^beta + C / (r + eps)^gamma",
        latex=r"L = E + \frac{A}{N^{\alpha}} + \frac{B r^{\eta}}{D^{\beta}} + \frac{C}{(r + "
        r"\epsilon)^{\gamma}}",
        source="Que et al., NeurIPS 2024, arXiv 2406.01375",
        columns=("N", "D", "r"),
        parameters=(
            floor("irreducible loss"),
            amplitude("A", "size of the model term", "nats x parameters^alpha"),
            exponent("alpha", "how fast the loss falls with parameters", grid=(0.1, 0.3, 0.7)),
            amplitude("B", "size of the data term", "nats x tokens^beta"),
            exponent("eta", "how the data term grows with the share", grid=(0.3, 1.0)),
            exponent("beta", "how fast the loss falls with tokens", grid=(0.1, 0.3, 0.7)),
            amplitude("C", "size of the mixture term", "nats"),
            exponent("gamma", "how fast the loss falls with the share", grid=(0.3, 1.0, 2.0)),
            Parameter(
                "eps",
                "share that the model knows already",
                log=True,
                low=1e-6,
                high=10.0,
                grid=(0.02, 0.1, 0.5),
            ),
        ),
        evaluate=_dcpt,
        logs=("N", "D"),
        rescales=(Rescale("A", "N", "alpha", 1.0), Rescale("B", "D", "beta", 1.0)),
        alternatives=(
            Alternative("d-cpt", "d-cpt"),
            Alternative("tied exponents", "d-cpt", tied={"beta": "alpha"}, inside=("d-cpt",)),
            Alternative("E = 0", "d-cpt", fixed={"E": 0.0}, inside=("d-cpt",)),
        ),
    )
)


def _cmr(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, s, b = theta
    power = np.exp(s * f["R"])
    return a * power + b, (power, a * f["R"] * power, 1.0)


register(
    Law(
        name="cmr",
        formula="loss = a R^s + b",
        latex=r"L(R) = a R^{s} + b",
        source="Gu et al., EMNLP 2024, arXiv 2407.17467: the loss at a fixed number of tokens",
        columns=("R",),
        parameters=(
            Parameter("a", "size and sign of the effect of the share", "nats", linear=True),
            Parameter(
                "s",
                "exponent of the share; either sign",
                low=-20.0,
                high=20.0,
                grid=(-2.0, -0.7, -0.03, -0.2, 0.2, 0.03, 0.7, 2.0),
            ),
            Parameter("b", "loss without the effect", "nats", linear=True),
        ),
        evaluate=_cmr,
        logs=("R",),
        rescales=(Rescale("a", "R", "s", -1.0),),
    )
)


def _gap(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    a, bs, bg, k0, k1, log_k2, k3, g, ga, gb, gs, gg = theta
    z, share, ref = f["D"], f["r"], f["ref:D"]
    rest = 1 - share
    log_share = np.log(np.maximum(share, 1e-300))
    # T^b(share) = (T / ref)^b(share) ref^b_g ref^(share (b_s - b_g)); the middle factor joins the amplitude.
    train = np.exp(a + (share * bs + rest * bg) * z + share * (bs - bg) * ref)
    gap = np.exp(g + ga * log_share + gb * share + (share * gs + rest * gg) * z + share * (gs - gg) * ref)
    k2 = np.exp(log_k2)
    log_shifted = np.log(share + k2)
    value = train + k0 - k1 * log_shifted - k3 * share + gap
    towards_domain, towards_general = share * (z + ref), rest * z - share * ref
    safe_log = np.where(share > 0, log_share, 0.0)
    return value, (
        train,
        towards_domain * train,
        towards_general * train,
        1.0,
        -log_shifted,
        -k1 * k2 / (share + k2),
        -share,
        gap,
        safe_log * gap,
        share * gap,
        towards_domain * gap,
        towards_general * gap,
    )


register(
    Law(
        name="overfitting-gap",
        formula="loss = A D^b(r) + k0 - k1 log(r + k2) - k3 r + a1 r^a2 exp(a3 r) D^g(r); b(r) = r "
        "b_s + (1 - r) b_g, g(r) = r g_s + (1 - r) g_g",
        latex=r"L = A D^{b(r)} + \kappa_0 - \kappa_1 \log(r + \kappa_2) - \kappa_3 r + \alpha_1 "
        "r^{\alpha_2} e^{\alpha_3 r} D^{g(r)}",
        source="The Finetuner's Fallacy, arXiv 2603.16177 (overfitting law)",
        columns=("D", "r"),
        parameters=(
            amplitude("A", "size of the training term", "nats / tokens^b"),
            Parameter("b_s", "exponent of the training term on domain data", low=-10.0, high=10.0, grid=(-0.5, -0.1)),
            Parameter(
                "b_g",
                "exponent of the training term on general data",
                low=-10.0,
                high=10.0,
                grid=(-0.5, -0.1),
            ),
            Parameter("k0", "asymptote", "nats", linear=True),
            Parameter("k1", "fall of the asymptote with log share", "nats", linear=True),
            Parameter("k2", "share at which that fall begins", log=True, low=1e-8, high=10.0, grid=(1e-3, 1e-2)),
            Parameter("k3", "linear fall of the asymptote", "nats", linear=True),
            amplitude("a1", "size of the overfitting gap", "nats / tokens^g"),
            Parameter("a2", "power of the gap in the share", low=0.0, high=10.0, grid=(0.5, 1.0)),
            Parameter("a3", "exponential rate of the gap in the share", low=-1000.0, high=1000.0, grid=(-5.0, 5.0)),
            Parameter("g_s", "exponent of the gap on domain data", low=-10.0, high=20.0, grid=(0.5, 2.0)),
            Parameter("g_g", "exponent of the gap on general data", low=-10.0, high=20.0, grid=(0.3, 1.0)),
        ),
        evaluate=_gap,
        logs=("D",),
        rescales=(Rescale("A", "D", "b_g", -1.0), Rescale("a1", "D", "g_g", -1.0)),
    )
)
