"""How often nominal 95% intervals cover the truth, by simulation: `python tests/laws/coverage.py [--simulations 2000]`.

Each scenario draws data from a known law and asks the default method for intervals of the exponents, log B and a prediction beyond
the data. `make intervals` runs it whole; the tests run a short form.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass

import numpy as np

from mlx_forget.laws.fit import FitOptions, fit_law
from mlx_forget.laws.forms import Array, get_law
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, assess, predict_intervals

if __package__:
    from .surfaces import SHARES, SIZES, TOKENS, grid, paper_grid
else:
    from surfaces import SHARES, SIZES, TOKENS, grid, paper_grid

FORGETTING_TRUTH = {"A": 3.0, "alpha": 0.45, "beta": 0.4, "B": 300.0}
FINETUNING_TRUTH = {"A": 30.0, "alpha": 0.12, "beta": 0.07, "E": 0.6}
# Where the prediction is asked: larger in N and D than most of the design.
QUESTION = {"N": 1.27e9, "D": 3e7, "p": 0.01, "L0": 2.6}


@dataclass(frozen=True)
class Scenario:
    """A design, its true law and its noise.

    Args:
        name: what it shows.
        law: the law of truth and fit.
        truth: natural parameters.
        columns: the design.
        level: what the rows of a cluster share: "run" or "base", which are labelled, "repeat", which are not, or "row".
        cluster: of each row; None where rows are independent.
        row_noise, cluster_noise: standard deviations in log loss.
        judged: free coordinates whose coverage counts.
    """

    name: str
    law: str
    truth: dict[str, float]
    columns: dict[str, Array]
    level: str
    cluster: Array | None
    row_noise: float
    cluster_noise: float
    judged: tuple[str, ...]


def numbered(columns: dict[str, Array], *names: str) -> Array:
    """One number per combination of the values of some columns, of each row."""
    return np.unique(np.stack([columns[name] for name in names]), axis=1, return_inverse=True)[1].reshape(-1).astype(float)


def forgetting(name: str, columns: dict[str, Array], level: str = "row", cluster: Array | None = None) -> Scenario:
    """A scenario of the forgetting law; in a cluster, what its rows share is most of the noise."""
    noise = (0.004, 0.0) if cluster is None else (0.002, 0.004)
    return Scenario(name, "bethune-forgetting", FORGETTING_TRUTH, columns, level, cluster, *noise, ("alpha", "beta", "B"))


def scenarios() -> list[Scenario]:
    tokens = np.geomspace(3e5, 3e7, 6)
    checkpoints = paper_grid(tokens=tokens)
    twenty = paper_grid(sizes=SIZES[1:], tokens=tokens)
    repeats = {name: np.repeat(values, 4) for name, values in paper_grid(tokens=TOKENS[::2], shares=SHARES[::2]).items()}
    # Four base models of each size, which differ in L0 and in how easily they forget.
    bases = {name: np.tile(values, 4) for name, values in paper_grid(tokens=TOKENS[::2]).items()}
    number = np.repeat(np.arange(4.0), 75)
    bases["L0"] = bases["L0"] + 0.01 * number
    small = paper_grid(sizes=SIZES[[0, 2, 4]], tokens=TOKENS[::2], shares=np.array([0.0, 0.005, 0.05]))
    finetuning = grid(N=SIZES, D=tokens[:5])
    return [
        forgetting("125 independent runs", paper_grid()),
        forgetting("25 runs x 6 checkpoints", checkpoints, "run", numbered(checkpoints, "N", "p")),
        forgetting("20 runs x 6 checkpoints", twenty, "run", numbered(twenty, "N", "p")),
        forgetting("45 configurations x 4 seeds", repeats, "repeat", numbered(repeats, "N", "D", "p")),
        forgetting("20 base models x 15 runs", bases, "base", numbered(bases, "N", "L0")),
        forgetting("27 independent runs", small),
        Scenario(
            "25 independent runs, finetuning",
            "bethune-finetuning",
            FINETUNING_TRUTH,
            finetuning,
            "row",
            None,
            0.004,
            0.0,
            ("alpha", "beta"),
        ),
    ]


def measure(scenario: Scenario, *, simulations: int, resamples: int, seed: int = 0) -> dict[str, float]:
    """Coverage of each judged coordinate and of the prediction, and the share of resamples that converged."""
    law = get_law(scenario.law)
    exact = law.predict(scenario.truth, scenario.columns)
    question = {name: QUESTION[name] for name in law.columns}
    answer = float(law.predict(scenario.truth, question)[0])
    generator = np.random.default_rng(seed)
    hits = dict.fromkeys((*scenario.judged, "prediction"), 0)
    converged = 0.0
    for i in range(simulations):
        noise = scenario.row_noise * generator.standard_normal(len(exact))
        if scenario.cluster is not None:
            effects = scenario.cluster_noise * generator.standard_normal(int(scenario.cluster.max()) + 1)
            noise = noise + effects[scenario.cluster.astype(int)]
        labels = {scenario.level: scenario.cluster} if scenario.level in ("run", "base") else {}
        table = Table.of(**labels, **scenario.columns, loss=exact * np.exp(noise))
        fit = fit_law(table, law, options=FitOptions(allow_duplicates=True))
        found = assess(fit, BootstrapOptions(num_resamples=resamples, seed=i))
        assert found.clusters.level == scenario.level or not found.clusters.is_clustered
        converged += found.draws.share_converged if found.draws else 1.0
        for name in scenario.judged:
            interval = found.params[name]
            low = -np.inf if interval.low is None else interval.low
            high = np.inf if interval.high is None else interval.high
            hits[name] += low <= scenario.truth[name] <= high
        predicted = predict_intervals(found, question)[0]
        assert predicted.low is not None
        assert predicted.high is not None
        hits["prediction"] += predicted.low <= answer <= predicted.high
    return {
        **{name: count / simulations for name, count in hits.items()},
        "converged": converged / simulations,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--only", type=str, default="")
    arguments = parser.parse_args()
    worst = 0.0
    for scenario in scenarios():
        if arguments.only not in scenario.name:
            continue
        began = time.perf_counter()
        found = measure(scenario, simulations=arguments.simulations, resamples=arguments.resamples)
        covered = [value for name, value in found.items() if name != "converged"]
        worst = max(worst, *(abs(value - 0.95) for value in covered))
        print(
            json.dumps({"scenario": scenario.name, **found, "seconds": round(time.perf_counter() - began, 1)}),
            flush=True,
        )
    # Three points, and what a binomial of that many simulations strays by.
    allowed = 0.03 + 2 * (0.05 * 0.95 / arguments.simulations) ** 0.5
    return 0 if worst <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
