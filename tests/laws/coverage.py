"""How often nominal 95% intervals cover the truth, by simulation: `python tests/laws/coverage.py
[--simulations 2000]`.

Each scenario draws data from a known law and asks the default method for intervals of the exponents, log B
and a prediction beyond the data. `make coverage` runs it whole; the tests run a short form.
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
    from .surfaces import SIZES, grid, paper_grid
else:
    from surfaces import SIZES, grid, paper_grid

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
        run: the independent run of each row; None where rows are independent.
        row_noise, run_noise: standard deviations in log loss.
        judged: free coordinates whose coverage counts.
    """

    name: str
    law: str
    truth: dict[str, float]
    columns: dict[str, Array]
    run: Array | None
    row_noise: float
    run_noise: float
    judged: tuple[str, ...]


def scenarios() -> list[Scenario]:
    independent = paper_grid()
    # 25 runs (5 sizes x 5 shares) of 6 checkpoints each: what a checkpoint shares with its run is most of the
    # noise.
    tokens = np.geomspace(3e5, 3e7, 6)
    clustered = paper_grid(tokens=tokens)
    run = np.unique(np.stack([clustered["N"], clustered["p"]]), axis=1, return_inverse=True)[1].astype(float)
    # 20 runs: 4 sizes x 5 shares.
    twenty = paper_grid(sizes=SIZES[1:], tokens=tokens)
    run_of_twenty = np.unique(np.stack([twenty["N"], twenty["p"]]), axis=1, return_inverse=True)[1].astype(float)
    small = paper_grid(sizes=SIZES[[0, 2, 4]], tokens=np.array([3e5, 3e6, 3e7]), shares=np.array([0.0, 0.005, 0.05]))
    judged = ("alpha", "beta", "B")
    return [
        Scenario(
            "125 independent runs",
            "bethune-forgetting",
            FORGETTING_TRUTH,
            independent,
            None,
            0.004,
            0.0,
            judged,
        ),
        Scenario(
            "25 runs x 6 checkpoints",
            "bethune-forgetting",
            FORGETTING_TRUTH,
            clustered,
            run,
            0.002,
            0.004,
            judged,
        ),
        Scenario(
            "20 runs x 6 checkpoints",
            "bethune-forgetting",
            FORGETTING_TRUTH,
            twenty,
            run_of_twenty,
            0.002,
            0.004,
            judged,
        ),
        Scenario("27 independent runs", "bethune-forgetting", FORGETTING_TRUTH, small, None, 0.004, 0.0, judged),
        Scenario(
            "25 independent runs, finetuning",
            "bethune-finetuning",
            FINETUNING_TRUTH,
            grid(N=SIZES, D=tokens[:5]),
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
        if scenario.run is not None:
            effects = scenario.run_noise * generator.standard_normal(int(scenario.run.max()) + 1)
            noise = noise + effects[scenario.run.astype(int)]
        table = Table.of(run=scenario.run, **scenario.columns, loss=exact * np.exp(noise))
        fit = fit_law(table, law, options=FitOptions(allow_duplicates=True))
        found = assess(fit, BootstrapOptions(num_resamples=resamples, seed=i))
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
