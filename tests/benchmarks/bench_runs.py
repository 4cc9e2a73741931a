# ruff: noqa: E402  (the thread count must be set before NumPy is loaded)
"""How fast a study of 10,000 runs answers: whole commands, start-up included, against their budgets.

`python tests/benchmarks/bench_runs.py [--num-runs 10000] [--json]`. One core. `cpu` is processor time, which is what a command costs
even on a shared machine; `wall` is the time a user waits. The first row has no index yet; the ratio says what the index saves.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from mlx_forget.runs.index import INDEX
from tests.benchmarks.synthetic_records import write_records

# what -> (budget in seconds, command)
COMMANDS = {
    "runs": (2.0, ("runs", "list", "{runs}")),
    "runs, a condition and an order": (
        2.0,
        ("runs", "list", "{runs}", "--where", "p > 0 and N < 1e8", "--sort", "forgetting_nats"),
    ),
    "runs --json, the records themselves": (2.0, ("runs", "list", "{runs}", "--json")),
    "runs export to Parquet": (3.0, ("runs", "export", "{runs}", "-o", "{out}/runs.parquet")),
    "fit, profiles": (2.0, ("fit", "{runs}", "--intervals", "profile", "--bootstrap", "0")),
    "fit, 1,000 resamples of base models": (10.0, ("fit", "{runs}", "--intervals", "cluster")),
    "fit, 1,000 resamples of runs": (10.0, ("fit", "{runs}", "--intervals", "cluster", "--cluster", "run")),
    "report": (15.0, ("report", "{runs}", "-o", "{out}/report.html")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-runs", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        places = {"runs": f"{folder}/runs", "out": folder}
        write_records(Path(places["runs"]), arguments.num_runs)
        index = Path(places["runs"]) / INDEX
        cold = []
        for _ in range(arguments.repeat):
            index.unlink(missing_ok=True)
            cold.append(command_time("runs", "list", places["runs"]))
        record(found, "runs, without an index", 5.0, cold)
        for name, (budget, command) in COMMANDS.items():
            filled = [argument.format(**places) for argument in command]
            record(found, name, budget, [command_time(*filled) for _ in range(arguments.repeat)])
    found["runs"]["ratio"] = found["runs, without an index"]["cpu_s"] / found["runs"]["cpu_s"]
    if arguments.json:
        print(json.dumps({"num_runs": arguments.num_runs, **found}))
    else:
        print(f"{arguments.num_runs:,} runs, medians of {arguments.repeat}")
        for name, row in found.items():
            ratio = f"  {row['ratio']:.1f} times faster than without an index" if "ratio" in row else ""
            print(f"{name:42} cpu {row['cpu_s']:6.2f} s  wall {row['wall_s']:6.2f} s  budget {row['goal_s']:g} s{ratio}")
    return 0


def record(found: dict[str, dict[str, float]], name: str, budget: float, timings: list[tuple[float, float]]) -> None:
    cpu, wall = (statistics.median(values) for values in zip(*timings, strict=True))
    found[name] = {"cpu_s": cpu, "wall_s": wall, "goal_s": budget}


def command_time(*arguments: str) -> tuple[float, float]:
    """(processor, wall) seconds of a whole command, start-up included."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "mlx_forget", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
