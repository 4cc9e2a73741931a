"""What the law tests share."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_forget.laws.forms import get_law

from .surfaces import paper_grid

REFERENCE = Path(__file__).parents[2] / "data" / "reference"
TRUTH = {"A": 3.0, "alpha": 0.45, "beta": 0.4, "B": 600.0}


@dataclass(frozen=True)
class Ran:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture
def forget(run_forget) -> Callable[..., Ran]:
    """Run the command line in this process."""
    return lambda *arguments: Ran(*run_forget(*arguments))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A noisy table of two domains: the one law of TRUTH, with B of the second twice that of the first."""
    path = tmp_path_factory.mktemp("laws") / "runs.csv"
    columns = paper_grid()
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["N", "D", "p", "L0", "final_loss", "domain"])
        for i, domain in enumerate(("code", "math")):
            exact = get_law("bethune-forgetting").predict({**TRUTH, "B": TRUTH["B"] * (1 + i)}, columns)
            noisy = exact * np.exp(0.004 * np.random.default_rng(i).standard_normal(len(exact)))
            for row in zip(columns["N"], columns["D"], columns["p"], columns["L0"], noisy, strict=True):
                writer.writerow([*row, domain])
    return path


@pytest.fixture(scope="module")
def one(runs):
    """Options of a fit to its first domain."""
    return ("--map", "loss=final_loss", "--where", 'domain == "code"', "--bootstrap", "60")
