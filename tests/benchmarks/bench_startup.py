"""Start-up of `forget --help` as a whole process, against Python alone and Python importing Typer; the contenders take turns.

python tests/benchmarks/bench_startup.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import typer'": [sys.executable, "-c", "import typer"],
    "forget --help": [sys.executable, "-m", "mlx_forget", "--help"],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_number in range(16):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["python -c 'import typer'"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:<26} median {median:.3f} s (min {min(values):.3f}, max {max(values):.3f}), {median / base:.2f} of importing Typer"
        )


if __name__ == "__main__":
    main()
