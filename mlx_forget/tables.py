"""Read anyone's run table, or our own run folders, into the table that the laws are fitted to."""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.errors import UserError, unknown
from mlx_forget.laws.forms import COLUMNS
from mlx_forget.laws.table import Table
from mlx_forget.records import HISTORY, RECORD
from mlx_forget.runs.export import EXPORTED
from mlx_forget.runs.index import read_index
from mlx_forget.runs.rows import MARK, Row, fitted_rows

READERS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".arrows", ".feather")
# Columns that name things, whatever their names look like: a run id of digits is no number.
NAMES = ("run", "base")
_MOST_ROWS = 10_000_000
# Python's integers have no end, and floats do.
_TOO_LARGE = 10**308


def read_table(
    path: str | os.PathLike[str],
    *,
    mapping: Mapping[str, str] | None = None,
    response: str = "loss",
    evaluations: bool = False,
    adapters: bool = True,
) -> Table:
    """Read a table.

    Args:
        path: a CSV, TSV, JSONL, Parquet or Arrow file, or a folder of runs (anything above `record.json` files).
        mapping: {law column: column of the file, or a number for a constant}.
        response: what `loss` is when the source is run folders: "pretraining", "target" or "forgetting" (cross-entropy to the start model).
        evaluations: of run folders, every evaluation after the start is a row, instead of each run's best.
        adapters: of run folders, whether runs that trained adapters are rows.

    Raises:
        UserError: no such file, unknown kind, no rows, no run that can be fitted, a mapped column that is missing, or text where a
            number must be.
    """
    source = Path(path)
    left_out: Mapping[str, tuple[str, ...]] = {}
    if source.is_dir():
        rows, left_out = read_runs(source, response=response, evaluations=evaluations, adapters=adapters)
    elif evaluations:
        raise UserError(f"--evaluations reads the histories of run folders, and {source} is no folder.")
    elif not source.is_file():
        raise UserError(f"No table at {source}: give a CSV, Parquet, Arrow or JSONL file, or a folder of runs.")
    else:
        rows = read_rows(source)
        if rows and MARK in rows[0]:
            rows, left_out = read_exported(source, rows, response=response, adapters=adapters)
    if not rows:
        raise UserError(f"{source} has no rows.")
    return replace(table_from_rows(rows, mapping=mapping), left_out=left_out)


def read_rows(source: Path) -> list[dict[str, Any]]:
    """The rows of a table file, cells as they stand there.

    Raises:
        UserError: an unknown kind of file, or one that cannot be read.
    """
    kind = source.suffix.lower()
    if kind not in READERS:
        raise unknown("table format", kind, READERS)
    try:
        if kind in (".csv", ".tsv"):
            with open(source, newline="", encoding="utf-8-sig") as stream:
                return _read_csv(source, csv.reader(stream, delimiter="\t" if kind == ".tsv" else ",", skipinitialspace=True))
        if kind in (".jsonl", ".ndjson", ".json"):
            text = source.read_text(encoding="utf-8")
            whole = json.loads(text) if kind == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
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
        for name in NAMES
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


def parse_share(text: str) -> float:
    """A share written as 0.01 or 1%.

    Raises:
        UserError: it is neither, or not in 0..1.
    """
    value = _number(text)
    if value is None or not 0 <= value <= 1:
        raise UserError(f"{text!r} is no share: write 0.01 or 1%.")
    return value


# ------------------------------------------------------------------------------------------------ our own runs


def read_runs(
    folder: Path, *, response: str, evaluations: bool = False, adapters: bool = True
) -> tuple[list[Row], dict[str, tuple[str, ...]]]:
    """One row per run below a folder that can be fitted, or one per evaluation, and the others: {reason: record files}.

    Raises:
        UserError: there is no record, or no run that can be fitted.
    """
    index = read_index(folder)
    if not index.num_records:
        raise UserError(f"No {RECORD} below {folder}: give a folder of finished runs, or a table file.")
    rows, others = fitted_rows(((row["folder"], row) for row in index.rows), response=response, adapters=adapters)
    left_out: dict[str, list[str]] = {}
    for name, problem in index.problems.items():
        left_out.setdefault(problem, []).append(name)
    left_out |= others
    reasons = {reason: tuple(str(folder / name / RECORD) for name in names) for reason, names in left_out.items()}
    if not rows:
        raise UserError(
            f"None of the {index.num_records} runs below {folder} can be fitted: {'; '.join(describe_left_out(reasons))}."
        )
    if evaluations:
        rows = [made for row in rows for made in evaluation_rows(row, index.folder_of(row), response=response)]
    return rows, reasons


def evaluation_rows(row: Row, folder: Path, *, response: str) -> list[Row]:
    """The law columns of every evaluation of a run but the one at its start, from the row of its record."""
    from mlx_forget.history import read_history

    column = {"target": "target_val_loss", "forgetting": "forgetting_ce"}.get(response, "pretrain_val_loss")
    return [
        {**row, "steps": found["step"], "L_ft": found["target_val_loss"], "loss": found[column]}
        for found in read_history(folder / HISTORY).to_pylist()
        if found["step"] > 0 and found[column] is not None
    ]


def read_exported(
    source: Path, rows: Sequence[Row], *, response: str, adapters: bool = True
) -> tuple[list[Row], dict[str, tuple[str, ...]]]:
    """The rows of a table that `forget runs export` wrote which can be fitted, and the others: {reason: runs}.

    Raises:
        UserError: no run of it can be fitted.
    """
    if lacking := [name for name in EXPORTED if name not in rows[0]]:
        raise UserError(f"{source} lacks {', '.join(lacking)}, which forget runs export writes: export the runs again.")
    whole = [{key: None if value == "" else value for key, value in row.items()} for row in rows]
    made, left_out = fitted_rows(((str(row["run"]), row) for row in whole), response=response, adapters=adapters)
    reasons = {reason: tuple(names) for reason, names in left_out.items()}
    if not made:
        raise UserError(f"None of the {len(rows)} runs of {source} can be fitted: {'; '.join(describe_left_out(reasons))}.")
    return made, reasons


def describe_left_out(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """What a table left out, one phrase per reason."""
    phrases = []
    for reason, sources in left_out.items():
        shown = ", ".join(str(source) for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
        phrases.append(f"{len(sources)} {reason} ({shown})")
    return phrases
