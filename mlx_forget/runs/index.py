"""Every run at or below a folder as flat rows, fast: rows are cached in the folder, and read anew where a record's size or time differs.

The cache is only a cache. It is one JSON file with a checksum, columns rather than rows, written aside and renamed, so that processes at
work side by side see one whole version or another; a folder that cannot be written, or a cache that cannot be read, costs time and nothing
else.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_forget.durable_files import is_whole, read_bytes, read_object
from mlx_forget.errors import UserError
from mlx_forget.records import CONFIG, HISTORY, RECORD, REQUESTED
from mlx_forget.runs import rows as rows_module
from mlx_forget.runs.rows import DAMAGED, Row, read_content

INDEX = ".forget-runs.json"
# Raised when rows hold something else than before.
INDEX_VERSION = 3
# Fewer records are read faster than an index is worth keeping.
LEAST_RECORDS = 100
# The index is written again once more than this share of the records had to be read.
STALE_SHARE = 0.02
# A record younger than this may be replaced within the same tick of the clock: it is not kept.
YOUNG_SECONDS = 2.0

# What a run folder has before its record.
_BEGUN = frozenset({REQUESTED, CONFIG, HISTORY, f".{RECORD}.part"})
_NOT_SEARCHED = frozenset({"checkpoints"})
# How a cache begins: with the checksum of all that follows it.
_HEAD, _DIGITS = b'{"checksum": "', 64


@dataclass(frozen=True)
class RunIndex:
    """What a folder holds.

    Args:
        root: the folder.
        rows: one per run that has ended, in the order of their folders; `folder` is the run's folder below the root ("." for itself).
        problems: why a record cannot be read, by run folder.
        begun: run folders without a record: running, interrupted or killed.
    """

    root: Path
    rows: list[Row]
    problems: dict[str, str]
    begun: list[str]

    def folder_of(self, row: Row) -> Path:
        return self.root / str(row["folder"])

    @property
    def num_records(self) -> int:
        return len(self.rows) + len(self.problems)


class _Seen(NamedTuple):
    """A record file: its run's folder below the root, its size in bytes and its time of modification in nanoseconds."""

    folder: str
    size: int
    mtime_ns: int


def read_index(folder: Path) -> RunIndex:
    """The index of a folder.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    seen, begun = _scan(folder)
    kept = _read_cache(folder / INDEX) if len(seen) >= LEAST_RECORDS else {}
    rows: list[Row] = []
    num_read = 0
    for record in seen:
        row = kept.get(record)
        if row is None:
            row = _read_row(folder / record.folder / RECORD)
            num_read += 1
        row["folder"] = record.folder
        rows.append(row)
    if len(seen) >= LEAST_RECORDS and num_read > STALE_SHARE * len(seen):
        _write_cache(folder / INDEX, seen, rows)
    problems = {row["folder"]: row["problem"] for row in rows if "problem" in row}
    return RunIndex(folder, [row for row in rows if "problem" not in row], problems, begun)


def _scan(root: Path) -> tuple[list[_Seen], list[str]]:
    """The record files at or below a folder, and the folders of runs that have none; a run's own folders are not searched."""
    seen: list[_Seen] = []
    begun: list[str] = []
    waiting = ["."]
    while waiting:
        here = waiting.pop()
        path = os.path.join(root, here) if here != "." else str(root)
        try:
            status = os.stat(f"{path}/{RECORD}")
        except OSError:
            pass
        else:
            seen.append(_Seen(here, status.st_size, status.st_mtime_ns))
            continue
        folders, has_run = [], False
        with os.scandir(path) as entries:
            for entry in entries:
                has_run |= entry.name in _BEGUN
                if entry.is_dir(follow_symlinks=False) and entry.name[0] != "." and entry.name not in _NOT_SEARCHED:
                    folders.append(entry.name if here == "." else f"{here}/{entry.name}")
        waiting.extend(folders)
        if has_run:
            begun.append(here)
    seen.sort(key=lambda record: record.folder)
    # A folder that holds finished runs is a sweep's, whatever else lies in it.
    above = {name for record in seen for name in _parents(record.folder)} if begun else set()
    return seen, sorted(name for name in begun if name not in above)


def _parents(folder: str) -> Iterator[str]:
    while folder not in (".", ""):
        folder = os.path.dirname(folder) or "."
        yield folder


def _read_row(path: Path) -> Row:
    try:
        content = read_object(path)
    except (ValueError, OSError):
        return {"problem": DAMAGED}
    if not is_whole(content):
        return {"problem": DAMAGED}
    row = read_content(content)
    return {"problem": row} if isinstance(row, str) else row


def _read_cache(path: Path) -> dict[_Seen, Row]:
    try:
        found = read_bytes(path)
        if found[len(_HEAD) : len(_HEAD) + _DIGITS] != _digest(found[len(_HEAD) + _DIGITS :]):
            return {}
        content = json.loads(found)
        if (content["index_version"], content["made_by"]) != (INDEX_VERSION, _maker()):
            return {}
        seen = [_Seen(*record) for record in zip(*content["records"], strict=True)]
        columns = {
            name: values if isinstance(values, list) else [values["all"]] * len(seen) for name, values in content["columns"].items()
        }
        if any(len(values) != len(seen) for values in columns.values()):
            return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    problems = columns.pop("problem", [None] * len(seen))
    rows = zip(*columns.values(), strict=True) if columns else [()] * len(seen)
    return {
        record: dict(zip(columns, row, strict=True)) if problem is None else {"problem": problem}
        for record, row, problem in zip(seen, rows, problems, strict=True)
    }


def _write_cache(path: Path, seen: list[_Seen], rows: list[Row]) -> None:
    oldest_young = time.time_ns() - int(YOUNG_SECONDS * 1e9)
    kept = [(record, row) for record, row in zip(seen, rows, strict=True) if record.mtime_ns < oldest_young]
    names = dict.fromkeys(name for _, row in kept for name in row if name != "folder")
    content = {
        "index_version": INDEX_VERSION,
        "made_by": _maker(),
        "records": [list(values) for values in zip(*((s.folder, s.size, s.mtime_ns) for s, _ in kept), strict=True)]
        or [[], [], []],
        "columns": {name: _folded([row.get(name) for _, row in kept]) for name in names},
    }
    rest = b'", ' + json.dumps(content).encode().removeprefix(b"{")
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(_HEAD + _digest(rest) + rest)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _maker() -> str:
    """The code that makes rows of records: another one may make other rows."""
    return hashlib.sha256(Path(rows_module.__file__).read_bytes()).hexdigest()[:16]


def _folded(values: list[Any]) -> list[Any] | dict[str, Any]:
    """A column, or the one value that it has throughout."""
    first = values[0]
    return {"all": first} if all(value is first or (value == first and type(value) is type(first)) for value in values) else values
