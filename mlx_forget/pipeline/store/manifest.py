"""The manifest of a store, and the fingerprint of its content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_forget.durable_files import sealed, sha256_of, sync, write_text

MANIFEST = "manifest.json"
# Version 2 adds loss masks and sources; a store that has neither is still written as version 1.
SCHEMA_VERSION = 2


def write_manifest(folder: Path, content: Mapping[str, Any], *, version: int) -> None:
    """Write the manifest of a store whose other files are there, with its fingerprint and checksums."""
    manifest = {"schema_version": version, **content}
    manifest["fingerprint"] = fingerprint_of(manifest)
    tokenizer = [path for path in sorted(folder.iterdir()) if path.name.startswith("tokenizer")]
    manifest["files"] = {path.name: sha256_of(path) for path in tokenizer}
    for path in tokenizer:
        sync(path)
    write_text(folder / MANIFEST, json.dumps(sealed(manifest), indent=1))


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """A hash of what the tokens are, wherever and however they were written."""
    content = {
        key: manifest[key] for key in ("schema_version", "tokenizer_hash", "vocab_size", "bos_id", "eos_id", "dtype", "splits")
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
