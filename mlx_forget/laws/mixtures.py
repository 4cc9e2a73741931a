"""Laws of the share of domain data in a mixture: D-CPT, the critical mixture ratio, and the overfitting gap."""

from collections.abc import Sequence

import numpy as np

from mlx_forget.laws.forms import Alternative, Array, Features, Law, Parameter, Partial, Rescale, register
from mlx_forget.laws.parameters import amplitude, exponent, floor


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
        latex=r"L = A D^{b(r)} + k_0 - k_1 \log(r + k_2) - k_3 r + a_1 r^{a_2} e^{a_3 r} D^{g(r)}, "
        r"\; b(r) = r b_s + (1 - r) b_g, \; g(r) = r g_s + (1 - r) g_g",
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
