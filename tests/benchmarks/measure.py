"""How every benchmark here measures: the contenders take turns, and the median of the pairwise ratios is what is quoted."""

import statistics
import time
from collections.abc import Callable


def interleaved(contenders: dict[str, Callable[[], float]], *, rounds: int = 9) -> dict[str, list[float]]:
    """Call every contender once per round, in turn; each returns its figure (higher is better)."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            figures[name].append(measure())
    return figures


def rate(work: Callable[[], object], amount: float) -> float:
    """Amount of work per second of one call."""
    start = time.perf_counter()
    work()
    return amount / (time.perf_counter() - start)


def print_ratios(title: str, figures: dict[str, list[float]], *, baseline: str, unit: str) -> None:
    """The medians, and the median ratio of each contender to the baseline, round by round."""
    print(title)
    for name, values in figures.items():
        line = f"  {name:<44} median {statistics.median(values):>12,.1f} {unit}  (min {min(values):,.1f}, max {max(values):,.1f})"
        if name != baseline:
            ratios = [value / base for value, base in zip(values, figures[baseline], strict=True)]
            line += f"  ratio to {baseline}: {statistics.median(ratios):.3f}"
        print(line)
