"""Is what runs have left whole? Records, histories and checkpoints, checked against each other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_forget.checkpoint import STATE, open_checkpoint
from mlx_forget.durable_files import read_object
from mlx_forget.errors import UserError
from mlx_forget.history import read_history
from mlx_forget.records import CONFIG, FAILURE, HISTORY, RECORD, read_record
from mlx_forget.runs.index import RunIndex
from mlx_forget.runs.selection import STATUSES

# The keys that scripts rely on.
REQUIRED = (
    "schema_version run_id status backend device config versions seed num_params num_non_embedding_params num_steps wall_seconds "
    "tokens_per_second peak_memory_bytes data losses forgetting_nats progress_lost"
).split()
_LOSSES = ("step", "target_train", "target_val", "pretrain_val")


def verify_runs(index: RunIndex, *, hashes: bool = True, on_run: Callable[[str], None] = lambda name: None) -> dict[str, list[str]]:
    """What is wrong with the runs of an index, by run folder; runs that were only begun are not asked.

    Args:
        hashes: check every file of every checkpoint against its checksum.
        on_run: called with each run's folder before it is checked.
    """
    found: dict[str, list[str]] = {}
    ids: dict[tuple[Any, Any], str] = {}
    for name in sorted([*index.problems, *(str(row["folder"]) for row in index.rows)]):
        on_run(name)
        problems = list(verify_run(index.root / name, hashes=hashes))
        if problems:
            found[name] = problems
    for row in index.rows:
        first = ids.setdefault((row["run"], row["backend"]), row["folder"])
        if first != row["folder"]:
            found.setdefault(row["folder"], []).append(f"is a copy of {first}: both have run id {row['run']}")
    return found


def verify_run(folder: Path, *, hashes: bool = True) -> Iterator[str]:
    """What is wrong with a run folder, in phrases."""
    try:
        record = read_record(folder)
    except UserError as error:
        yield str(error)
        return
    if record is None:
        yield f"{RECORD} is missing"
        return
    lacking = [key for key in REQUIRED if key not in record]
    if lacking:
        yield f"{RECORD} lacks {', '.join(lacking)}"
        return
    yield from _verify_contents(record)
    yield from _verify_history(folder / HISTORY, record)
    if not (folder / CONFIG).is_file():
        yield f"{CONFIG} is missing"
    if hashes:
        for checkpoint in sorted(folder.glob("checkpoints/[!.]*")):
            yield from _verify_checkpoint(checkpoint, record)


def _verify_contents(record: dict[str, Any]) -> Iterator[str]:
    if record["status"] not in STATUSES:
        yield f"{RECORD} has status {record['status']!r}, which is none of {', '.join(STATUSES)}"
    for name in ("start", "best", "end"):
        row = record["losses"].get(name) if isinstance(record["losses"], dict) else None
        if not isinstance(row, dict) or any(key not in row for key in _LOSSES):
            yield f"{RECORD} has no whole losses.{name}"
    sources = record["data"].values() if isinstance(record["data"], dict) else [None]
    if any(not isinstance(source, dict) or "role" not in source for source in sources):
        yield f"{RECORD} does not say which data was what"


def _verify_history(path: Path, record: dict[str, Any]) -> Iterator[str]:
    if not path.is_file():
        yield f"{HISTORY} is missing"
        return
    try:
        history = read_history(path)
    except UserError as error:
        yield str(error)
        return
    rows = {row["step"]: row for row in history.select(["step", "target_val_loss", "pretrain_val_loss"]).to_pylist()}
    if not rows:
        yield f"{HISTORY} cannot be read"
        return
    for name in ("start", "best", "end"):
        losses = record["losses"].get(name) if isinstance(record["losses"], dict) else None
        if not isinstance(losses, dict) or not isinstance(losses.get("step"), int):
            continue
        row = rows.get(losses["step"])
        if row is None:
            yield f"{HISTORY} has no evaluation at step {losses['step']}, which the record calls {name}"
        elif (row["target_val_loss"], row["pretrain_val_loss"]) != (losses.get("target_val"), losses.get("pretrain_val")):
            yield f"{HISTORY} and {RECORD} disagree about step {losses['step']}"


def _verify_checkpoint(folder: Path, record: dict[str, Any]) -> Iterator[str]:
    if not folder.is_dir():
        return
    try:
        state = open_checkpoint(folder).state
    except UserError as error:
        yield str(error)
        return
    if state.get("run_id") != record["run_id"]:
        yield f"checkpoints/{folder.name}/{STATE} is of run {state.get('run_id')}"


def describe_begun(folder: Path) -> str:
    """How far a run got that has no record, or why it failed."""
    from mlx_forget.progress import read_progress

    try:
        return f"failed: {read_object(folder / FAILURE)['reason']}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    progress = read_progress(folder)
    if progress is None:
        return "begun, without an evaluation yet"
    return f"begun, at step {progress['step']:,} of {progress['num_steps']:,} when last heard of"
