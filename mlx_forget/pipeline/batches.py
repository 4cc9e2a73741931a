"""Batch k of a run, computed directly: mixture positions to rows of memory-mapped splits to NumPy arrays."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mlx_forget.pipeline.mixture import Mixture, draw
from mlx_forget.pipeline.reference_rows import ReferenceRows
from mlx_forget.pipeline.sides import Blend, MaskedRows, Side, read_masked, read_some, useful_labels

_STREAM_REPLAY = 6
_ROWS_PLANNED_AHEAD = 16384
_TOKENS_READ_AHEAD = 1 << 18
# The number of the KL term in `Batch.term`.
_TERM_KL = 2


@dataclass(frozen=True)
class Batch:
    """The rows of one step, or a rank's share of them.

    Args:
        tokens: int32[B, T+1]; row[:-1] are inputs, row[1:] labels. Every row starts with BOS or a domain id.
        loss_mask: uint8[B, T], 1 where the label counts.
        segment: int32[B, T], document numbers that attention must not cross and within which positions count from 0, or None.
        term: uint8[B], the objective's term: 0 task, 1 next-token replay, 2 KL replay.
        source: uint8[B], 0 target, 1 pretraining or replay data.
        reference: what the frozen reference says about the rows of term 2, in their order, where it is kept; None computes it.
        step: its number in the stream, by which adapters draw what they drop.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    segment: npt.NDArray[np.int32] | None
    term: npt.NDArray[np.uint8]
    source: npt.NDArray[np.uint8]
    reference: ReferenceRows | None = None
    step: int = 0

    def reference_of(self, rows: npt.NDArray[np.int64]) -> ReferenceRows:
        """What is kept of the reference for some rows of term 2, by their numbers in the batch, int64[n]."""
        assert self.reference is not None
        return self.reference.rows((np.cumsum(self.term == _TERM_KL) - 1)[rows])


class ReplaySource(Protocol):
    """Rows that are added to each step, beside those of the mixture: `rows_per_step` over all ranks, all of one term."""

    @property
    def rows_per_step(self) -> int: ...

    @property
    def term(self) -> int: ...

    def tokens_before(self, step: int) -> tuple[int, int]:
        """Labels that counted in the first `step` steps, and those in different rows among them."""

    def read(self, step: int, *, rank: int, world_size: int) -> MaskedRows:
        """The rows of a step that belong to `rank`."""

    def read_reference(self, step: int, *, rank: int, world_size: int) -> ReferenceRows | None:
        """What is kept of the reference for those rows, or None."""


class KeptReference(Protocol):
    """What a frozen reference says about the rows of a side, by their numbers."""

    def read(self, index: npt.NDArray[np.int64]) -> ReferenceRows: ...


@dataclass(frozen=True)
class ReplayRows:
    """Replay rows from a store.

    Args:
        subset: the pool; it is served in a new order every epoch, and no row repeats within one. Of several sources each is served
            by its share, and has epochs of its own.
        rows_per_step, term: as `ReplaySource` says.
        seed: orders the pool.
        reference: what is kept of the frozen reference for the rows of the pool, or None.
    """

    subset: Side
    rows_per_step: int
    term: int
    seed: int
    reference: KeptReference | None = None

    def tokens_before(self, step: int) -> tuple[int, int]:
        rows = self._rows(np.arange(step * self.rows_per_step, dtype=np.int64))
        useful = useful_labels(self.subset)
        return int(useful[rows].sum()), int(useful[np.unique(rows)].sum())

    def read(self, step: int, *, rank: int, world_size: int) -> MaskedRows:
        return read_masked(self.subset, self._rows(self._positions(step)[rank::world_size]))

    def read_reference(self, step: int, *, rank: int, world_size: int) -> ReferenceRows | None:
        if self.reference is None:
            return None
        return self.reference.read(self._rows(self._positions(step)[rank::world_size]))

    def _positions(self, step: int) -> npt.NDArray[np.int64]:
        return np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step, dtype=np.int64)

    def _rows(self, position: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        members = self.subset.mixture_members() if isinstance(self.subset, Blend) else ()
        return draw(position, members, self.subset.num_rows, self.seed, _STREAM_REPLAY)


@dataclass
class BatchStream:
    """Every batch of a run, by number.

    Args:
        target: rows to learn.
        pretrain: rows to inject, or None when p is 0.
        mixture: where each row of the stream comes from.
        batch_size: rows per step over all ranks, without replay rows.
        num_steps: length of the run.
        replay: rows that are added to each step, or None.
    """

    target: Side
    pretrain: Side | None
    mixture: Mixture
    batch_size: int
    num_steps: int
    replay: ReplaySource | None = None
    _planned: tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None = field(default=None, init=False, repr=False)
    _ahead: int = field(default=1, init=False, repr=False)
    _block: "_Block | None" = field(default=None, init=False, repr=False)
    _useful_before: dict[int, tuple[int, int]] = field(default_factory=lambda: {0: (0, 0)}, init=False, repr=False)

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """The rows of batch `step` that belong to `rank`: every `world_size`-th, starting with its own number."""
        batch = self._mixed(step, rank, world_size)
        if self.replay is None:
            return batch
        share = {"rank": rank, "world_size": world_size}
        batch = _with_replay(batch, self.replay.read(step, **share), self.replay.term)
        kept = self.replay.read_reference(step, **share)
        return batch if kept is None else replace(batch, reference=kept)

    def _mixed(self, step: int, rank: int, world_size: int) -> Batch:
        """The rows of the mixture. Each batch of a block is handed out once: whoever takes it may write into it."""
        block = self._block
        if block is None or block.next_step != step or block.sharing != (rank, world_size):
            block = self._read_block(step, rank, world_size)
        num = block.num_rows
        here = slice(block.served * num, (block.served + 1) * num)
        block.served += 1
        block.next_step += 1
        self._block = block if block.served < block.num_steps else None
        return Batch(
            tokens=block.tokens[here],
            loss_mask=block.loss_mask[here],
            segment=None if block.segment is None else block.segment[here],
            term=np.zeros(num, np.uint8),
            source=block.source[here],
            step=step,
        )

    def _read_block(self, step: int, rank: int, world_size: int) -> "_Block":
        """The rows of a rank in this and, where it follows the one before, some more steps: much of a read's cost is per call."""
        sources, rows = self._plan(step)
        length = self.target.row_length
        per_step = len(range(rank, self.batch_size, world_size))
        num_steps = min(len(rows) // self.batch_size, max(1, _TOKENS_READ_AHEAD // max(1, per_step * length)))
        shape = (num_steps, self.batch_size)
        source = sources[: num_steps * self.batch_size].reshape(shape)[:, rank::world_size].flatten()
        rows = rows[: num_steps * self.batch_size].reshape(shape)[:, rank::world_size].reshape(-1)
        num = len(rows)
        tokens = np.empty((num, length + 1), np.int32)
        loss_mask = np.empty((num, length), np.uint8) if self._is_masked else np.ones((num, length), np.uint8)
        segment = np.empty((num, length), np.int32) if self._has_segments else None
        mask = loss_mask if self._is_masked else None
        injected = source.nonzero()[0]
        if len(injected) and self.pretrain is not None:
            # The side with more rows fills the block, and the other its places: fewer rows are copied twice.
            sides = (self.target, self.pretrain)
            places = [(source == 0).nonzero()[0], injected]
            large = int(len(injected) > num - len(injected))
            filled, small = rows.copy(), places[1 - large]
            filled[small] = rows[places[large][0]]
            sides[large].read_placed(filled, tokens, mask, segment)
            if len(small):
                read_some(sides[1 - large], rows[small], small, tokens, mask, segment)
        elif num:
            self.target.read_placed(rows, tokens, mask, segment)
        return _Block(step, (rank, world_size), num_steps, per_step, tokens, loss_mask, segment, source)

    def tokens_of_sources(self, step: int) -> tuple[list[int], list[int]]:
        """Labels that counted in the first `step` steps: of each target source, of each pretraining source."""
        num_rows = step * self.batch_size
        if not self._is_masked:
            target, pretrain = self.mixture.counts_before(num_rows)
            return [num * self.target.row_length for num in target], [num * self.target.row_length for num in pretrain]
        sides = [self.target] if self.pretrain is None else [self.target, self.pretrain]
        ends = [np.cumsum([one.num_rows for one in side.members] if isinstance(side, Blend) else [side.num_rows]) for side in sides]
        sums = [np.zeros(len(own)) for own in ends]
        for start in range(0, num_rows, _ROWS_PLANNED_AHEAD):
            source, rows = self.mixture.rows(start, min(num_rows, start + _ROWS_PLANNED_AHEAD))
            for number, side in enumerate(sides):
                own = rows[source == number]
                sums[number] += np.bincount(
                    np.searchsorted(ends[number], own, "right"), useful_labels(side)[own], len(ends[number])
                )
        counted = [[int(value) for value in side] for side in sums]
        return counted[0], counted[1] if len(counted) > 1 else [0]

    def tokens_before(self, step: int) -> tuple[int, int]:
        """Labels that counted in the first `step` steps: of the target, of the pretraining data."""
        if not self._is_masked:
            num_rows = step * self.batch_size
            injected = self.mixture.num_pretrain_before(num_rows) * self.target.row_length
            return num_rows * self.target.row_length - injected, injected
        known = max(done for done in self._useful_before if done <= step)
        target, pretrain = self._useful_before[known]
        block = max(1, _ROWS_PLANNED_AHEAD // self.batch_size)
        for start in range(known, step, block):
            source, rows = self.mixture.rows(start * self.batch_size, min(step, start + block) * self.batch_size)
            target += int(useful_labels(self.target)[rows[source == 0]].sum())
            if self.pretrain is not None:
                pretrain += int(useful_labels(self.pretrain)[rows[source == 1]].sum())
        self._useful_before[step] = (target, pretrain)
        return target, pretrain

    @cached_property
    def _has_segments(self) -> bool:
        return self.target.has_segments or (self.pretrain is not None and self.pretrain.has_segments)

    @cached_property
    def _is_masked(self) -> bool:
        return self.target.is_masked or (self.pretrain is not None and self.pretrain.is_masked)

    def _plan(self, step: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Source and place of each row of a batch and of some after it: many are planned at once, because a plan's cost is mostly per call."""
        if self._planned is None or not self._planned[0] <= step < self._planned[0] + len(self._planned[1]) // self.batch_size:
            # One batch where a run begins or resumes, which then comes at once, and more as it goes on from there.
            follows = self._planned is not None and step == self._planned[0] + len(self._planned[1]) // self.batch_size
            self._ahead = min(max(1, _ROWS_PLANNED_AHEAD // self.batch_size), 8 * self._ahead) if follows else 1
            stop = min(self.num_steps, step + self._ahead)
            source, rows = self.mixture.rows(step * self.batch_size, stop * self.batch_size)
            injected = source == 1
            placed = np.empty_like(rows)
            placed[~injected] = self.target.place(rows[~injected])
            if self.pretrain is not None:
                placed[injected] = self.pretrain.place(rows[injected])
            self._planned = (step, source, placed)
        first, source, rows = self._planned
        start = (step - first) * self.batch_size
        return source[start:], rows[start:]


@dataclass
class _Block:
    """The rows of some steps that were read at once, `num_rows` each, of which `served` were handed out."""

    next_step: int
    sharing: tuple[int, int]
    num_steps: int
    num_rows: int
    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    segment: npt.NDArray[np.int32] | None
    source: npt.NDArray[np.uint8]
    served: int = 0


def _with_replay(batch: Batch, replayed: MaskedRows, term: int) -> Batch:
    """A batch with replay rows spread evenly between its own, so that every micro-batch and every thread's share holds some."""
    tokens, loss_mask, segment = replayed
    num, added = len(batch.tokens), len(tokens)
    place = np.concatenate([(np.arange(num) + 0.5) / max(1, num), (np.arange(added) + 0.5) / max(1, added)])
    order = np.argsort(place, kind="stable")
    if loss_mask is None:
        loss_mask = np.ones((added, batch.loss_mask.shape[1]), np.uint8)
    both = None
    if batch.segment is not None or segment is not None:
        own = np.zeros_like(batch.tokens[:, 1:]) if batch.segment is None else batch.segment
        both = np.concatenate([own, np.zeros_like(tokens[:, 1:]) if segment is None else segment])[order]
    return Batch(
        tokens=np.concatenate([batch.tokens, tokens])[order],
        loss_mask=np.concatenate([batch.loss_mask, loss_mask])[order],
        segment=both,
        term=np.concatenate([batch.term, np.full(added, term, np.uint8)])[order],
        source=np.concatenate([batch.source, np.ones(added, np.uint8)])[order],
        step=batch.step,
    )
