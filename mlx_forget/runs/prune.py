"""Freeing the disk of checkpoints that nobody goes on from; records, histories and configurations always stay."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_forget.checkpoint import STATE
from mlx_forget.durable_files import read_object
from mlx_forget.errors import UserError
from mlx_forget.records import CONFIG, REQUESTED
from mlx_forget.runs.index import RunIndex
from mlx_forget.runs.rows import Row
from mlx_forget.strict_yaml import read_yaml

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Prunable:
    """What can go, and what stays though it was asked for.

    Args:
        checkpoints: folders with their sizes in bytes.
        kept: why a run's checkpoints stay, by run folder.
    """

    checkpoints: dict[Path, int]
    kept: dict[Path, str]

    @property
    def num_bytes(self) -> int:
        return sum(self.checkpoints.values())


def find_prunable(index: RunIndex, rows: Sequence[Row], *, best_too: bool = False) -> Prunable:
    """The checkpoints of runs that have ended: all but `best`, which is what was learnt; with `best_too` every one.

    A run that another one of the folder started from, or is to go on from, keeps its checkpoints.
    """
    started_from = {row["base"] for row in index.rows} | {str(row.get("init")) for row in index.rows}
    started_from |= {name for folder in index.begun for name in _starts_of(index.root / folder)}
    places = [Path(name).expanduser().resolve() for name in started_from if name and os.path.exists(os.path.expanduser(name))]
    checkpoints, kept = dict[Path, int](), dict[Path, str]()
    for row in rows:
        folder = index.folder_of(row)
        found = [path for path in sorted((folder / CHECKPOINTS).glob("*")) if path.is_dir() and (best_too or path.name != "best")]
        if not found:
            continue
        if row["run"] in started_from or any(place.is_relative_to(folder.resolve()) for place in places):
            kept[folder] = "another run started from it"
        else:
            checkpoints |= {path: _size(path) for path in found}
    return Prunable(checkpoints, kept)


def prune(checkpoints: Sequence[Path]) -> None:
    """Remove checkpoint folders; a kill in between leaves none half there under its name."""
    for folder in checkpoints:
        assert folder.parent.name == CHECKPOINTS
        trash = folder.with_name(f".{folder.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        shutil.rmtree(trash)


def _starts_of(folder: Path) -> Iterator[str]:
    """The folders and run ids that a run without a record started from, as far as what it has left says so."""
    for name in (CONFIG, REQUESTED):
        with suppress(OSError, UserError, AttributeError):
            asked = read_yaml(folder / name)
            yield from (str(asked[key]) for key in ("init", "model") if asked.get(key))
    for state in folder.glob(f"{CHECKPOINTS}/*/{STATE}"):
        with suppress(OSError, ValueError, AttributeError):
            base = read_object(state).get("base") or {}
            yield from (str(base[key]) for key in ("run_id", "folder") if base.get(key))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
