"""Files that are whole or absent, on the disk when they are said to be, and that show it when a bit of them has changed."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "checksum"


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file, aside first: a reader sees all of the old one or all of the new one, even after a power cut."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum as one more key."""
    return {**content, SEAL: _checksum(content)}


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is what was sealed; one that never was counts as whole."""
    return SEAL not in content or content[SEAL] == _checksum({key: value for key, value in content.items() if key != SEAL})


def _checksum(content: Mapping[str, Any]) -> str:
    # As it will be read: tuples are lists then, and all keys strings.
    read = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()
