"""Batch k of a run, computed directly: mixture positions to rows of two memory-mapped splits to NumPy arrays."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.pipeline.mixture import Mixture, permute, stream_key
from mlx_forget.pipeline.store import Split

_STREAM_SUBSET = 5
_ROWS_PLANNED_AHEAD = 4096


@dataclass(frozen=True)
class Batch:
    """The rows of one step, or a rank's share of them.

    Args:
        tokens: int32[B, T+1]; row[:-1] are inputs, row[1:] labels. Every row starts with BOS or a domain id.
        loss_mask: uint8[B, T], 1 where the label counts.
        segment: int32[B, T], document numbers that attention must not cross and within which positions count from 0, or None.
        term: uint8[B], the objective's term: 0 task, 1 next-token replay, 2 KL replay.
        source: uint8[B], 0 target, 1 pretraining or replay data.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    segment: npt.NDArray[np.int32] | None
    term: npt.NDArray[np.uint8]
    source: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RowSubset:
    """The first `num_rows` rows of a split in an order that no seed changes: smaller subsets are prefixes of larger ones."""

    split: Split
    row_length: int
    num_rows: int

    @classmethod
    def of_tokens(cls, split: Split, row_length: int, num_tokens: int | None) -> "RowSubset":
        """As many whole rows as `num_tokens` holds; None takes the whole split.

        Raises:
            UserError: the split has fewer tokens than asked for, or not one row.
        """
        available = split.num_rows(row_length)
        wanted = available if num_tokens is None else num_tokens // row_length
        if wanted > available:
            raise UserError(
                f"Asked for {num_tokens:,} tokens, but the {split.name} split of {split.folder.name} has "
                f"{available * row_length:,} in rows of {row_length}, {(wanted - available) * row_length:,} too few."
            )
        if wanted < 1:
            raise UserError(f"The {split.name} split of {split.folder.name} is smaller than one row of {row_length} tokens.")
        return cls(split, row_length, wanted)

    def read(self, index: npt.NDArray[np.int64], out: npt.NDArray[np.int32]) -> None:
        """Fill `out` int32[B, 1 + row_length] with the rows at `index` int64[B] of this subset."""
        rows = permute(index, self.split.num_rows(self.row_length), stream_key(self.row_length, _STREAM_SUBSET))
        self.split.read_rows(rows, out)


@dataclass
class BatchStream:
    """Every batch of a run, by number.

    Args:
        target: rows to learn.
        pretrain: rows to inject, or None when p is 0.
        mixture: where each row of the stream comes from.
        batch_size: rows per step over all ranks.
        num_steps: length of the run.
    """

    target: RowSubset
    pretrain: RowSubset | None
    mixture: Mixture
    batch_size: int
    num_steps: int
    _planned: tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None = field(default=None, init=False, repr=False)

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of batch `step` that belong to `rank`: every `world_size`-th, starting with its own number."""
        source, rows = self._plan(step)
        source, rows = source[rank::world_size], rows[rank::world_size]
        length = self.target.row_length
        tokens = np.empty((len(rows), length + 1), np.int32)
        injected = np.flatnonzero(source)
        if self.pretrain is None or not len(injected):
            self.target.read(rows, tokens)
        else:
            for subset, where in ((self.target, np.flatnonzero(source == 0)), (self.pretrain, injected)):
                part = np.empty((len(where), length + 1), np.int32)
                subset.read(rows[where], part)
                tokens[where] = part
        return Batch(
            tokens=tokens,
            loss_mask=np.ones((len(rows), length), np.uint8),
            segment=None,
            term=np.zeros(len(rows), np.uint8),
            source=source,
        )

    def _plan(self, step: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Source and row of each row of a batch; many batches are planned at once, because a plan's cost is mostly per call."""
        if self._planned is None or not self._planned[0] <= step < self._planned[0] + len(self._planned[1]) // self.batch_size:
            stop = min(self.num_steps, step + max(1, _ROWS_PLANNED_AHEAD // self.batch_size))
            source, rows = self.mixture.rows(step * self.batch_size, stop * self.batch_size)
            self._planned = (step, source, rows)
        first, source, rows = self._planned
        here = slice((step - first) * self.batch_size, (step - first + 1) * self.batch_size)
        return source[here], rows[here]
