"""Freeing the disk of checkpoints that nobody goes on from; records, histories and configurations always stay."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_forget.runs.index import RunIndex
from mlx_forget.runs.rows import Row

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

    A run that another one of the folder started from keeps its checkpoints.
    """
    started_from = {row["base"] for row in index.rows} | {str(row.get("init")) for row in index.rows}
    checkpoints, kept = dict[Path, int](), dict[Path, str]()
    for row in rows:
        folder = index.folder_of(row)
        found = [path for path in sorted((folder / CHECKPOINTS).glob("*")) if path.is_dir() and (best_too or path.name != "best")]
        if not found:
            continue
        if row["run"] in started_from or any(Path(name).is_relative_to(folder) for name in started_from if name and name != "auto"):
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


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
