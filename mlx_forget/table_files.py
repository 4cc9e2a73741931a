"""Tables in anyone's files: their rows as they stand there, and the columns and labels that rows make."""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.errors import UserError, unknown
from mlx_forget.laws.forms import COLUMNS
from mlx_forget.laws.table import Table

_READERS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".arrows", ".feather")
# Columns that name things, whatever their names look like: a run id of digits is no number.
_NAMES = ("run", "base")
_MOST_ROWS = 10_000_000
# Python's integers have no end, and floats do.
_TOO_LARGE = 10**308


def read_rows(source: Path) -> list[dict[str, Any]]:
    """The rows of a table file, cells as they stand there.

    Raises:
        UserError: an unknown kind of file, or one that cannot be read.
    """
    kind = source.suffix.lower()
    if kind not in _READERS:
        raise unknown("table format", kind, _READERS)
    try:
        if kind in (".csv", ".tsv"):
            with open(source, newline="", encoding="utf-8-sig") as stream:
                return _read_csv(source, csv.reader(stream, delimiter="\t" if kind == ".tsv" else ",", skipinitialspace=True))
        if kind in (".jsonl", ".ndjson", ".json"):
            text = source.read_text(encoding="utf-8-sig")
            # Not `splitlines`: a string may hold other line ends as they are.
            whole = json.loads(text) if kind == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
            if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
                raise UserError(f"{source} must hold one object per row.")
            return whole
        return _read_arrow(source, kind)
    except (ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source} cannot be read as {kind[1:]}: {error}.") from None


def _read_csv(source: Path, reader: Iterable[list[str]]) -> list[dict[str, Any]]:
    rows = [row for row in reader if row]
    if not rows:
        return []
    header = [name.strip() for name in rows[0]]
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise UserError(f"{source} has the column {twice[0]!r} twice: rename or remove one.")
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise UserError(f"The columns of {source} are not separated by commas: save it with commas, or as .tsv with tabs.")
    long = [i for i, row in enumerate(rows) if len(row) > len(header)]
    if long:
        raise UserError(
            f"Row {long[0]} of {source} has {len(rows[long[0]])} cells for {len(header)} columns: is a comma too many in it?"
        )
    return [dict(zip(header, row, strict=False)) for row in rows[1:]]


def _read_arrow(source: Path, kind: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if kind == ".parquet":
            if (num_rows := pyarrow.parquet.read_metadata(source).num_rows) > _MOST_ROWS:
                raise UserError(f"{source} says that it has {num_rows:,} rows: a table of runs has at most {_MOST_ROWS:,}.")
            return list(pyarrow.parquet.read_table(source).to_pylist())
        with pa.memory_map(str(source)) as stream:
            try:
                table = pa.ipc.open_file(stream).read_all()
            except pa.ArrowInvalid:
                stream.seek(0)
                table = pa.ipc.open_stream(stream).read_all()
            # Offsets that lead out of the file would be followed.
            table.validate(full=True)
            return list(table.to_pylist())
    except (pa.ArrowException, OSError, OverflowError) as error:
        raise UserError(f"{source} cannot be read as {kind[1:]}: {(str(error) or 'no memory').splitlines()[0]}.") from None


def table_from_rows(rows: Sequence[Mapping[str, Any]], *, mapping: Mapping[str, str] | None = None) -> Table:
    """The table of rows given as dictionaries: numbers become columns, text becomes labels, empty cells NaN.

    Raises:
        UserError: a mapped column does not exist, or a law column holds text.
    """
    first = rows[0].keys() if rows else ()
    same = all(row.keys() == first for row in rows)
    names = [name for name in (first if same else dict.fromkeys(name for row in rows for name in row)) if name]
    raw = {name: [row.get(name) for row in rows] for name in names}
    for law_column, source in (mapping or {}).items():
        if law_column not in COLUMNS and law_column not in names:
            raise unknown("law column in --map", law_column, COLUMNS)
        if source in names:
            raw[law_column] = [row.get(source) for row in rows]
        elif (constant := _number(source)) is not None:
            raw[law_column] = [constant] * len(rows)
        else:
            raise UserError(f"--map {law_column}={source}: the table has no column {source!r}; it has {', '.join(names)}.")
    columns: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    # A row that names no run is one of its own.
    named = {
        name: np.asarray(
            [str(value) if value not in (None, "") else f"row {i}" * (name == "run") for i, value in enumerate(raw[name])]
        )
        for name in _NAMES
        if name in raw
    }
    for name, values in raw.items():
        if name in named:
            continue
        numbers = _numbers(values)
        if all(number is not None for number in numbers):
            columns[name] = np.asarray(numbers, dtype=np.float64)
        elif name in COLUMNS:
            bad = [i + 1 for i, number in enumerate(numbers) if number is None]
            shown = ", ".join(str(row) for row in bad[:8]) + (", ..." if len(bad) > 8 else "")
            raise UserError(
                f"Column {name!r} ({COLUMNS[name]}) must be numbers; "
                f"{'row' if len(bad) == 1 else 'rows'} {shown} "
                f"{'holds' if len(bad) == 1 else 'hold'} {str(values[bad[0] - 1])!r}: correct or "
                f"remove {'it' if len(bad) == 1 else 'them'}."
            )
        else:
            labels[name] = np.asarray(["" if value is None else str(value) for value in values])
    return Table(columns, run=named.get("run"), base=named.get("base"), labels=labels)


def _numbers(values: Sequence[Any]) -> Sequence[float | None]:
    """The number in each cell, or None where there is text; what a column holds throughout is read once."""
    if values.count(values[0]) == len(values):
        return [_number(values[0])] * len(values)
    if all(type(value) is float or (type(value) is int and abs(value) < _TOO_LARGE) for value in values):
        return values
    return [_number(value) for value in values]


def _number(value: Any) -> float | None:
    """The number in a cell: 1e-3, "1_000", "1%"; NaN where empty; None where there is text."""
    if value is None:
        return float("nan")
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return float(value) if abs(value) < _TOO_LARGE else (math.inf if value > 0 else -math.inf)
    if isinstance(value, float):
        return value
    text = str(value).strip().replace("_", "")
    if not text:
        return float("nan")
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
