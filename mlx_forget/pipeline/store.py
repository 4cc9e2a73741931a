"""The token store: a folder of memory-mapped Arrow files that says what is in it and proves it.

    STORE/manifest.json            schema version, tokenizer, splits, shards, checksums, fingerprint; written last
    STORE/tokenizer.model          the tokenizer that made it (or tokenizer.json)
    STORE/train-00000.arrow        one record batch: `token`, and `loss_mask` where not every token is to be learnt; documents end with EOS
    STORE/train-00000.documents.arrow   one row a document: `start` (token offset in the shard), `num_bytes` (UTF-8), and `source` where
                                        there are several

A shard is one record batch, so a split's tokens are flat memory-mapped arrays and a row of any length is a slice. A row is cut when
it is read: the BOS id, then `row_length` consecutive tokens; rows never cross shards. The fingerprint covers content only: the same
tokens have the same fingerprint wherever and by however many workers they were written.

A store is written beside its place (`.STORE.part`) and renamed when it is whole. With a key, what was written of it survives a kill: the
next writer with that key goes on after the last whole shard.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from mlx_forget.errors import UserError
from mlx_forget.pipeline.vocabularies import copy_tokenizer, tokenizer_in

# Version 2 adds loss masks and sources; a store that has neither is still written as version 1.
SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
TOKENS_PER_SHARD = 1 << 26
_JOURNAL = "journal.json"
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
            self._documents[shard] = _open_batch(self.folder / self.shards[shard].documents)
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


@dataclass(frozen=True)
class TokenStore:
    """An open store.

    Args:
        source: what it was made from, in words.
        sources: the names of its sources, in the order of their numbers.
        skipped: what could not be read, or was left out, by reason.
        part: (i, n, key) of a store that holds one part of several, else None.
        provenance: how its tokens were generated, where they were.
    """

    folder: Path
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    source: str
    splits: Mapping[str, Split]
    bos_id: int
    eos_id: int
    dtype: str
    sources: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    part: tuple[int, int, str] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def split(self, name: str) -> Split:
        """A split by name.

        Raises:
            UserError: the store has no such split.
        """
        if name not in self.splits:
            raise UserError(
                f"{self.source} has no {name} split (it has {', '.join(self.splits)}): its documents are too few to hold some out. "
                "Give more text, or a folder with train.jsonl and valid.jsonl."
            )
        return self.splits[name]


def open_store(folder: Path, *, verify: bool = True) -> TokenStore:
    """Open a store; with `verify`, every byte is checked against its checksum first (about 1 GB/s).

    Raises:
        UserError: no store there, a schema of a newer version, or a damaged file (named).
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except FileNotFoundError:
        raise UserError(f"{folder} is not a token store: it has no {MANIFEST}. Make one with: forget prepare") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / MANIFEST} is damaged: prepare the store again.") from None
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise UserError(
            f"{folder} has store schema {version}, this version reads 1 to {SCHEMA_VERSION}: update mlx-forget, or prepare the store again."
        )
    try:
        dtype = np.dtype(manifest["dtype"])
        splits = {}
        for name, shards in manifest["splits"].items():
            listed = tuple(Shard(**shard) for shard in shards)
            if verify:
                for shard in listed:
                    _verify(folder / shard.tokens, shard.tokens_sha256)
                    _verify(folder / shard.documents, shard.documents_sha256)
            mapped = [_map_tokens(folder / shard.tokens, shard.num_tokens, dtype) for shard in listed]
            arrays, masks = tuple(tokens for tokens, _ in mapped), tuple(mask for _, mask in mapped)
            splits[name] = Split(name, listed, arrays, folder, manifest["bos_id"], manifest["eos_id"], masks)
        if manifest["fingerprint"] != _fingerprint(manifest):
            raise UserError(f"{folder / MANIFEST} is damaged (its fingerprint does not match): prepare the store again.")
        return TokenStore(
            folder=folder,
            fingerprint=manifest["fingerprint"],
            tokenizer_hash=manifest["tokenizer_hash"],
            vocab_size=manifest["vocab_size"],
            source=manifest["source"],
            splits=splits,
            bos_id=manifest["bos_id"],
            eos_id=manifest["eos_id"],
            dtype=dtype.name,
            sources=tuple(manifest.get("sources", ())),
            skipped=manifest.get("skipped", {}),
            part=tuple(manifest["part"]) if manifest.get("part") else None,
            provenance=manifest.get("provenance", {}),
        )
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / MANIFEST} is damaged: prepare the store again.") from None


class _Buffer:
    """The shard that is being filled."""

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        # The system gives memory to these pages when they are written.
        self.tokens = np.empty(size, dtype)
        self.loss_mask = np.empty(size, np.uint8)
        self.used = 0
        self.columns = (array("q"), array("q"), array("H"))

    def __len__(self) -> int:
        return len(self.columns[0])

    def append(
        self,
        tokens: npt.NDArray[np.integer[Any]],
        last: Sequence[int],
        loss_mask: npt.NDArray[np.uint8] | None,
        num_bytes: int,
        source: int,
    ) -> None:
        middle = self.used + len(tokens)
        end = middle + len(last)
        self.tokens[self.used : middle] = tokens
        self.tokens[middle:end] = last
        self.loss_mask[self.used : end] = 1 if loss_mask is None else loss_mask
        for column, value in zip(self.columns, (self.used, num_bytes, source), strict=True):
            column.append(value)
        self.used = end


@dataclass
class StoreWriter:
    """Writes a store beside its place and moves it there when it is whole.

    Args:
        folder: where the store will be; must not exist.
        tokenizer_file: copied into the store.
        tokenizer_hash, vocab_size, bos_id, eos_id: of that tokenizer.
        source: what the tokens are made from, in words.
        sources: the names of the sources, where there are several.
        provenance: how generated tokens were made, for the manifest; the fingerprint covers content only.
        key: what the documents are a function of; with it, an interrupted writer is continued (see `num_written`).
        wait: wait for another process that writes the same store, instead of refusing.

    Raises:
        UserError: the store exists, cannot be written, or is being written.
    """

    folder: Path
    tokenizer_file: Path
    tokenizer_hash: str
    vocab_size: int
    bos_id: int
    eos_id: int
    source: str
    tokens_per_shard: int = TOKENS_PER_SHARD
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    key: str | None = None
    wait: bool = False
    _buffers: dict[str, _Buffer] = field(default_factory=dict, init=False)
    _shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict, init=False)
    _lock: int | None = field(default=None, init=False)
    _masked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._refuse_existing()
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        name = f".{self.folder.name}.part" if self.key is not None else f".{self.folder.name}.{os.getpid()}.part"
        self._aside = self.folder.with_name(name)
        try:
            if self.key is None:
                shutil.rmtree(self._aside, ignore_errors=True)
                self._aside.mkdir(parents=True)
            else:
                self._continue()
            copy_tokenizer(self.tokenizer_file, self._aside)
        except OSError as error:
            self.release()
            raise self._refusal(error) from None

    @property
    def num_written(self) -> dict[str, int]:
        """Documents in whole shards by split: the first ones that an interrupted writer was given, which must not be given again."""
        return {split: sum(shard["num_documents"] for shard in shards) for split, shards in self._shards.items()}

    @property
    def num_documents(self) -> int:
        """Documents so far, in whole shards and in those being filled."""
        return sum(self.num_written.values()) + sum(len(buffer) for buffer in self._buffers.values())

    def add(
        self,
        split: str,
        tokens: npt.NDArray[np.integer[Any]],
        num_bytes: int,
        *,
        loss_mask: npt.NDArray[np.uint8] | None = None,
        source: int = 0,
        end: bool = True,
    ) -> None:
        """Append one document.

        Args:
            tokens: int[num_tokens], without EOS.
            num_bytes: UTF-8 bytes that it came from.
            loss_mask: uint8[num_tokens + 1], 1 for tokens to learn, EOS included; None is all of them.
            source: its place in `sources`.
            end: whether EOS follows; a sample of fixed length stays a row of that length.
        """
        last = [self.eos_id] if end else []
        size = len(tokens) + len(last)
        buffer = self._buffers.get(split)
        if buffer is not None and buffer.used + size > self.tokens_per_shard:
            self._flush(split)
        if split not in self._buffers or len(self._buffers[split].tokens) < size:
            self._buffers[split] = _Buffer(max(size, self.tokens_per_shard), self.dtype)
        self._buffers[split].append(tokens, last, loss_mask, num_bytes, source)

    def close(self, *, skipped: Mapping[str, int] | None = None, part: tuple[int, int, str] | None = None) -> TokenStore:
        """Write what is left, then the manifest, and move the store to its place.

        Args:
            skipped: for the manifest: what could not be read or was left out, by reason.
            part: for the manifest: (i, n, key of the whole) where this is one part of several.
        """
        for split in list(self._buffers):
            self._flush(split)
        content = {
            "tokenizer_hash": self.tokenizer_hash,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "dtype": self.dtype.name,
            "source": self.source,
            "splits": self._shards,
        }
        more = {
            "sources": list(self.sources),
            "skipped": dict(skipped or {}),
            "part": part and list(part),
            "provenance": dict(self.provenance),
        }
        version = 2 if self.sources or self._masked else 1
        write_manifest(self._aside, content | {name: value for name, value in more.items() if value}, version=version)
        (self._aside / _JOURNAL).unlink(missing_ok=True)
        self._refuse_existing()
        os.rename(self._aside, self.folder)
        self.release()
        return open_store(self.folder, verify=False)

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self._aside, ignore_errors=True)
        self.release()

    def abandon(self) -> None:
        """Stop: what a later writer can go on from stays, anything else goes."""
        if self.key is None or not self._shards:
            self.discard()
        else:
            self.release()

    def release(self) -> None:
        """Let other processes write this store."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_existing(self) -> None:
        if self.folder.exists():
            raise UserError(f"{self.folder} exists already: choose another place or remove it.")

    def _continue(self) -> None:
        """Take the folder aside for this process, with the whole shards of an earlier one that had the same key."""
        self._acquire()
        try:
            journal = json.loads((self._aside / _JOURNAL).read_text(encoding="utf-8"))
            same = journal["key"] == self._journal_key()
            found, self._masked = (journal["shards"], journal["masked"]) if same else ({}, False)
        except (OSError, ValueError, KeyError, TypeError):
            found = {}
        for split, shards in found.items():
            whole = []
            for shard in shards:
                pairs = [(shard["tokens"], shard["tokens_sha256"]), (shard["documents"], shard["documents_sha256"])]
                if not all((self._aside / name).is_file() and _sha256(self._aside / name) == wanted for name, wanted in pairs):
                    break
                whole.append(shard)
            if whole:
                self._shards[split] = whole
        kept = {shard[kind] for shards in self._shards.values() for shard in shards for kind in ("tokens", "documents")}
        for path in self._aside.iterdir():
            if path.name not in kept:
                path.unlink()
        self._write_journal()

    def _acquire(self) -> None:
        """Lock the folder aside; the kernel frees the lock of a process that dies."""
        while True:
            self._aside.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._aside, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(lock)
                raise UserError(f"Another process is writing {self.folder}: wait for it, or choose another place.") from None
            try:
                same = os.stat(self._aside).st_ino == os.fstat(lock).st_ino
            except FileNotFoundError:
                same = False
            if same:
                self._lock = lock
                return
            # Whoever held it has moved it to its place, or away.
            os.close(lock)
            self._refuse_existing()

    def _journal_key(self) -> list[Any]:
        return [self.key, self.tokenizer_hash, self.tokens_per_shard, list(self.sources)]

    def _write_journal(self) -> None:
        part = self._aside / f"{_JOURNAL}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump({"key": self._journal_key(), "masked": self._masked, "shards": self._shards}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._aside / _JOURNAL)

    def _flush(self, split: str) -> None:
        buffer = self._buffers.pop(split)
        if not len(buffer):
            return
        tokens: dict[str, npt.NDArray[Any]] = {"token": buffer.tokens[: buffer.used]}
        has_loss_mask = not buffer.loss_mask[: buffer.used].all()
        if has_loss_mask:
            tokens["loss_mask"] = buffer.loss_mask[: buffer.used]
        start, num_bytes, source = (np.array(column) for column in buffer.columns)
        documents: dict[str, npt.NDArray[Any]] = {"start": start, "num_bytes": num_bytes}
        if self.sources:
            documents["source"] = source
        stem = f"{split}-{len(self._shards.get(split, [])):05d}"
        names = {"tokens": f"{stem}.arrow", "documents": f"{stem}.documents.arrow"}
        metadata = {"tokenizer_hash": self.tokenizer_hash, "split": split}
        try:
            _write_batch(self._aside / names["tokens"], tokens, metadata)
            _write_batch(self._aside / names["documents"], documents, metadata)
            shard = {
                **names,
                "num_tokens": buffer.used,
                "num_documents": len(buffer),
                "tokens_sha256": _sha256(self._aside / names["tokens"]),
                "documents_sha256": _sha256(self._aside / names["documents"]),
            }
            self._shards.setdefault(split, []).append(shard)
            self._masked = self._masked or has_loss_mask
            if self.key is not None:
                self._write_journal()
        except OSError as error:
            raise self._refusal(error) from None

    def _refusal(self, error: OSError) -> UserError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error)
        reason = "the disk is full: free some space, and the same command goes on" if full else error.strerror or str(error)
        return UserError(f"Cannot write {self.folder}: {reason}.")


def write_manifest(folder: Path, content: Mapping[str, Any], *, version: int) -> None:
    """Write the manifest of a store whose other files are there, with its fingerprint."""
    manifest = {"schema_version": version, **content}
    manifest["fingerprint"] = _fingerprint(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def merge_stores(parts: "list[TokenStore]", folder: Path) -> TokenStore:
    """One store from all parts of one preparation; their shards are linked where the file system allows it, else copied.

    Raises:
        UserError: the parts are not all of one preparation, or the place is taken.
    """
    numbers = sorted((part.part or (-1, 0, ""))[0] for part in parts)
    wholes = {(part.part or (0, 0, ""))[1:] for part in parts}
    count = next(iter(wholes))[0] if len(wholes) == 1 else 0
    if numbers != list(range(count)) or not count:
        have = ", ".join(
            f"{part.folder} ({part.part[0]}/{part.part[1]})" if part.part else f"{part.folder} (whole)" for part in parts
        )
        raise UserError(f"These are not all parts of one preparation, each once: {have}.")
    first = parts[0]
    if len({(part.tokenizer_hash, part.dtype, part.sources) for part in parts}) > 1:
        raise UserError("The parts were made with different tokenizers or from different sources: prepare them alike.")
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another place or remove it.")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        copy_tokenizer(tokenizer_in(first.folder), aside)
        splits: dict[str, list[dict[str, Any]]] = {}
        skipped: dict[str, int] = {}
        masked = False
        for part in sorted(parts, key=lambda part: part.part or (0, 0, "")):
            for reason, num in part.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + num
            for name, split in part.splits.items():
                masked = masked or split.has_loss_mask
                for shard in split.shards:
                    stem = f"{name}-{len(splits.get(name, [])):05d}"
                    names = {"tokens": f"{stem}.arrow", "documents": f"{stem}.documents.arrow"}
                    for kind, target in names.items():
                        _link(part.folder / getattr(shard, kind), aside / target)
                    splits.setdefault(name, []).append(asdict(shard) | names)
        content = {
            "tokenizer_hash": first.tokenizer_hash,
            "vocab_size": first.vocab_size,
            "bos_id": first.bos_id,
            "eos_id": first.eos_id,
            "dtype": first.dtype,
            "source": first.source,
            "splits": splits,
        }
        more = {"sources": list(first.sources), "skipped": skipped}
        version = 2 if first.sources or masked else 1
        write_manifest(aside, content | {name: value for name, value in more.items() if value}, version=version)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return open_store(folder, verify=False)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    content = {
        key: manifest[key] for key in ("schema_version", "tokenizer_hash", "vocab_size", "bos_id", "eos_id", "dtype", "splits")
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, wanted: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise UserError(f"Store file {path} cannot be read ({error.strerror}): prepare the store again.") from None
    if found != wanted:
        raise UserError(f"Store file {path} is damaged (its checksum does not match): prepare the store again.")


def _write_batch(path: Path, columns: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    # A reader of version 1 can read a file that has no new columns.
    version = "2" if {"loss_mask", "source"} & set(columns) else "1"
    metadata = {"schema_version": version, **metadata}
    batch = pa.RecordBatch.from_arrays([pa.array(c) for c in columns.values()], names=list(columns))
    schema = batch.schema.with_metadata(dict(metadata))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(dict(metadata)))


def _open_batch(path: Path) -> pa.RecordBatch:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Store file {path} cannot be read ({reason}): prepare the store again.") from None


def _map_tokens(path: Path, num_tokens: int, dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
    batch = _open_batch(path)
    tokens: npt.NDArray[Any] = batch.column("token").to_numpy(zero_copy_only=True)
    if tokens.dtype != dtype or len(tokens) != num_tokens:
        raise UserError(f"Store file {path} does not hold what the manifest says: prepare the store again.")
    masked = "loss_mask" in batch.schema.names
    return tokens, batch.column("loss_mask").to_numpy(zero_copy_only=True) if masked else None
