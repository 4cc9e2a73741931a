"""A split of a store: its tokens as rows of any length, and its documents."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlx_forget.pipeline.store.arrow_files import open_batch

# Below this, a copy of each row costs less than one of all.
_FEW_ROWS = 4

Ids = npt.NDArray[np.int64]


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
    _views: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)

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
        ends, views = self._rows_of(row_length)
        out[:, 0] = self.bos_id
        if len(views) == 1:
            out[:, 1:] = views[0].take(rows, axis=0)
            return
        if len(rows) <= _FEW_ROWS:
            for target, row in zip(out, rows.tolist(), strict=True):
                number = int(ends.searchsorted(row, "right"))
                target[1:] = views[number][row - int(ends[number])]
            return
        # Gathered as they are and widened at once: widening into scattered rows takes twice as long.
        shard = ends.searchsorted(rows, "right")
        # The shard of the first row fills all places, those of others with some row of it that is then replaced.
        first = int(shard[0])
        gathered = views[first].take(rows - int(ends[first] - len(views[first])), axis=0, mode="clip")
        for number in np.unique(shard).tolist() if len(views) > 2 else [1 - first]:
            inside = (shard == number).nonzero()[0]
            if number != first and len(inside):
                gathered[inside] = views[number].take(rows[inside] - int(ends[number] - len(views[number])), axis=0)
        out[:, 1:] = gathered

    def _rows_of(self, row_length: int) -> tuple[Ids, list[npt.NDArray[np.unsignedinteger[Any]]]]:
        """Rows of each shard as a view, and where each shard's rows end, counted over all."""
        if row_length not in self._views:
            counts = [len(tokens) // row_length for tokens in self.tokens]
            views = [tokens[: num * row_length].reshape(num, row_length) for tokens, num in zip(self.tokens, counts, strict=True)]
            self._views[row_length] = (np.cumsum(counts, dtype=np.int64), views)
        cut: tuple[Ids, list[npt.NDArray[np.unsignedinteger[Any]]]] = self._views[row_length]
        return cut

    def documents(self, shard: int) -> tuple[Ids, Ids]:
        """(start, num_bytes) of each document of a shard, int64 each."""
        table = self._table(shard)
        return table.column("start").to_numpy(), table.column("num_bytes").to_numpy()

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
            self._documents[shard] = open_batch(self.folder / self.shards[shard].documents)
        return self._documents[shard]

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
