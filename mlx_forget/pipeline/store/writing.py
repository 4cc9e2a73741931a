"""Writing a store: shards that are filled, what survives a kill, and the last rename."""

import errno
import fcntl
import json
import os
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mlx_forget.durable_files import is_at, is_whole, read_object, sealed, sha256_of, sync, write_text
from mlx_forget.errors import UserError
from mlx_forget.pipeline.store.arrow_files import write_batch
from mlx_forget.pipeline.store.manifest import write_manifest
from mlx_forget.pipeline.store.reading import TokenStore, open_store
from mlx_forget.pipeline.vocabularies import copy_tokenizer

TOKENS_PER_SHARD = 1 << 26
_JOURNAL = "journal.json"


@dataclass(frozen=True)
class Lock:
    """A lock file beside the folder aside of a store, which the kernel frees when the process dies.

    A file that is written to, not the folder: network file systems lock such a file between machines, and a folder on one machine only.
    """

    path: Path
    file: IO[bytes]

    def release(self) -> None:
        """Let others in; the file goes while it is still held, and who waits for it makes a new one."""
        self.path.unlink(missing_ok=True)
        self.file.close()


def acquire(aside: Path, folder: Path, *, wait: bool = False) -> Lock:
    """Make and lock the folder aside of a store.

    Raises:
        UserError: another process has it, or has just finished the store.
    """
    path = aside.with_name(f"{aside.name}.lock")
    aside.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = Lock(path, path.open("wb"))
        try:
            fcntl.flock(lock.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            lock.file.close()
            raise UserError(f"Another process is writing {folder}: wait for it, or choose another place.") from None
        if not is_at(path, lock.file):
            # Whoever held it has released it, and with it the file.
            lock.file.close()
            continue
        if not folder.exists():
            aside.mkdir(exist_ok=True)
            return lock
        # It was finished before this process came to it.
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()
        refuse_existing(folder)


def refuse_existing(folder: Path) -> None:
    """A store is never overwritten.

    Raises:
        UserError: something is there.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another place or remove it.")


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
    _lock: Lock | None = field(default=None, init=False)
    _masked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        refuse_existing(self.folder)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._aside = self.folder.with_name(f".{self.folder.name}.part")
        try:
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
        try:
            write_manifest(self._aside, content | {name: value for name, value in more.items() if value}, version=version)
            (self._aside / _JOURNAL).unlink(missing_ok=True)
            refuse_existing(self.folder)
            os.rename(self._aside, self.folder)
            sync(self.folder.parent)
        except OSError as error:
            raise self._refusal(error) from None
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
            self._lock.release()
            self._lock = None

    def _continue(self) -> None:
        """Take the folder aside for this process, with the whole shards of an earlier one that had the same key."""
        self._lock = acquire(self._aside, self.folder, wait=self.wait)
        try:
            journal = read_object(self._aside / _JOURNAL)
            same = self.key is not None and is_whole(journal) and journal["key"] == self._journal_key()
            self._masked = same and bool(journal["masked"])
            self._shards = {split: self._whole_shards(split, shards) for split, shards in journal["shards"].items() if same}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            self._shards, self._masked = {}, False
        self._shards = {split: shards for split, shards in self._shards.items() if shards}
        kept = {shard[kind] for shards in self._shards.values() for shard in shards for kind in ("tokens", "documents")}
        for path in self._aside.iterdir():
            if path.name not in kept:
                path.unlink()
        if self.key is not None:
            self._write_journal()

    def _whole_shards(self, split: str, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The first shards of a split that are as a journal says."""
        whole: list[dict[str, Any]] = []
        if Path(split).name != split:
            raise ValueError
        for number, shard in enumerate(shards):
            names = _names(split, number)
            texts = {name: str(shard[name]) for name in ("tokens_sha256", "documents_sha256")}
            files = [(self._aside / names[kind], texts[f"{kind}_sha256"]) for kind in ("tokens", "documents")]
            if not all(path.is_file() and sha256_of(path) == wanted for path, wanted in files):
                break
            whole.append({**names, "num_tokens": int(shard["num_tokens"]), "num_documents": int(shard["num_documents"]), **texts})
        return whole

    def _journal_key(self) -> list[Any]:
        return [self.key, self.tokenizer_hash, self.tokens_per_shard, list(self.sources)]

    def _write_journal(self) -> None:
        content = {"key": self._journal_key(), "masked": self._masked, "shards": self._shards}
        write_text(self._aside / _JOURNAL, json.dumps(sealed(content)))

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
        names = _names(split, len(self._shards.get(split, [])))
        metadata = {"tokenizer_hash": self.tokenizer_hash, "split": split}
        try:
            for name, columns in ((names["tokens"], tokens), (names["documents"], documents)):
                write_batch(self._aside / name, columns, metadata)
                sync(self._aside / name)
            shard = {
                **names,
                "num_tokens": buffer.used,
                "num_documents": len(buffer),
                "tokens_sha256": sha256_of(self._aside / names["tokens"]),
                "documents_sha256": sha256_of(self._aside / names["documents"]),
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


def _names(split: str, number: int) -> dict[str, str]:
    """The files of a shard."""
    return {"tokens": f"{split}-{number:05d}.arrow", "documents": f"{split}-{number:05d}.documents.arrow"}
