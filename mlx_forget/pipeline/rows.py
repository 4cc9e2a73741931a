"""How rows are cut from a split: packed, packed with documents kept apart, or one document each.

    packed      BOS and the next T tokens, across document ends; every token is in exactly one row (but for the last, partial one)
    documents   the same rows with a segment number for each input, so that no token sees another document; the end of a document
                stands for the beginning of the next one, and positions count from it
    padded      BOS and one document (a longer one goes on in further rows), then padding; for conversations, of which those that begin
                with BOS themselves have one
    truncated   the same, and a longer document ends with its first row
    whole       the same, and a longer document is left out

A label counts where its token is to be learnt; padding never counts. A padded row without one label that counts is left out.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError, unknown
from mlx_forget.pipeline.store import Split

Layout = Literal["packed", "documents", "padded", "truncated", "whole"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# One document a row, and what becomes of those that are longer, in words.
PADDED = {
    "padded": "go on in further rows",
    "truncated": "end with their first row",
    "whole": "are left out",
}

# Any valid id does: nothing is learnt from padding, and nothing before it sees it.
_PADDING = 0

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """The rows of a split, of a length and layout, by number.

    Args:
        length: T, tokens per row after BOS.
        mask_prompt: whether labels that the store marks as not to be learnt are left out of the loss.
    """

    split: Split
    length: int
    layout: Layout = "packed"
    mask_prompt: bool = True
    # Of each padded row: its shard, its first token there, its tokens, and how many of them count.
    _padded: tuple[Ids, Ids, Ids, Ids] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise unknown("rows", self.layout, LAYOUTS)
        object.__setattr__(self, "_padded", self._place_padded() if self.is_padded else (np.empty(0, np.int64),) * 4)

    @property
    def num_rows(self) -> int:
        return len(self._padded[0]) if self.is_padded else self.split.num_rows(self.length)

    @property
    def is_padded(self) -> bool:
        """Whether a row holds one document at most."""
        return self.layout in PADDED

    @property
    def num_long(self) -> int:
        """Documents that are longer than a row."""
        return sum(int((self.split.texts(number)[1] > self.length).sum()) for number in range(len(self.split.shards)))

    @property
    def is_masked(self) -> bool:
        """Whether some labels do not count."""
        return self.is_padded or (self.mask_prompt and self.split.has_loss_mask)

    @property
    def has_segments(self) -> bool:
        return self.layout == "documents"

    def num_useful(self, rows: Ids) -> Ids:
        """Labels that count in each of `rows`, int64[B]."""
        if self.is_padded:
            return self._padded[3][rows]
        if not self.is_masked:
            return np.full(len(rows), self.length, np.int64)
        useful = np.empty(len(rows), np.int64)
        for shard, inside, start in self._places(rows):
            # Sums of whole shards at once: rows are asked for by the thousand.
            mask = self.split.loss_mask(shard)
            sums = mask[: len(mask) // self.length * self.length].reshape(-1, self.length).sum(axis=1, dtype=np.int64)
            useful[inside] = sums[start // self.length]
        return useful

    def read(
        self,
        rows: Ids,
        tokens: npt.NDArray[np.int32],
        loss_mask: npt.NDArray[np.uint8] | None = None,
        segment: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Fill `tokens` int32[B, 1 + T] with `rows` int64[B], and where they are given `loss_mask` uint8[B, T] and `segment` int32[B, T]."""
        if self.is_padded:
            self._read_padded(rows, tokens, loss_mask)
            if segment is not None:
                segment[:] = 0
            return
        self.split.read_rows(rows, tokens)
        if loss_mask is not None:
            if self.is_masked:
                for shard, inside, start in self._places(rows):
                    mask = self.split.loss_masks[shard]
                    for row, first in zip(inside, start, strict=True):
                        loss_mask[row] = 1 if mask is None else mask[first : first + self.length]
            else:
                loss_mask[:] = 1
        if segment is not None:
            segment[:] = 0
            if self.has_segments:
                for shard, inside, start in self._places(rows):
                    self._read_segments(shard, inside, start, segment)

    def _places(self, rows: Ids) -> list[tuple[int, Ids, Ids]]:
        """For each shard: which of packed `rows` lie in it, and their first tokens there."""
        places, first = [], 0
        for number, shard in enumerate(self.split.shards):
            here = shard.num_tokens // self.length
            inside = np.flatnonzero((rows >= first) & (rows < first + here))
            if len(inside):
                places.append((number, inside, (rows[inside] - first) * self.length))
            first += here
        return places

    def _read_segments(self, shard: int, inside: Ids, start: Ids, segment: npt.NDArray[np.int32]) -> None:
        """A segment begins where the input is the last token of a document: input t is the token before label t."""
        documents, _ = self.split.documents(shard)
        low = np.searchsorted(documents, start, "right")
        high = np.searchsorted(documents, start + self.length - 1, "right")
        counts = high - low
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = np.zeros((len(inside), self.length), np.int32)
        row = np.repeat(np.arange(len(inside)), counts)
        begins[row, documents[np.repeat(low, counts) + within] - np.repeat(start, counts)] = 1
        segment[inside] = begins.cumsum(axis=1)

    def _place_padded(self) -> tuple[Ids, Ids, Ids, Ids]:
        parts: list[tuple[Ids, Ids, Ids, Ids]] = []
        for number in range(len(self.split.shards)):
            documents, size = self.split.texts(number)
            num = -(-size // self.length)
            if self.layout == "truncated":
                num = np.minimum(num, 1)
            elif self.layout == "whole":
                num = np.where(size > self.length, 0, num)
            within = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
            start = np.repeat(documents, num) + within * self.length
            length = np.minimum(self.length, np.repeat(size, num) - within * self.length)
            useful = length
            if self.mask_prompt and self.split.has_loss_mask:
                useful = _sums(self.split.loss_mask(number), start, length)
            kept = useful > 0
            parts.append((np.full(kept.sum(), number), start[kept], length[kept], useful[kept]))
        if not parts:
            return (np.empty(0, np.int64),) * 4
        shard_of, start, length, useful = (np.concatenate(column) for column in zip(*parts, strict=True))
        return shard_of, start, length, useful

    def _read_padded(self, rows: Ids, tokens: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8] | None) -> None:
        tokens[:, 0] = self.split.bos_id
        tokens[:, 1:] = _PADDING
        if loss_mask is not None:
            loss_mask[:] = 0
        masks = self.split.loss_masks if self.mask_prompt else (None,) * len(self.split.shards)
        shards, starts, lengths, _ = (column[rows].tolist() for column in self._padded)
        for row, (shard, start, length) in enumerate(zip(shards, starts, lengths, strict=True)):
            tokens[row, 1 : 1 + length] = self.split.tokens[shard][start : start + length]
            if loss_mask is not None:
                mask = masks[shard]
                loss_mask[row, :length] = 1 if mask is None else mask[start : start + length]


def _sums(mask: npt.NDArray[np.uint8], start: Ids, length: Ids) -> Ids:
    """Sums of the mask over [start, start + length), int64[n], for rows in their order that do not overlap."""
    if not len(start):
        return np.empty(0, np.int64)
    stop = start + length
    bounds = np.stack([start, np.minimum(stop, len(mask) - 1)], axis=1).ravel()
    sums: Ids = np.add.reduceat(mask, bounds, dtype=np.int64)[::2]
    # The last token of all cannot be a bound that is left out.
    if stop[-1] == len(mask) and length[-1] > 1:
        sums[-1] += mask[-1]
    return sums


def check_not_empty(rows: Rows) -> None:
    """Refuse a split without a row.

    Raises:
        UserError: how long its rows are.
    """
    if rows.num_rows < 1:
        raise UserError(
            f"The {rows.split.name} split of {rows.split.folder.name} is smaller than one row of {rows.length} tokens"
            + (" that has a token to learn" if rows.is_padded else "")
            + ": give more text, or a shorter --max-seq-length."
        )
