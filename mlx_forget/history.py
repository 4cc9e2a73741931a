"""The history of a run: one row an evaluation, in an Arrow stream that is readable while it grows and after a kill.

Losses are nats per token. `target_train_loss` and the two validation losses are read on frozen windows at that step; `batch_loss` is
the mean over the target rows of the batches since the row before. `*_windows` hold the mean loss of every window, so that any two
evaluations can be compared window by window. The columns about the start model (see `evaluate.compare_with_start`) are null where a
run was not asked for them.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc

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
    """The rows of a history file; an unfinished last row is left out, and a column that an older release did not write is null."""
    batches: list[pa.RecordBatch] = []
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
            while True:
                batches.append(reader.read_next_batch())
    except (StopIteration, pa.ArrowInvalid, OSError):
        # The stream of a killed or running writer ends without a mark, possibly within a row.
        pass
    if not batches:
        return SCHEMA.empty_table()
    table = pa.Table.from_batches(batches)
    columns = [
        table[name] if name in table.column_names else pa.nulls(len(table), SCHEMA.field(name).type) for name in SCHEMA.names
    ]
    return pa.table(columns, schema=SCHEMA)


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
            self._writer.write_batch(batch)
        self._flush()
        os.replace(aside, path)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row and hand it to the operating system."""
        self._writer.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
        self._flush()

    def close(self) -> None:
        self._writer.close()
        self._file.close()

    def __enter__(self) -> "HistoryWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
