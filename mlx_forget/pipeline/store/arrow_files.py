"""The Arrow files of a store: one record batch each, memory-mapped, with a checksum."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from mlx_forget.durable_files import sha256_of
from mlx_forget.errors import UserError


def check_file(path: Path, wanted: str) -> None:
    """Refuse a file that is not what its checksum says.

    Raises:
        UserError: it is damaged, or cannot be read.
    """
    try:
        found = sha256_of(path)
    except OSError as error:
        raise UserError(f"Store file {path} cannot be read ({error.strerror}): prepare the store again.") from None
    if found != wanted:
        raise UserError(f"Store file {path} is damaged (its checksum does not match): prepare the store again.")


def write_batch(path: Path, columns: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write columns as a file of one record batch."""
    # A reader of version 1 can read a file that has no new columns.
    version = "2" if {"loss_mask", "source"} & set(columns) else "1"
    metadata = {"schema_version": version, **metadata}
    batch = pa.RecordBatch.from_arrays([pa.array(c) for c in columns.values()], names=list(columns))
    schema = batch.schema.with_metadata(dict(metadata))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(dict(metadata)))


def open_batch(path: Path) -> pa.RecordBatch:
    """The record batch of a file, memory-mapped.

    Raises:
        UserError: no such file, or none that Arrow reads.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        batch.validate(full=True)
        # Names are decoded when they are asked for, which `validate` does not.
        _ = batch.schema.names
        return batch
    except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"Store file {path} cannot be read ({reason}): prepare the store again.") from None


def map_tokens(path: Path, num_tokens: int, dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
    """Tokens [T] of a shard, and its loss mask uint8[T] where it has one, without a copy.

    Raises:
        UserError: it does not hold `num_tokens` of `dtype`.
    """
    batch = open_batch(path)
    try:
        tokens: npt.NDArray[Any] = batch.column("token").to_numpy(zero_copy_only=True)
    except (KeyError, pa.ArrowException):
        tokens = np.empty(0, dtype)
    if tokens.dtype != dtype or len(tokens) != num_tokens:
        raise UserError(f"Store file {path} does not hold what the manifest says: prepare the store again.")
    masked = "loss_mask" in batch.schema.names
    return tokens, batch.column("loss_mask").to_numpy(zero_copy_only=True) if masked else None
