"""Laws of a loss that falls with parameters and tokens: Chinchilla's, and Bethune's of finetuning."""

from collections.abc import Sequence

import numpy as np

from mlx_forget.laws.forms import Alternative, Array, Features, Law, Partial, Rescale, register
from mlx_forget.laws.parameters import SOURCE_BETHUNE, amplitude, exponent, floor


def _chinchilla(f: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
    e, a, b, alpha, beta = theta
    x, z = f["N"], f["D"]
    size, data = np.exp(a - alpha * x), np.exp(b - beta * z)
    return e + size + data, (1.0, size, data, -x * size, -z * data)


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
        alternatives=(
            Alternative("chinchilla", "chinchilla"),
            Alternative("tied exponents", "chinchilla", tied={"beta": "alpha"}, inside=("chinchilla",)),
            Alternative("E = 0", "chinchilla", fixed={"E": 0.0}, inside=("chinchilla",)),
        ),
    )
)


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
