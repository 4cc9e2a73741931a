"""Which runs of a sweep have no record yet: a sweep notes down what it plans, and figures say what they lack."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_forget.durable_files import held, make_folder, read_object, write_text
from mlx_forget.records import RECORD
from mlx_forget.runs.index import read_index
from mlx_forget.runs.verify import describe_begun

PLANNED = "planned.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Missing:
    """A run without a record.

    Args:
        folder: below the sweep's.
        title: what the sweep calls it; its folder where no sweep says.
        state: how far it got, or why it failed, in words.
    """

    folder: str
    title: str
    state: str


def note_planned(folder: Path, titles: Mapping[str, str]) -> None:
    """Keep the titles of runs by their folders below a sweep's, beside those of earlier sweeps into it."""
    if titles.items() <= planned(folder).items():
        return
    make_folder(folder)
    with held(folder / f".{PLANNED}.lock"):
        after = {**planned(folder), **titles}
        write_text(folder / PLANNED, json.dumps({"schema_version": SCHEMA_VERSION, "runs": after}, indent=1))


def planned(folder: Path) -> dict[str, str]:
    """The titles of all runs that sweeps planned into a folder; none where none is noted down, as in folders of earlier versions."""
    try:
        content = read_object(folder / PLANNED)
        runs = content["runs"] if content["schema_version"] == SCHEMA_VERSION else {}
        return {str(name): str(title) for name, title in runs.items()}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def missing_runs(folder: Path) -> list[Missing]:
    """The runs of a sweep's folder that were planned or begun and have no record, in the order in which they were planned."""
    titles = planned(folder)
    names = [name for name in titles if not os.path.exists(folder / name / RECORD)]
    begun = read_index(folder).begun
    names += [name for name in begun if name not in titles and name != "."]
    return [
        Missing(name, titles.get(name, name), describe_begun(folder / name) if name in begun else "not begun") for name in names
    ]


def missing_lines(missing: list[Missing]) -> list[str]:
    """What a reader of a figure should know of the runs that are not in it; nothing where none is missing."""
    if not missing:
        return []
    are = "1 run has not ended and is" if len(missing) == 1 else f"{len(missing):,} runs have not ended and are"
    return [
        f"{are} not in this figure; the same forget sweep goes on with what is left:",
        *(f"  {m.title}: {m.state}" for m in missing),
    ]
