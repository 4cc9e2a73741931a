"""Opening a store: its manifest, its splits, and the check of every byte."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.durable_files import is_whole, read_object
from mlx_forget.errors import UserError
from mlx_forget.pipeline.store.arrow_files import check_file, map_tokens
from mlx_forget.pipeline.store.manifest import MANIFEST, SCHEMA_VERSION, fingerprint_of
from mlx_forget.pipeline.store.split import Shard, Split, Tokens


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


def open_store(folder: Path | str, *, verify: bool = True) -> TokenStore:
    """Open a store; with `verify`, every byte is checked against its checksum first (about 1 GB/s).

    Raises:
        UserError: no store there, a schema of a newer version, or a damaged file (named).
    """
    folder = Path(folder)
    try:
        manifest = read_object(folder / MANIFEST)
        version = manifest["schema_version"]
    except FileNotFoundError:
        raise UserError(f"{folder} is not a token store: it has no {MANIFEST}. Make one with: forget prepare") from None
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder / MANIFEST} is damaged: prepare the store again.") from None
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise UserError(
            f"{folder} has store schema {version}, this version reads 1 to {SCHEMA_VERSION}: update mlx-forget, or prepare the store again."
        )
    try:
        if not is_whole(manifest):
            raise UserError(f"{folder / MANIFEST} is damaged (its checksum does not match): prepare the store again.")
        if manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError
        dtype = np.dtype(manifest["dtype"])
        if verify:
            for name, wanted in manifest.get("files", {}).items():
                check_file(folder / Path(name).name, wanted)
        splits = {}
        for name, shards in manifest["splits"].items():
            listed = tuple(Shard(**shard) for shard in shards)
            if any(Path(file).name != file for shard in listed for file in (shard.tokens, shard.documents)):
                raise UserError(f"{folder / MANIFEST} names files outside of the store, which is refused.")
            if verify:
                for shard in listed:
                    check_file(folder / shard.tokens, shard.tokens_sha256)
                    check_file(folder / shard.documents, shard.documents_sha256)
            mapped = [map_tokens(folder / shard.tokens, shard.num_tokens, dtype) for shard in listed]
            arrays, masks = tuple(tokens for tokens, _ in mapped), tuple(mask for _, mask in mapped)
            if verify:
                _check_ids(folder, manifest, arrays)
            splits[name] = Split(name, listed, arrays, folder, manifest["bos_id"], manifest["eos_id"], masks)
        if manifest["fingerprint"] != fingerprint_of(manifest):
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
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / MANIFEST} is damaged: prepare the store again.") from None


def _check_ids(folder: Path, manifest: Mapping[str, Any], arrays: tuple[Tokens, ...]) -> None:
    """Every id must be one of the vocabulary: a model would read outside of its table."""
    size = manifest["vocab_size"]
    most = max((int(tokens.max()) for tokens in arrays if len(tokens)), default=0)
    if not all(0 <= one < size for one in (most, manifest["bos_id"], manifest["eos_id"])):
        raise UserError(f"{folder} holds ids outside of its vocabulary of {size}: prepare the store again.")
