# ruff: noqa: E402  (the thread count must be set before NumPy is loaded)
"""How fast the law core is, against tuned scipy in the same run.

`python tests/benchmarks/bench_laws.py [--json]`. One core, one BLAS thread. `cpu` is the median processor time, which is what the
code costs even on a shared machine; `wall` the median time a user waits. Ratios are baseline / ours in processor time, both
measured here.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares, minimize

from mlx_forget.law_plots import plot_parameters, plot_predicted
from mlx_forget.laws.bootstrap import bootstrap
from mlx_forget.laws.fit import FitOptions, fit_groups, fit_law
from mlx_forget.laws.fitted import Fit
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.objective import Objective
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, assess
from mlx_forget.tables import read_table

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.laws.surfaces import SIZES, TOKENS, grid, paper_grid

FORGETTING = {"A": 3.0, "alpha": 0.45, "beta": 0.4, "B": 600.0}
FINETUNING = {"A": 30.0, "alpha": 0.12, "beta": 0.07, "E": 0.6}
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


def timed(function: Callable[[], object], *, repeat: int) -> tuple[float, float]:
    """(processor, wall) seconds, medians."""
    cpu, wall = [], []
    for _ in range(repeat):
        began, began_cpu = time.perf_counter(), time.process_time()
        function()
        cpu.append(time.process_time() - began_cpu)
        wall.append(time.perf_counter() - began)
    return float(np.median(cpu)), float(np.median(wall))


def noisy(law: str, truth: dict[str, float], columns: dict[str, np.ndarray], *, seed: int = 0, **keep: object) -> Table:
    exact = get_law(law).predict(truth, columns)
    return Table.of(
        **columns,
        **keep,
        loss=exact * np.exp(0.004 * np.random.default_rng(seed).standard_normal(len(exact))),
    )


def chinchilla_residuals(fit: Fit) -> tuple[Callable, Callable, np.ndarray]:
    """Residual and Jacobian in centred coordinates, written by hand: the tuned scipy baseline."""
    columns, references = fit.table.columns, fit.model.references
    x, z = np.log(columns["N"] / references["N"]), np.log(columns["D"] / references["D"])
    response = np.log(columns["loss"])

    def parts(u):
        size, data = np.exp(u[1] - u[3] * x), np.exp(u[2] - u[4] * z)
        return size, data, u[0] + size + data

    def residual(u):
        return response - np.log(parts(u)[2])

    def jacobian(u):
        size, data, total = parts(u)
        return -np.stack([np.ones_like(size), size, data, -x * size, -z * data], axis=1) / total[:, None]

    return residual, jacobian, response


def scipy_resample(fit: Fit, weights: np.ndarray, *, huber: bool) -> None:
    """One warm refit by scipy: BFGS with a hand gradient on a scaled objective (robust), or Levenberg-Marquardt (squares)."""
    residual, jacobian, _ = chinchilla_residuals(fit)
    if not huber:
        root = np.sqrt(weights)
        least_squares(lambda u: root * residual(u), fit.u, jac=lambda u: root[:, None] * jacobian(u), method="lm")
        return
    delta = fit.objective.delta

    def objective(u):
        r = residual(u)
        slope = np.clip(r, -delta, delta)
        return 1e4 * np.sum(weights * slope * (r - slope / 2)), 1e4 * (jacobian(u).T @ (weights * slope))

    minimize(objective, fit.u, jac=True, method="BFGS", options={"gtol": 1e-6})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}

    def record(name: str, goal: float, timing: tuple[float, float], **more: float) -> None:
        found[name] = {"cpu_s": timing[0], "wall_s": timing[1], "goal_s": goal, **more}
        if not arguments.json:
            extra = "  ".join(f"{key} {value:.3g}" for key, value in more.items())
            print(
                f"{name:55} cpu {timing[0]:8.4f} s  wall {timing[1]:8.4f} s  goal {goal:g} s  {extra}",
                flush=True,
            )

    twin = read_table(ROOT / "data" / "reference" / "chinchilla_twin.csv")
    fit = fit_law(twin, "chinchilla")
    weights = np.random.default_rng(0).multinomial(240, np.full(240, 1 / 240), 40).astype(float)
    sample = 40
    record(
        "global fit, 240 points, Huber",
        0.015,
        timed(lambda: fit_law(twin, "chinchilla"), repeat=3 * arguments.repeat),
    )
    ours = timed(lambda: bootstrap(fit, num_resamples=1000), repeat=arguments.repeat)
    theirs = timed(lambda: [scipy_resample(fit, row, huber=True) for row in weights], repeat=3)
    record(
        "1,000 robust resamples, 240 points",
        0.20,
        ours,
        scipy_bfgs_s=theirs[0] * 1000 / sample,
        ratio=theirs[0] * 1000 / sample / ours[0],
        converged=bootstrap(fit, num_resamples=1000).share_converged,
    )
    squares = fit_law(twin, "chinchilla", options=FitOptions(objective=Objective(delta=np.inf)))
    ours = timed(lambda: bootstrap(squares, num_resamples=1000), repeat=arguments.repeat)
    theirs = timed(lambda: [scipy_resample(squares, row, huber=False) for row in weights], repeat=3)
    record(
        "1,000 least-squares resamples, 240 points",
        0.12,
        ours,
        scipy_lm_s=theirs[0] * 1000 / sample,
        ratio=theirs[0] * 1000 / sample / ours[0],
    )
    columns = paper_grid(tokens=np.geomspace(3e5, 3e7, 6))
    run = np.unique(np.stack([columns["N"], columns["p"]]), axis=1, return_inverse=True)[1]
    forgetting = fit_law(noisy("bethune-forgetting", FORGETTING, columns, run=run), "bethune-forgetting")
    record(
        "forgetting law, 150 points, 1,000 cluster resamples",
        0.15,
        timed(lambda: bootstrap(forgetting, num_resamples=1000), repeat=arguments.repeat),
    )
    mixture = grid(N=np.array([0.5e9, 1.8e9, 4e9]), D=np.geomspace(1e8, 26e9, 10), r=np.linspace(0.05, 1.0, 9))
    dcpt = fit_law(noisy("d-cpt", DCPT, mixture), "d-cpt")
    record(
        "D-CPT, 270 points, 1,000 resamples",
        0.8,
        timed(lambda: bootstrap(dcpt, num_resamples=1000), repeat=3),
        converged=bootstrap(dcpt, num_resamples=1000).share_converged,
    )
    record("twelve domains x two laws, intervals, overview figures", 10.0, timed(lambda: twelve_domains(), repeat=2))
    if arguments.json:
        print(json.dumps(found))
    return 0


def twelve_domains() -> None:
    """Fits, 1,000 resamples each and two overview figures per law of a paper-sized study."""
    for law, truth, columns in (
        ("bethune-forgetting", FORGETTING, paper_grid()),
        ("bethune-finetuning", FINETUNING, {k: np.repeat(v, 5) for k, v in grid(N=SIZES, D=TOKENS).items()}),
    ):
        parts = [noisy(law, truth, columns, seed=seed) for seed in range(12)]
        table = Table(
            {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
            labels={"domain": np.repeat([f"domain {i:02}" for i in range(12)], parts[0].num_rows)},
        )
        fits = fit_groups(table, law, by="domain")
        found = {name: assess(fit, BootstrapOptions()) for name, fit in fits.items()}
        with tempfile.TemporaryDirectory() as folder:
            plot_predicted(found, folder)
            plot_parameters(found, folder)


if __name__ == "__main__":
    sys.exit(main())
