"""Named designs and true surfaces that the law tests share."""

from dataclasses import dataclass

import numpy as np

from mlx_forget.laws.forms import Array, Law, get_law
from mlx_forget.laws.table import Table

SIZES = np.array([41e6, 109e6, 334e6, 665e6, 1.27e9])
TOKENS = np.array([0.3e6, 1e6, 3e6, 10e6, 30e6])
SHARES = np.array([0.0, 0.001, 0.005, 0.01, 0.05])
BASE_LOSS = dict(zip(SIZES.tolist(), [3.9, 3.45, 3.0, 2.8, 2.6], strict=True))


@dataclass(frozen=True)
class Surface:
    """A design and the ranges from which truths are drawn.

    Args:
        law: name of the law.
        columns: the design.
        ranges: {parameter: (low, high, how)}, how being "log" or "plain"; amplitudes are given at the middle of the data.
    """

    law: str
    columns: dict[str, Array]
    ranges: dict[str, tuple[float, float, str]]

    @property
    def form(self) -> Law:
        return get_law(self.law)

    def truths(self, count: int, seed: int = 0) -> list[dict[str, float]]:
        """Natural parameters of `count` true surfaces."""
        law = self.form
        references = {name: float(np.exp(np.log(self.columns[name]).mean())) for name in law.logs}
        generator = np.random.default_rng(seed)
        made = []
        for _ in range(count):
            natural = {}
            for name, (low, high, how) in self.ranges.items():
                natural[name] = float(
                    np.exp(generator.uniform(np.log(low), np.log(high))) if how == "log" else generator.uniform(low, high)
                )
            for rule in law.rescales:
                power = 1.0 if rule.power is None else natural[rule.power]
                natural[rule.amplitude] *= references[rule.column] ** (rule.sign * power)
            made.append(natural)
        return made

    def table(self, params: dict[str, float], *, noise: float = 0.0, seed: int = 0) -> Table:
        """The design with losses from a truth, times exp(noise x normal)."""
        loss = self.form.predict(params, self.columns)
        generator = np.random.default_rng(seed)
        return Table.of(**self.columns, loss=loss * np.exp(noise * generator.standard_normal(len(loss))))


def grid(**axes: Array) -> dict[str, Array]:
    """The full factorial of the axes, as columns."""
    mesh = np.meshgrid(*axes.values(), indexing="ij")
    return {name: values.ravel().astype(float) for name, values in zip(axes, mesh, strict=True)}


def paper_grid(sizes: Array = SIZES, tokens: Array = TOKENS, shares: Array = SHARES) -> dict[str, Array]:
    """The grid of the forgetting paper, with a base loss per size."""
    columns = grid(N=np.asarray(sizes), D=np.asarray(tokens), p=np.asarray(shares))
    known = np.array(sorted(BASE_LOSS))
    losses = np.array([BASE_LOSS[size] for size in known])
    columns["L0"] = np.interp(np.log(columns["N"]), np.log(known), losses)
    return columns


def scattered(count: int, seed: int = 0) -> dict[str, Array]:
    """Models of 1e7..1e10 parameters on 3e8..3e11 tokens, log-uniform."""
    generator = np.random.default_rng(seed)
    return {
        "N": np.exp(generator.uniform(np.log(1e7), np.log(1e10), count)),
        "D": np.exp(generator.uniform(np.log(3e8), np.log(3e11), count)),
    }


FORGETTING = {
    "A": (0.05, 0.6, "log"),
    "alpha": (0.2, 0.8, "plain"),
    "beta": (0.2, 0.7, "plain"),
    "B": (50.0, 5000.0, "log"),
}
STEPS = {
    "alpha": (0.1, 0.5, "plain"),
    "beta": (0.1, 0.5, "plain"),
    "rho": (1.2, 2.5, "log"),
    "a": (3e5, 3e6, "log"),
    "b": (10.0, 100.0, "log"),
}

SURFACES: dict[str, Surface] = {
    "chinchilla": Surface(
        "chinchilla",
        scattered(120),
        {
            "E": (1.2, 2.2, "plain"),
            "A": (0.1, 1.0, "log"),
            "B": (0.1, 1.0, "log"),
            "alpha": (0.2, 0.6, "plain"),
            "beta": (0.2, 0.6, "plain"),
        },
    ),
    "bethune-forgetting": Surface("bethune-forgetting", paper_grid(), FORGETTING),
    "bethune-forgetting-e": Surface("bethune-forgetting-e", paper_grid(), {**FORGETTING, "E": (-0.02, 0.05, "plain")}),
    "bethune-finetuning": Surface(
        "bethune-finetuning",
        grid(N=SIZES, D=TOKENS),
        {
            "A": (0.3, 2.0, "log"),
            "alpha": (0.05, 0.3, "plain"),
            "beta": (0.05, 0.3, "plain"),
            "E": (0.3, 1.5, "plain"),
        },
    ),
    "forgetting-fixed-n": Surface(
        "forgetting-fixed-n",
        {**grid(D=TOKENS, p=SHARES), "L0": np.full(25, 3.2)},
        {
            "A": (0.05, 0.6, "log"),
            "beta": (0.2, 0.7, "plain"),
            "B": (50.0, 5000.0, "log"),
            "alpha": (0.2, 0.8, "plain"),
        },
    ),
    "kalajdzievski-linear": Surface(
        "kalajdzievski-linear",
        {"L_ft": np.linspace(0.65, 0.9, 20)},
        {"c": (0.8, 2.0, "plain"), "s": (2.0, 3.2, "plain")},
    ),
    "kalajdzievski-finetuning": Surface(
        "kalajdzievski-finetuning",
        grid(
            P=2.4986e6 * np.array([1.0, 8, 16, 32, 64, 128, 256]),
            steps=np.array([60.0, 90, 120, 180, 260, 1000, 4000]),
        ),
        {**STEPS, "s": (0.4, 1.0, "plain")},
    ),
    "kalajdzievski-forgetting": Surface(
        "kalajdzievski-forgetting",
        grid(
            P=2.4986e6 * np.array([1.0, 8, 16, 32, 64, 128, 256]),
            steps=np.array([60.0, 90, 120, 180, 260, 1000, 4000]),
        ),
        {**STEPS, "s": (10.0, 12.0, "plain")},
    ),
    "d-cpt": Surface(
        "d-cpt",
        grid(N=np.array([0.5e9, 1.8e9, 4e9]), D=np.geomspace(1e8, 26e9, 10), r=np.linspace(0.05, 1.0, 9)),
        {
            "E": (0.5, 1.5, "plain"),
            "A": (0.1, 0.6, "log"),
            "alpha": (0.2, 0.7, "plain"),
            "B": (0.1, 0.6, "log"),
            "eta": (0.3, 1.0, "plain"),
            "beta": (0.2, 0.7, "plain"),
            "C": (0.05, 0.4, "log"),
            "gamma": (0.3, 1.5, "plain"),
            "eps": (0.03, 0.3, "log"),
        },
    ),
    "cmr": Surface(
        "cmr",
        {"R": np.array([0.05, 0.125, 0.25, 1 / 3, 0.5, 0.75, 1.0])},
        {"a": (0.05, 0.4, "plain"), "s": (-0.8, -0.1, "plain"), "b": (1.0, 2.0, "plain")},
    ),
    "overfitting-gap": Surface(
        "overfitting-gap",
        grid(D=np.geomspace(1e9, 2e11, 12), r=np.array([0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2])),
        {
            "A": (0.3, 1.0, "log"),
            "b_s": (-1.0, -0.3, "plain"),
            "b_g": (-0.4, -0.15, "plain"),
            "k0": (1.0, 2.0, "plain"),
            "k1": (0.05, 0.2, "plain"),
            "k2": (1e-3, 1e-2, "log"),
            "k3": (0.1, 0.5, "plain"),
            "a1": (0.3, 1.0, "log"),
            "a2": (0.5, 1.2, "plain"),
            "a3": (-3.0, 3.0, "plain"),
            "g_s": (0.5, 1.5, "plain"),
            "g_g": (0.3, 0.8, "plain"),
        },
    ),
}
