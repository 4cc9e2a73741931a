"""The rows of one side of a mixture: some of a split in a fixed order, or a blend of several such subsets."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.pipeline.mixture import Member, permute, stream_key
from mlx_forget.pipeline.rows import Layout, Rows, check_not_empty
from mlx_forget.pipeline.shares import Split as ShareSplit
from mlx_forget.pipeline.store import Split

_STREAM_SUBSET = 5


@dataclass(frozen=True)
class RowSubset:
    """The first `num_rows` rows of a split in an order that no seed changes: smaller subsets are prefixes of larger ones."""

    split: Split
    row_length: int
    num_rows: int
    layout: Layout = "packed"
    mask_prompt: bool = True

    @classmethod
    def of_tokens(
        cls, split: Split, row_length: int, num_tokens: int | None, *, layout: Layout = "packed", mask_prompt: bool = True
    ) -> "RowSubset":
        """As many whole rows as `num_tokens` holds (padded rows: as many as have that many tokens to learn); None takes the whole split.

        Raises:
            UserError: the split has fewer tokens than asked for, or not one row.
        """
        rows = Rows(split, row_length, layout, mask_prompt)
        check_not_empty(rows)
        available = rows.num_rows
        if num_tokens is None:
            return cls(split, row_length, available, layout, mask_prompt)
        if rows.is_padded:
            cumulative = np.cumsum(rows.num_useful(_order(np.arange(available, dtype=np.int64), rows)))
            wanted, total = int(np.searchsorted(cumulative, num_tokens, "right")), int(cumulative[-1])
            missing = num_tokens - total
        else:
            wanted, total = num_tokens // row_length, available * row_length
            missing = (wanted - available) * row_length
        if missing > 0:
            raise UserError(
                f"Asked for {num_tokens:,} tokens, but the {split.name} split of {split.folder.name} has "
                f"{total:,} in rows of {row_length}, {missing:,} too few."
            )
        if wanted < 1:
            raise UserError(f"Asked for {num_tokens:,} tokens, which is less than one row of {row_length}: ask for more.")
        return cls(split, row_length, wanted, layout, mask_prompt)

    @cached_property
    def rows(self) -> Rows:
        """The rows of the whole split."""
        return Rows(self.split, self.row_length, self.layout, self.mask_prompt)

    @property
    def is_masked(self) -> bool:
        """Whether some labels do not count."""
        return self.rows.is_masked

    @property
    def has_segments(self) -> bool:
        return self.rows.has_segments

    @cached_property
    def num_useful(self) -> npt.NDArray[np.int64]:
        """Labels that count in each row of this subset, int64[num_rows]."""
        return self.rows.num_useful(self.place(np.arange(self.num_rows, dtype=np.int64)))

    @property
    def num_tokens(self) -> int:
        """Labels that count in all rows."""
        return int(self.num_useful.sum()) if self.is_masked else self.num_rows * self.row_length

    def place(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the rows at `index` int64[B] of this subset are in the split."""
        return _order(index, self.rows)

    def window_ids(self, num: int) -> npt.NDArray[np.int64]:
        """The rows that stand for this subset where only `num` can be read, fewer if there are fewer."""
        return np.arange(min(num, self.num_rows), dtype=np.int64)

    def read_placed(
        self,
        rows: npt.NDArray[np.int64],
        out: npt.NDArray[np.int32],
        loss_mask: npt.NDArray[np.uint8] | None = None,
        segment: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Fill `out` int32[B, 1 + row_length] with rows that `place` gave, and the masks that are given."""
        self.rows.read(rows, out, loss_mask, segment)


@dataclass(frozen=True)
class Blend:
    """Several subsets as one side of a mixture; their rows are numbered one after the other.

    Args:
        members: all with rows of the same length.
        shares: of each member, adding up to 1.
    """

    members: tuple[RowSubset, ...]
    shares: tuple[Fraction, ...]

    @property
    def row_length(self) -> int:
        return self.members[0].row_length

    @property
    def num_rows(self) -> int:
        return sum(member.num_rows for member in self.members)

    @property
    def num_tokens(self) -> int:
        return sum(member.num_tokens for member in self.members)

    @property
    def is_masked(self) -> bool:
        return any(member.is_masked for member in self.members)

    @property
    def has_segments(self) -> bool:
        return any(member.has_segments for member in self.members)

    @cached_property
    def num_useful(self) -> npt.NDArray[np.int64]:
        return np.concatenate([useful_labels(member) for member in self.members])

    def mixture_members(self) -> tuple[Member, ...]:
        """What a mixture needs to know of the members."""
        return tuple(Member(member.num_rows, share) for member, share in zip(self.members, self.shares, strict=True))

    def place(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        rows = np.empty_like(index)
        offset = split_offset = 0
        for member in self.members:
            own = (index >= offset) & (index < offset + member.num_rows)
            # Numbered on from the rows of the members before, as `read_placed` takes them.
            rows[own] = member.place(index[own] - offset) + split_offset
            offset, split_offset = offset + member.num_rows, split_offset + member.rows.num_rows
        return rows

    def window_ids(self, num: int) -> npt.NDArray[np.int64]:
        """Rows of every member by its share, as far as it has them."""
        phases = tuple(1 << 31 for _ in self.members[1:])
        member, within = ShareSplit(self.shares, phases).assign(np.arange(num, dtype=np.int64))
        sizes = np.array([one.num_rows for one in self.members])
        kept = within < sizes[member]
        offsets: npt.NDArray[np.int64] = np.cumsum(sizes) - sizes
        rows: npt.NDArray[np.int64] = offsets[member] + within
        return rows[kept]

    def read_placed(
        self,
        rows: npt.NDArray[np.int64],
        out: npt.NDArray[np.int32],
        loss_mask: npt.NDArray[np.uint8] | None = None,
        segment: npt.NDArray[np.int32] | None = None,
    ) -> None:
        offset = 0
        for member in self.members:
            here = member.rows.num_rows
            own = np.flatnonzero((rows >= offset) & (rows < offset + here))
            if len(own):
                read_some(member, rows[own] - offset, own, out, loss_mask, segment)
            offset += here


Side = RowSubset | Blend

# Tokens int32[B, T+1], loss mask uint8[B, T] or None where every label counts, segment int32[B, T] or None where a row is one.
MaskedRows = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8] | None, npt.NDArray[np.int32] | None]


def read_masked(side: Side, index: npt.NDArray[np.int64]) -> MaskedRows:
    """The rows at `index` int64[B] of a side, with the masks that it has."""
    shape = (len(index), side.row_length)
    tokens = np.empty((shape[0], shape[1] + 1), np.int32)
    loss_mask = np.empty(shape, np.uint8) if side.is_masked else None
    segment = np.empty(shape, np.int32) if side.has_segments else None
    side.read_placed(side.place(index), tokens, loss_mask, segment)
    return tokens, loss_mask, segment


def _order(index: npt.NDArray[np.int64], rows: Rows) -> npt.NDArray[np.int64]:
    return permute(index, rows.num_rows, stream_key(rows.length, _STREAM_SUBSET))


def useful_labels(side: Side) -> npt.NDArray[np.int64]:
    """Labels that count in each row of a side, int64[num_rows]."""
    return side.num_useful if side.is_masked else np.full(side.num_rows, side.row_length, np.int64)


def read_some(
    side: Side,
    rows: npt.NDArray[np.int64],
    where: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int32],
    loss_mask: npt.NDArray[np.uint8] | None,
    segment: npt.NDArray[np.int32] | None,
) -> None:
    """Read rows that `place` gave into the places `where` of a batch, and the masks that are given."""
    own_tokens = np.empty((len(rows), tokens.shape[1]), np.int32)
    own_mask = None if loss_mask is None else np.empty((len(rows), loss_mask.shape[1]), np.uint8)
    own_segment = None if segment is None else np.empty((len(rows), segment.shape[1]), np.int32)
    side.read_placed(rows, own_tokens, own_mask, own_segment)
    tokens[where] = own_tokens
    if loss_mask is not None and own_mask is not None:
        loss_mask[where] = own_mask
    if segment is not None and own_segment is not None:
        segment[where] = own_segment
