"""Are lines and branches of the core, the pipeline and the laws covered? `python -m tests.coverage_floor REPORT.json 90`.

Reads what `coverage json` writes, prints a row for each part, and ends with 1 where one of them lies below the floor.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTS = ("core", "pipeline", "laws")
KEYS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def part_of(file: str) -> str:
    """The part that a file below `mlx_forget/` belongs to."""
    folder = file.partition("mlx_forget/")[2].partition("/")[0]
    return folder if folder in PARTS else "core"


def shares(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Percent of lines and of branches, by part."""
    sums = {part: Counter[str]() for part in PARTS}
    for file, found in report["files"].items():
        sums[part_of(file.replace("\\", "/"))].update({key: found["summary"][key] for key in KEYS})
    return {part: (_percent(sums[part], KEYS[:2]), _percent(sums[part], KEYS[2:])) for part in PARTS}


def _percent(sums: Mapping[str, int], keys: tuple[str, ...]) -> float:
    covered, whole = keys
    return 100 * sums[covered] / sums[whole] if sums[whole] else 0.0


def main(path: str, floor: str) -> int:
    found = shares(json.loads(Path(path).read_text(encoding="utf-8")))
    print(f"{'part':<10} {'lines':>7} {'branches':>9}")
    for part, (lines, branches) in found.items():
        print(f"{part:<10} {lines:>6.1f}% {branches:>8.1f}%")
    low = [part for part, both in found.items() if min(both) < float(floor)]
    if low:
        print(f"Below {floor}%: {', '.join(low)}")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
