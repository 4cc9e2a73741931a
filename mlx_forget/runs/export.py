"""Tables of runs for other tools: the law columns, every other column of a row, and where each run lies."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from mlx_forget.durable_files import replacing
from mlx_forget.errors import UserError, unknown
from mlx_forget.runs.rows import LAW_COLUMNS, MARK, NUMBERS, TEXTS, Row
from mlx_forget.runs.selection import columns_of

FORMATS = (".parquet", ".csv")
# What every export has, and those who read one count on.
EXPORTED = (*LAW_COLUMNS, "status", "forgetting_nats", MARK)


def check_format(path: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        UserError: neither Parquet nor CSV, or no such folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise unknown("table format", path.suffix or path.name, FORMATS)
    if path.is_dir() or not os.access(_existing(path.parent), os.W_OK):
        raise UserError(f"Cannot write {path}.")


def export(rows: Sequence[Row], path: Path, *, root: Path, provenance: dict[str, Any]) -> list[str]:
    """Write rows, one per run, aside first; `forget fit` reads the file as it reads the folders themselves.

    Args:
        path: ends in .parquet or .csv.
        root: the folder that holds the runs; places in it are written as seen from there, such as the run that a stage started from.
        provenance: what a reader should know; in the metadata of a Parquet file under `mlx_forget`, and beside a CSV nowhere.

    Returns:
        The columns: the law columns first.

    Raises:
        UserError: there are no rows, or the file cannot be written.
    """
    if not rows:
        raise UserError("No run is left to export: loosen --where or --status.")
    check_format(path)
    inside = tuple(f"{place}{os.sep}" for place in {str(root.absolute()), str(root.resolve())})
    rows = [{name: _seen_from(value, inside) for name, value in row.items()} for row in rows]
    rest = [name for name in columns_of(rows) if name not in LAW_COLUMNS and name not in ("folder", MARK)]
    names = [*LAW_COLUMNS, *rest, "folder", MARK]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if path.suffix.lower() == ".csv":
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(names)
            writer.writerows([row.get(name) for name in names] for row in rows)
            text.detach()
        else:
            _write_parquet(rows, names, file, provenance)
    return names


def _seen_from(value: Any, inside: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        for prefix in inside:
            value = value.removeprefix(prefix)
    return value


def read_export(path: Path) -> list[Row]:
    """The rows of an exported table.

    Raises:
        UserError: it is none.
    """
    from mlx_forget.table_files import read_rows

    rows = read_rows(path) if path.suffix.lower() in FORMATS else []
    if not rows or any(name not in rows[0] for name in EXPORTED):
        raise UserError(
            f"{path} was not written by forget runs export, which alone knows what a run was: give that, or a folder of runs; "
            "`forget fit TABLE --plot FOLDER` draws a table of your own."
        )
    return as_written(path, rows)


def as_written(path: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows of an exported table with their cells as they were exported: those of a CSV are read as text.

    Raises:
        UserError: text where a number belongs.
    """
    if path.suffix.lower() == ".csv" and rows:
        columns = {name: _parsed([row.get(name) for row in rows], name) for name in rows[0]}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for number, row in enumerate(rows, start=1):
        for name in NUMBERS:
            if row.get(name) is not None and not isinstance(row[name], int | float):
                raise UserError(f"Row {number} of {path} has {row[name]!r} as {name}, which is a number: correct or remove it.")
    return list(rows)


def _parsed(cells: Sequence[Any], name: str) -> list[Any]:
    """The values of a column of a CSV: numbers where every cell is one, and nothing where a cell is empty."""
    cells = [None if cell == "" else cell for cell in cells]
    if name in (*TEXTS, "p_asked"):
        return cells
    for convert in (int, float):
        try:
            return [None if cell is None else convert(cell) for cell in cells]
        except ValueError:
            continue
    return [{"True": True, "False": False}.get(cell, cell) for cell in cells]


def _write_parquet(rows: Sequence[Row], names: Sequence[str], file: IO[bytes], provenance: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array([None if value is None else str(value) for value in values])
    table = pa.table(columns).replace_schema_metadata({"mlx_forget": json.dumps(provenance)})
    pyarrow.parquet.write_table(table, file)


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
