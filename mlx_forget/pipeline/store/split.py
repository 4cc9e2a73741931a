"""A split of a store: its tokens as rows of any length, and its documents."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlx_forget.errors import UserError
from mlx_forget.pipeline.store.arrow_files import open_batch

# Below this, a copy of each row costs less than one of all.
_FEW_ROWS = 4

Ids = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.unsignedinteger[Any]]


class _Cut(NamedTuple):
    """The tokens of all shards, cut into rows.

    Args:
        views: rows of each shard.
        ends: where each shard's rows end, counted over all.
        spanning: the row that begins at each place of the memory from the first shard to the last.
        shifts: for each shard, where a row begins there less its number times its length.
    """

    views: list[Tokens]
    ends: Ids
    spanning: npt.NDArray[np.void]
    shifts: Ids


class _Memory:
    """Rows in memory as NumPy's array interface describes them; the shards that own it are held."""

    def __init__(self, tokens: tuple[Tokens, ...], first: int, num_places: int, row_length: int) -> None:
        self._tokens = tokens
        size = tokens[0].itemsize
        self.__array_interface__ = {
            "data": (first, True),
            "shape": (num_places,),
            "strides": (size,),
            "typestr": f"|V{size * row_length}",
            "version": 3,
        }


def _cut(tokens: tuple[Tokens, ...], row_length: int) -> _Cut:
    """Shards are mapped anywhere, so one gather over all of them indexes the memory that spans them. What lies between two shards is not
    theirs, may not even exist, and is never read: a row's place is always inside its shard."""
    counts = np.array([len(shard) // row_length for shard in tokens], np.int64)
    views = [shard[: num * row_length].reshape(num, row_length) for shard, num in zip(tokens, counts.tolist(), strict=True)]
    ends = np.cumsum(counts, dtype=np.int64)
    size = tokens[0].itemsize
    begins = [shard.ctypes.data for shard in tokens]
    first, last = min(begins), max(begin + shard.nbytes for begin, shard in zip(begins, tokens, strict=True))
    assert all(shard.flags.c_contiguous and (begin - first) % size == 0 for begin, shard in zip(begins, tokens, strict=True))
    places = max(0, (last - first) // size - row_length + 1)
    spanning = np.asarray(_Memory(tokens, first, places, row_length))
    shifts = np.array([(begin - first) // size for begin in begins], np.int64) - (ends - counts) * row_length
    return _Cut(views, ends, spanning, shifts)


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest lists it."""

    tokens: str
    documents: str
    num_tokens: int
    num_documents: int
    tokens_sha256: str
    documents_sha256: str


@dataclass(frozen=True)
class Split:
    """The tokens of one split, memory-mapped, readable as rows."""

    name: str
    shards: tuple[Shard, ...]
    tokens: tuple[npt.NDArray[np.unsignedinteger[Any]], ...]
    folder: Path
    bos_id: int
    eos_id: int
    loss_masks: tuple[npt.NDArray[np.uint8] | None, ...] = ()
    _documents: dict[int, pa.RecordBatch] = field(default_factory=dict, compare=False, repr=False)
    _views: "dict[int, _Cut]" = field(default_factory=dict, compare=False, repr=False)

    @property
    def has_loss_mask(self) -> bool:
        """Whether some tokens are not to be learnt, such as the questions of a conversation."""
        return any(mask is not None for mask in self.loss_masks)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    def num_rows(self, row_length: int) -> int:
        """Whole rows of `row_length` tokens."""
        return sum(shard.num_tokens // row_length for shard in self.shards)

    def read_rows(self, rows: Ids, out: npt.NDArray[np.int32]) -> None:
        """Fill `out` int32[B, 1 + row_length] with BOS and the tokens of `rows` int64[B]."""
        row_length = out.shape[1] - 1
        cut = self._rows_of(row_length)
        out[:, 0] = self.bos_id
        # Gathered as they are and widened at once: widening into scattered rows takes twice as long.
        if len(cut.views) == 1:
            out[:, 1:] = cut.views[0].take(rows, axis=0)
        elif len(rows) <= _FEW_ROWS:
            for target, row in zip(out, rows.tolist(), strict=True):
                number = int(cut.ends.searchsorted(row, "right"))
                target[1:] = cut.views[number][row - int(cut.ends[number])]
        else:
            starts = rows * row_length
            starts += cut.shifts.take(cut.ends.searchsorted(rows, "right"))
            out[:, 1:] = cut.spanning[starts].view(self.tokens[0].dtype).reshape(-1, row_length)

    def _rows_of(self, row_length: int) -> "_Cut":
        if row_length not in self._views:
            self._views[row_length] = _cut(self.tokens, row_length)
        return self._views[row_length]

    def documents(self, shard: int) -> tuple[Ids, Ids]:
        """(start, num_bytes) of each document of a shard, int64 each."""
        table = self._table(shard)
        return table.column("start").to_numpy(), table.column("num_bytes").to_numpy()

    def texts(self, shard: int) -> tuple[Ids, Ids]:
        """(first token, number of tokens) of each document of a shard, int64 each, without a BOS that begins it: its row has one."""
        start, _ = self.documents(shard)
        num_tokens = self.shards[shard].num_tokens
        size: Ids = np.diff(start, append=num_tokens)
        # No text gives a BOS, so that only what a chat template writes is looked at.
        if self.has_loss_mask and len(start):
            has_own = (self.tokens[shard][np.minimum(start, num_tokens - 1)] == self.bos_id) & (size > 1)
            start, size = start + has_own, size - has_own
        return start, size

    def sources(self, shard: int) -> npt.NDArray[np.uint16]:
        """The source of each document of a shard, uint16: its place in the store's `sources`."""
        table = self._table(shard)
        if "source" not in table.schema.names:
            return np.zeros(table.num_rows, np.uint16)
        source: npt.NDArray[np.uint16] = table.column("source").to_numpy()
        return source

    def loss_mask(self, shard: int) -> npt.NDArray[np.uint8]:
        """1 for each token of a shard that is to be learnt, uint8."""
        mask = self.loss_masks[shard] if self.loss_masks else None
        return np.ones(self.shards[shard].num_tokens, np.uint8) if mask is None else mask

    def _table(self, shard: int) -> pa.RecordBatch:
        if shard not in self._documents:
            self._documents[shard] = self._checked(open_batch(self.folder / self.shards[shard].documents), self.shards[shard])
        return self._documents[shard]

    def _checked(self, documents: pa.RecordBatch, shard: Shard) -> pa.RecordBatch:
        """The documents of a shard, which follow each other within it."""
        names = set(documents.schema.names)
        columns = [documents.column(name) for name in ("start", "num_bytes") if name in names]
        ordered = False
        if len(columns) == 2 and all(column.type == pa.int64() and not column.null_count for column in columns):
            start = columns[0].to_numpy()
            ordered = (len(start) == shard.num_documents and not len(start)) or bool(
                start[0] == 0 and start[-1] < shard.num_tokens and (np.diff(start) >= 0).all() and len(start) == shard.num_documents
            )
        if not ordered:
            raise UserError(
                f"Store file {self.folder / shard.documents} does not hold what the manifest says: prepare the store again."
            )
        return documents

    def document(self, index: int) -> npt.NDArray[np.int32]:
        """The tokens of one document, without its EOS if it has one (samples are cut to length instead)."""
        for number, shard in enumerate(self.shards):
            if index < shard.num_documents:
                start, _ = self.documents(number)
                stop = start[index + 1] if index + 1 < shard.num_documents else shard.num_tokens
                tokens = self.tokens[number][start[index] : stop].astype(np.int32)
                return tokens[:-1] if tokens[-1] == self.eos_id else tokens
            index -= shard.num_documents
        raise IndexError(index)
