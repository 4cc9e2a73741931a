"""Which rows of a table are one independent observation.

Checkpoints of one run share its noise, repeats of one configuration share what the law misses there, and runs that start from one
base model share that model. The levels nest, each one coarser than the one before; a bootstrap that draws rows where it should draw
base models promises intervals that are far too narrow.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import unknown
from mlx_forget.laws.forms import Law
from mlx_forget.laws.table import SHARES, Table

# Finest first. "auto" takes the coarsest level that leaves this many clusters. Of nine configurations a resample often lacks what tells
# the parameters apart (intervals ten times too wide); five base models are worth it, because what their runs share is large.
LEVELS = ("row", "run", "repeat", "base")
MIN_CLUSTERS = {"row": 0, "run": 0, "repeat": 20, "base": 5}
AUTO = "auto"
# Shares that differ by less than this, relative to themselves, are what one p was served as.
SAME = 0.05
_NOUNS = {"row": "rows", "run": "runs", "repeat": "configurations", "base": "base models"}


@dataclass(frozen=True)
class Clusters:
    """The independent observations of a table.

    Args:
        index: of each row's cluster, int[n], in 0..num-1.
        level: one of LEVELS.
        caution: what intervals from these clusters leave out, in a sentence, or "".
    """

    index: npt.NDArray[np.int64]
    level: str
    caution: str = ""

    @property
    def num(self) -> int:
        return int(self.index.max()) + 1 if len(self.index) else 0

    @property
    def is_clustered(self) -> bool:
        """Whether some cluster has more than one row."""
        return self.num < len(self.index)

    def describe(self) -> str:
        """`25 independent runs`."""
        return f"{self.num} independent {_NOUNS[self.level] if self.is_clustered else 'runs'}"


def cluster_rows(table: Table, law: Law, *, group: npt.NDArray[np.int64] | None = None, level: str = AUTO) -> Clusters:
    """The clusters of a table's rows.

    Args:
        table: its `run` labels tell checkpoints of one run, its `base` labels the base model of each row.
        law: rows that agree in all of its columns are repeats of one configuration; shares that differ a little are one p as it was served.
        group: of each row in a joint fit, int[n]; repeats share it too.
        level: one of LEVELS, or "auto": base models if there are 5, else configurations if there are 20, else runs.

    Raises:
        UserError: unknown level.
    """
    if level not in (AUTO, *LEVELS):
        raise unknown("cluster level", level, (AUTO, *LEVELS))
    by_level = {"row": np.arange(table.num_rows)}
    by_level["run"] = _joined(by_level["row"], table.run)
    # L0 is among the columns of a forgetting law, so two base models are never one configuration.
    columns = [_as_one_p(table.columns[name]) if name in SHARES else table.columns[name] for name in law.columns]
    design = np.stack([*columns, *([] if group is None else [group])], axis=1)
    by_level["repeat"] = _joined(by_level["run"], np.unique(design, axis=0, return_inverse=True)[1].reshape(-1))
    by_level["base"] = _joined(by_level["repeat"], table.base)
    if level != AUTO:
        return Clusters(by_level[level], level)
    counts = {name: int(index.max(initial=-1)) + 1 for name, index in by_level.items()}
    known = [name for name in LEVELS if name != "base" or table.base is not None]
    coarsest = next(name for name in reversed(known) if counts[name] >= MIN_CLUSTERS[name])
    # Named after the finest level with the same clusters: runs that are all of one row each are rows.
    chosen = next(name for name in LEVELS if counts[name] == counts[coarsest])
    cautions = []
    if table.base is not None and coarsest != "base":
        num = len(np.unique(table.base))
        cautions.append(
            f"these runs start from {num} base model{'' if num == 1 else 's'}: the intervals hold for "
            f"{'it' if num == 1 else 'these'} and leave out how much another one would differ"
        )
    if coarsest == "run" and counts["repeat"] < counts["run"]:
        cautions.append(
            f"the {counts['run']} runs are of {counts['repeat']} configurations, too few to draw from: repeats count as independent, and the "
            "intervals leave out what the law misses at a configuration"
        )
    caution = "; ".join(cautions)
    return Clusters(by_level[chosen], chosen, caution)


def share_levels(shares: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """The different shares, those together that lie within a twentieth of each other, as a share or as what it leaves."""
    ordered = np.unique(shares)
    apart = np.diff(ordered) > SAME * np.minimum(ordered, 1 - ordered)[1:]
    return np.split(ordered, np.flatnonzero(apart) + 1)


def _as_one_p(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The number of each share's level, [n]."""
    firsts = np.array([level[0] for level in share_levels(shares)])
    return np.searchsorted(firsts, shares, side="right").astype(np.float64)


def _joined(finer: npt.NDArray[np.int64], labels: npt.NDArray[np.generic] | None) -> npt.NDArray[np.int64]:
    """Clusters of which each holds whole finer clusters and all rows of a label: the components of both kinds of link."""
    if labels is None:
        return finer
    index = np.unique(labels, return_inverse=True)[1].reshape(-1)
    while True:
        # Everyone takes the smallest cluster number in its label, then in its finer cluster, until nothing moves.
        lowest = np.full(int(index.max(initial=0)) + 1, len(finer))
        np.minimum.at(lowest, index, finer)
        moved = lowest[index]
        within = np.full(int(finer.max(initial=0)) + 1, len(finer))
        np.minimum.at(within, finer, moved)
        moved = within[finer]
        if np.array_equal(moved, finer):
            return np.asarray(np.unique(finer, return_inverse=True)[1].reshape(-1), dtype=np.int64)
        finer = moved
