"""The token store: a folder of memory-mapped Arrow files that says what is in it and proves it.

    STORE/manifest.json            schema version, tokenizer, splits, shards, checksums, fingerprint; written last
    STORE/tokenizer.model          the tokenizer that made it
    STORE/train-00000.arrow        one record batch, one column `token`; documents end with EOS
    STORE/train-00000.documents.arrow   one row a document: `start` (token offset in the shard), `num_bytes` (UTF-8)

A shard is one record batch, so a split's tokens are flat memory-mapped arrays and a row of any length is a slice. A row is cut when
it is read: the BOS id, then `row_length` consecutive tokens; rows never cross shards. The fingerprint covers content only: the same
tokens have the same fingerprint wherever and by however many workers they were written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from mlx_forget.errors import UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
TOKENS_PER_SHARD = 1 << 26

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
        out[:, 0] = self.bos_id
        first = 0
        for tokens in self.tokens:
            here = len(tokens) // row_length
            view = tokens[: here * row_length].reshape(here, row_length)
            if len(self.tokens) == 1:
                out[:, 1:] = view[rows]
                return
            inside = np.flatnonzero((rows >= first) & (rows < first + here))
            out[inside, 1:] = view[rows[inside] - first]
            first += here

    def documents(self, shard: int) -> tuple[Ids, Ids]:
        """(start, num_bytes) of each document of a shard, int64 each."""
        table = _open_batch(self.folder / self.shards[shard].documents)
        return table.column("start").to_numpy(), table.column("num_bytes").to_numpy()

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
    """An open store; `provenance` says how its tokens were generated, where they were."""

    folder: Path
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    source: str
    splits: Mapping[str, Split]
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
        UserError: no store there, an unknown schema, or a damaged file (named).
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except FileNotFoundError:
        raise UserError(f"{folder} is not a token store: it has no {MANIFEST}. Make one with: forget prepare") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / MANIFEST} is damaged: prepare the store again.") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"{folder} has store schema {version}, this version reads {SCHEMA_VERSION}: prepare the store again.")
    try:
        dtype = np.dtype(manifest["dtype"])
        splits = {}
        for name, shards in manifest["splits"].items():
            listed = tuple(Shard(**shard) for shard in shards)
            if verify:
                for shard in listed:
                    _verify(folder / shard.tokens, shard.tokens_sha256)
                    _verify(folder / shard.documents, shard.documents_sha256)
            arrays = tuple(_map_tokens(folder / shard.tokens, shard.num_tokens, dtype) for shard in listed)
            splits[name] = Split(name, listed, arrays, folder, manifest["bos_id"], manifest["eos_id"])
        if manifest["fingerprint"] != _fingerprint(manifest):
            raise UserError(f"{folder / MANIFEST} is damaged (its fingerprint does not match): prepare the store again.")
        return TokenStore(
            folder=folder,
            fingerprint=manifest["fingerprint"],
            tokenizer_hash=manifest["tokenizer_hash"],
            vocab_size=manifest["vocab_size"],
            source=manifest["source"],
            splits=splits,
            provenance=manifest.get("provenance", {}),
        )
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / MANIFEST} is damaged: prepare the store again.") from None


@dataclass
class StoreWriter:
    """Writes a store beside its place and moves it there when it is whole.

    Args:
        folder: where the store will be; must not exist.
        tokenizer_file: copied into the store.
        tokenizer_hash, vocab_size, bos_id, eos_id: of that tokenizer.
        source: what the tokens were made from, in words.
        provenance: how generated tokens were made, for the manifest; the fingerprint covers content only.
        dtype: defaults to the narrowest unsigned type that holds the vocabulary.
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
    _pending: dict[str, list[npt.NDArray[Any]]] = field(default_factory=dict, init=False)
    _pending_tokens: dict[str, int] = field(default_factory=dict, init=False)
    _starts: dict[str, list[tuple[int, int]]] = field(default_factory=dict, init=False)
    _shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.folder.exists():
            raise UserError(f"{self.folder} exists already: choose another place or remove it.")
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._aside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.part")
        shutil.rmtree(self._aside, ignore_errors=True)
        try:
            self._aside.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"Cannot write {self.folder}: {error.strerror}.") from None
        shutil.copyfile(self.tokenizer_file, self._aside / TOKENIZER_FILE)

    def add(self, split: str, tokens: npt.NDArray[np.integer[Any]], num_bytes: int, *, end: bool = True) -> None:
        """Append one document, int[num_tokens] without EOS, and the number of UTF-8 bytes it came from.

        Without `end` no EOS follows it: a sample of fixed length stays a row of that length.
        """
        size = len(tokens) + end
        if self._pending_tokens.get(split, 0) + size > self.tokens_per_shard:
            self._flush(split)
        self._starts.setdefault(split, []).append((self._pending_tokens.get(split, 0), num_bytes))
        document = np.empty(size, self.dtype)
        document[: len(tokens)] = tokens
        document[len(tokens) :] = self.eos_id
        self._pending.setdefault(split, []).append(document)
        self._pending_tokens[split] = self._pending_tokens.get(split, 0) + size

    def close(self) -> TokenStore:
        """Write what is left, then the manifest, and move the store to its place."""
        for split in list(self._pending):
            self._flush(split)
        manifest: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "tokenizer_hash": self.tokenizer_hash,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "dtype": self.dtype.name,
            "source": self.source,
            "splits": self._shards,
        }
        if self.provenance:
            manifest["provenance"] = dict(self.provenance)
        manifest["fingerprint"] = _fingerprint(manifest)
        (self._aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        os.rename(self._aside, self.folder)
        return open_store(self.folder, verify=False)

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self._aside, ignore_errors=True)

    def _flush(self, split: str) -> None:
        documents = self._pending.pop(split, [])
        if not documents:
            return
        starts = np.array(self._starts.pop(split), dtype=np.int64)
        tokens = np.concatenate(documents)
        stem = f"{split}-{len(self._shards.get(split, [])):05d}"
        metadata = {
            "schema_version": str(SCHEMA_VERSION),
            "tokenizer_hash": self.tokenizer_hash,
            "split": split,
        }
        names = {"tokens": f"{stem}.arrow", "documents": f"{stem}.documents.arrow"}
        _write_batch(self._aside / names["tokens"], {"token": tokens}, metadata)
        _write_batch(self._aside / names["documents"], {"start": starts[:, 0], "num_bytes": starts[:, 1]}, metadata)
        self._shards.setdefault(split, []).append(
            {
                **names,
                "num_tokens": len(tokens),
                "num_documents": len(documents),
                "tokens_sha256": _sha256(self._aside / names["tokens"]),
                "documents_sha256": _sha256(self._aside / names["documents"]),
            }
        )
        self._pending_tokens[split] = 0


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


def _map_tokens(path: Path, num_tokens: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    tokens: npt.NDArray[Any] = _open_batch(path).column("token").to_numpy(zero_copy_only=True)
    if tokens.dtype != dtype or len(tokens) != num_tokens:
        raise UserError(f"Store file {path} does not hold what the manifest says: prepare the store again.")
    return tokens
