"""The history of a run: one row an evaluation, in an Arrow stream that is readable while it grows and after a kill.

Losses are nats per token. `target_train_loss` and the two validation losses are read on frozen windows at that step; `batch_loss` is
the mean over the target rows of the batches since the row before. `*_windows` hold the mean loss of every window, so that any two
evaluations can be compared window by window. The columns about the start model (see `evaluate.compare_with_start`) are null where a
run was not asked for them.
"""

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc

from mlx_forget.durable_files import read_object
from mlx_forget.errors import UserError

# Beside every row: Arrow checks its own framing, and no value.
_SEAL = b"sha256"
_UNREADABLE = (pa.ArrowException, pa.ArrowInvalid)

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("tokens", pa.int64()),
        ("pretrain_tokens", pa.int64()),
        ("learning_rate", pa.float64()),
        ("batch_loss", pa.float64()),
        ("target_train_loss", pa.float64()),
        ("target_val_loss", pa.float64()),
        ("pretrain_val_loss", pa.float64()),
        ("target_val_windows", pa.list_(pa.float64())),
        ("pretrain_val_windows", pa.list_(pa.float64())),
        ("grad_norm", pa.float64()),
        ("num_skipped", pa.int64()),
        ("tokens_per_second", pa.float64()),
        ("wall_seconds", pa.float64()),
        ("forgetting_ce", pa.float64()),
        ("forgetting_ce_hard", pa.float64()),
        ("forgetting_kl", pa.float64()),
        ("start_agreement", pa.float64()),
    ],
    metadata={"schema_version": "1"},
)


def read_history(path: Path) -> pa.Table:
    """The rows of a history file; an unfinished last row is left out, and a column that an older release did not write is null.

    Raises:
        UserError: a row is not what was written, or the record beside it knows of more rows.
    """
    batches: list[pa.RecordBatch] = []
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
            while True:
                batch, sealed = reader.read_next_batch_with_custom_metadata()
                if sealed is not None and sealed.get(_SEAL) != _checksum(batch):
                    raise _damaged(path, f"row {len(batches) + 1} is not what was written")
                batches.append(batch)
    except (StopIteration, OSError, *_UNREADABLE):
        # The stream of a killed or running writer ends without a mark, possibly within a row.
        pass
    try:
        table = _with_all_columns(batches)
    except _UNREADABLE:
        raise _damaged(path, "its columns are not those of a history") from None
    if table.num_rows < (known := _num_recorded(path.parent)):
        raise _damaged(path, f"it holds {table.num_rows} of {known} rows")
    return table


def _with_all_columns(batches: list[pa.RecordBatch]) -> pa.Table:
    if not batches:
        return SCHEMA.empty_table()
    table = pa.Table.from_batches(batches)
    columns = [
        table[name] if name in table.column_names else pa.nulls(len(table), SCHEMA.field(name).type) for name in SCHEMA.names
    ]
    return pa.table(columns, schema=SCHEMA)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}): restore it, or remove it and go without the run's curves.")


def _checksum(batch: pa.RecordBatch) -> bytes:
    try:
        # Offsets that lead out of the file would be followed.
        batch.validate(full=True)
        rows = json.dumps(batch.to_pylist())
    except (UnicodeDecodeError, RecursionError, TypeError, *_UNREADABLE):
        return b""
    return hashlib.sha256(rows.encode()).hexdigest().encode()


def _num_recorded(folder: Path) -> int:
    """Rows that the record of a finished run counts in its history."""
    try:
        return int(read_object(folder / "record.json").get("history_rows", 0))
    except (OSError, ValueError, TypeError, OverflowError):
        return 0


class HistoryWriter:
    """Appends rows, flushing each; opened at a step, it keeps the rows up to that step and drops later ones."""

    def __init__(self, path: Path, *, keep_through: int | None = None) -> None:
        kept: list[pa.RecordBatch] = []
        if keep_through is not None and path.exists():
            table = read_history(path)
            kept = table.filter(pa.compute.less_equal(table["step"], keep_through)).to_batches()
        aside = path.with_name(f".{path.name}.part")
        self._file = aside.open("wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        for batch in kept:
            for number in range(batch.num_rows):
                self._write(batch.slice(number, 1))
        self._flush()
        os.replace(aside, path)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and hand it to the operating system."""
        self._write(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
        self._flush()

    def close(self) -> None:
        self._writer.close()
        self._file.close()

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch, custom_metadata={_SEAL: _checksum(batch)})

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
