"""Twelve designs that leave something unidentified, each with a twin that does not."""

from dataclasses import dataclass

import numpy as np

from mlx_forget.laws.forms import Array
from mlx_forget.laws.model import FREE, Constraints

from .surfaces import SHARES, SIZES, TOKENS, grid, paper_grid, scattered

FORGETTING = {"A": 3.0, "alpha": 0.45, "beta": 0.4, "B": 600.0}
FINETUNING = {"A": 30.0, "alpha": 0.15, "beta": 0.12, "E": 0.6}
CHINCHILLA = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}
FIXED = {"A": 0.002, "beta": 0.35, "B": 600.0, "alpha": 0.5}
DCPT = {
    "E": 1.0,
    "A": 400.0,
    "alpha": 0.35,
    "B": 900.0,
    "eta": 0.6,
    "beta": 0.38,
    "C": 0.25,
    "gamma": 0.9,
    "eps": 0.12,
}
CMR = {"a": 0.15, "s": -0.5, "b": 1.3}
STEPS = {"a": 1e6, "b": 40.0, "alpha": 0.4, "beta": 0.35, "rho": 1.5, "s": 0.6}
LOG_LIMIT = {"C": 0.1, "b": 0.0, "a": 0.12, "B": 400.0}


@dataclass(frozen=True)
class Design:
    """One design.

    Args:
        name: what is wrong with it.
        law: the law fitted.
        truth_law, truth: what made the data.
        columns: the design, and twin: the same with enough added.
        expected: coordinates of which at least one must be flagged.
        constraints: of the fit.
        structural: whether the columns alone show it.
    """

    name: str
    law: str
    truth: dict[str, float]
    columns: dict[str, Array]
    twin: dict[str, Array]
    expected: tuple[str, ...]
    constraints: Constraints = FREE
    structural: bool = True
    truth_law: str = ""
    twin_truth_law: str = ""


def fixed(tokens: Array, shares: Array) -> dict[str, Array]:
    columns = grid(D=np.asarray(tokens), p=np.asarray(shares))
    return {**columns, "L0": np.full(len(columns["D"]), 3.2)}


def on_a_line(ratio: float) -> dict[str, Array]:
    sizes = np.geomspace(4e7, 1.3e9, 25)
    return {"N": sizes, "D": ratio * sizes}


def one_column(columns: dict[str, Array], name: str, value: float) -> dict[str, Array]:
    return {**columns, name: np.full_like(columns[name], value)}


MANY_SHARES = np.array([0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05])
DCPT_GRID = grid(N=np.array([0.1e9, 0.5e9, 1.8e9, 4e9, 14e9]), D=np.geomspace(1e8, 26e9, 10), r=np.linspace(0.05, 1.0, 9))

DESIGNS = (
    Design("every p is 0", "bethune-forgetting", FORGETTING, paper_grid(shares=np.zeros(1)), paper_grid(), ("B",)),
    Design(
        "one p only, above 0",
        "bethune-forgetting",
        FORGETTING,
        paper_grid(shares=np.array([0.01])),
        paper_grid(shares=np.array([0.0, 0.01])),
        ("B", "A"),
    ),
    Design(
        "one size, two p",
        "bethune-forgetting",
        FORGETTING,
        paper_grid(sizes=SIZES[2:3], shares=np.array([0.0, 0.01])),
        paper_grid(sizes=SIZES[1:4], shares=np.array([0.0, 0.01])),
        ("alpha", "B"),
    ),
    Design(
        "one model, two p",
        "forgetting-fixed-n",
        FIXED,
        fixed(TOKENS, np.array([0.0, 0.01])),
        fixed(TOKENS, MANY_SHARES),
        ("alpha", "B"),
    ),
    Design(
        "one model, one D",
        "forgetting-fixed-n",
        FIXED,
        fixed(TOKENS[2:3], MANY_SHARES),
        fixed(TOKENS, MANY_SHARES),
        ("beta", "A"),
    ),
    Design(
        "D proportional to N",
        "bethune-finetuning",
        FINETUNING,
        on_a_line(0.01),
        grid(N=SIZES, D=TOKENS),
        ("alpha", "beta"),
    ),
    Design(
        "one size",
        "bethune-finetuning",
        FINETUNING,
        grid(N=SIZES[2:3], D=np.geomspace(3e5, 3e7, 12)),
        grid(N=SIZES[1:4], D=np.geomspace(3e5, 3e7, 12)),
        ("alpha", "A"),
    ),
    Design(
        "one D",
        "chinchilla",
        CHINCHILLA,
        one_column(scattered(80), "D", 1e10),
        scattered(80),
        ("B", "beta", "E"),
    ),
    Design("one share", "d-cpt", DCPT, one_column(DCPT_GRID, "r", 0.5), DCPT_GRID, ("gamma", "eps", "eta", "C")),
    Design(
        "two shares",
        "cmr",
        CMR,
        {"R": np.repeat([0.25, 1.0], 4)},
        {"R": np.repeat(np.geomspace(0.02, 1.0, 8), 3)},
        ("a", "s", "b"),
    ),
    Design(
        "E ridge: a narrow range",
        "bethune-finetuning",
        FINETUNING,
        grid(N=3e8 * np.linspace(1, 1.2, 5), D=3e6 * np.linspace(1, 1.2, 5)),
        grid(N=SIZES, D=TOKENS),
        ("E", "alpha", "beta", "A"),
        structural=False,
    ),
    Design(
        "alpha to 0: logarithmic in 1 + B p",
        "bethune-forgetting-e",
        LOG_LIMIT,
        paper_grid(sizes=SIZES[1:2], tokens=TOKENS[2:3], shares=MANY_SHARES),
        paper_grid(),
        ("alpha", "E", "A", "B"),
        constraints=Constraints({"beta": 0.0}),
        structural=False,
        truth_law="bethune-forgetting/log-limit",
        twin_truth_law="bethune-forgetting-e",
    ),
)
TWIN_TRUTHS = {"alpha to 0: logarithmic in 1 + B p": {**FORGETTING, "E": 0.02}}
TWIN_CONSTRAINTS = {"alpha to 0: logarithmic in 1 + B p": FREE}
assert len(DESIGNS) == 12
assert len(SHARES) == 5
