"""Both models on every token of a text: one pass, row by row, into flat arrays."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.audit.statistics import Floats
from mlx_forget.audit.texts import Text
from mlx_forget.comparison import MEASURES
from mlx_forget.errors import RunFailed
from mlx_forget.trainer import Trainer

Ids = npt.NDArray[np.int64]

_ROWS_AT_ONCE = 64
# Rows are cut to the longest of their batch, rounded up: few different shapes, little padding.
_LENGTH_STEP = 16
# What a reading takes at its widest: measures, and the integers beside them.
BYTES_PER_TOKEN = len(MEASURES) * 8 + 8 * 8
# Its rows, padding included, and their mask.
BYTES_PER_PLACE = 4 + 1


@dataclass(frozen=True)
class Reading:
    """Everything that both models say about a text, token by token in the order of its documents.

    Args:
        text: what was read.
        label: int64[N], the token that was predicted; those that do not count are left out.
        document: int64[N], ascending.
        position: int64[N], how many tokens before it the model saw, BOS not counted.
        seen: bool[N], whether the label stood in its window before.
        measures: name to float64[N]: the fields of `Comparison`.
    """

    text: Text
    label: Ids
    document: Ids
    position: Ids
    seen: npt.NDArray[np.bool_]
    measures: dict[str, Floats]

    @property
    def num_documents(self) -> int:
        return len(self.text.documents)

    @property
    def change(self) -> Floats:
        """Loss after minus loss before, float64[N], in nats."""
        return self.measures["nll"] - self.measures["ref_nll"]

    def per_document(self, *columns: npt.NDArray[np.generic]) -> Floats:
        """Sums of columns over the tokens of each document, float64[D, len(columns)]."""
        num = self.num_documents
        return np.stack(
            [np.bincount(self.document, weights=column.astype(np.float64), minlength=num) for column in columns], axis=1
        )

    def per_group(self, group: Ids, num_groups: int, *columns: npt.NDArray[np.generic]) -> Floats:
        """Sums over the tokens of each document in each group, float64[D, num_groups, len(columns)]."""
        index, size = self.document * num_groups + group, self.num_documents * num_groups
        sums = [np.bincount(index, weights=column.astype(np.float64), minlength=size) for column in columns]
        shape = (self.num_documents, num_groups, len(columns))
        return np.asarray(np.stack(sums, axis=1).reshape(shape), np.float64)


def read(trainer: Trainer, text: Text, row_length: int, *, progress: Callable[[float], None] = lambda share: None) -> Reading:
    """Compare a trainer's model with its reference on a text.

    Args:
        trainer: has weights and a reference.
        row_length: labels per window, at most the model's context.
        progress: called with the share done.

    Raises:
        RunFailed: a model's losses are not finite.
    """
    windows = text.windows(row_length)
    mask = windows.mask
    order = np.argsort(-windows.num_labels, kind="stable")
    order = order[mask[order].any(axis=1)]
    # Rows of short documents are mostly padding: what is kept has no place for it.
    counts = mask.sum(axis=1, dtype=np.int64)
    firsts = np.cumsum(counts) - counts
    label, position, seen = np.empty(counts.sum(), np.int64), np.empty(counts.sum(), np.int64), np.empty(counts.sum(), bool)
    measures = {name: np.empty(counts.sum()) for name in MEASURES}
    for start in range(0, len(order), _ROWS_AT_ONCE):
        rows = order[start : start + _ROWS_AT_ONCE]
        length = min(row_length, -(-int(windows.num_labels[rows[0]]) // _LENGTH_STEP) * _LENGTH_STEP)
        tokens, here = windows.tokens[rows, : length + 1], mask[rows, :length].astype(bool)
        comparison = trainer.compare(tokens, mask[rows, :length])
        labels = tokens[:, 1:].astype(np.int64)
        own = counts[rows]
        place = np.repeat(firsts[rows] - (np.cumsum(own) - own), own) + np.arange(own.sum())
        label[place], position[place], seen[place] = labels[here], here.nonzero()[1], _seen_before(labels)[here]
        for name in MEASURES:
            measures[name][place] = getattr(comparison, name)[here]
        progress(min(1.0, (start + len(rows)) / len(order)))
    for name in ("nll", "ref_nll"):
        if not np.isfinite(measures[name]).all():
            which = "tuned" if name == "nll" else "base"
            raise RunFailed(
                f"The {which} model's losses on {text.name} are not all finite: its weights are damaged, or it diverged."
            )
    return Reading(text, label, np.repeat(windows.document, counts), position, seen, measures)


def _seen_before(labels: Ids) -> npt.NDArray[np.bool_]:
    """Where a label of int64[W, T] stood in its row before, bool[W, T]."""
    keys = labels + np.arange(len(labels))[:, None] * (int(labels.max(initial=0)) + 1)
    seen = np.ones(keys.size, bool)
    seen[np.unique(keys, return_index=True)[1]] = False
    return seen.reshape(labels.shape)
