"""Run records: `record.json`, written once by atomic rename when a run has ended for good. Its existence means done."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_forget.durable_files import SEAL, is_whole, read_object, sealed, sync, write_text
from mlx_forget.errors import UserError

SCHEMA_VERSION = 1
RECORD = "record.json"
HISTORY = "history.arrows"
CONFIG = "config.yaml"
# The configuration of a run in its folder, as a sweep asked for it.
REQUESTED = "requested.yaml"
# Why a sweep gave a run up: an object with `reason`, there until the run is tried again.
FAILURE = "failure.json"

_VERSIONED = ("mlx-forget", "numpy", "pyarrow", "sentencepiece", "torch", "mlx")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its record."""

    folder: Path
    record: dict[str, Any]

    @property
    def history(self) -> Path:
        return self.folder / HISTORY


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `record.json`, aside first, with its checksum."""
    write_text(folder / RECORD, json.dumps(sealed(record), indent=1))
    sync(folder)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run folder, or None while the run has not ended.

    Raises:
        UserError: the record is damaged or of a newer schema.
    """
    path = folder / RECORD
    try:
        record = read_object(path)
        found = record["schema_version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        raise UserError(f"{path} is damaged: remove it, and the run can be resumed or repeated.") from None
    if not is_whole(record):
        raise UserError(f"{path} is damaged (its checksum does not match): remove it, and the run can be resumed or repeated.")
    if found != SCHEMA_VERSION:
        raise UserError(f"{path} has record schema {found}, this version reads {SCHEMA_VERSION}.")
    record.pop(SEAL, None)
    return record


def find_runs(folder: Path | str) -> Iterator[Run]:
    """Every finished run at a folder or at most two levels below it, in the order of their names; unfinished ones are passed over."""
    folder = Path(folder)
    for path in sorted([folder, *folder.glob("*"), *folder.glob("*/*")]):
        if (path / RECORD).is_file():
            record = read_record(path)
            if record is not None:
                yield Run(path, record)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that shape results, where installed."""
    found = {}
    for name in _VERSIONED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
