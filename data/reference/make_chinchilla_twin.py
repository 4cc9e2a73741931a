"""Make `chinchilla_twin.csv`: 240 synthetic runs from the refitted Chinchilla parameters, no measured point.

Budgets and sizes span about what the original covered (6e18 to 3e21 FLOPs, tens of millions to 16B
parameters); the noise is Laplace, as the published objective assumes. `python
data/reference/make_chinchilla_twin.py` writes the file beside itself, the same bytes each time.
"""

import csv
from pathlib import Path

import numpy as np

GOLDEN = {"E": 1.8172181, "A": 477.8259, "B": 2143.4174, "alpha": 0.3473105, "beta": 0.3671724}
NOISE = 0.004
NUM_RUNS = 240


def twin() -> list[tuple[float, float, float]]:
    """(N, D, loss) of every run."""
    generator = np.random.Generator(np.random.Philox(20240415))
    flops = np.exp(generator.uniform(np.log(6e18), np.log(3e21), NUM_RUNS))
    # Around 20 tokens per parameter, up to a factor 6 smaller or larger in size.
    size = np.sqrt(flops / 120) * np.exp(generator.uniform(-np.log(6), np.log(6), NUM_RUNS))
    tokens = flops / (6 * size)
    loss = GOLDEN["E"] + GOLDEN["A"] / size ** GOLDEN["alpha"] + GOLDEN["B"] / tokens ** GOLDEN["beta"]
    loss = loss * np.exp(generator.laplace(0.0, NOISE / np.sqrt(2), NUM_RUNS))
    return [(float(f"{n:.6e}"), float(f"{d:.6e}"), float(f"{y:.6f}")) for n, d, y in zip(size, tokens, loss, strict=True)]


if __name__ == "__main__":
    with open(Path(__file__).with_name("chinchilla_twin.csv"), "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["N", "D", "loss"])
        writer.writerows([(f"{n:.6e}", f"{d:.6e}", f"{y:.6f}") for n, d, y in twin()])
