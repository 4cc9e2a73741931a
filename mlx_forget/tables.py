"""Read anyone's run table, or our own run folders, into the table that the laws are fitted to."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.errors import UserError, unknown
from mlx_forget.laws.forms import COLUMNS
from mlx_forget.laws.table import Table, missing_column

READERS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".arrows", ".feather")
RECORD_VERSION = 1


def read_table(path: str | os.PathLike[str], *, mapping: Mapping[str, str] | None = None, response: str = "loss") -> Table:
    """Read a table.

    Args:
        path: a CSV, TSV, JSONL, Parquet or Arrow file, or a folder of runs (anything above `record.json`
            files).
        mapping: {law column: column of the file, or a number for a constant}.
        response: what `loss` is when the source is run folders: "pretraining" or "target".

    Raises:
        UserError: no such file, unknown kind, no rows, a mapped column that is missing, or text where a
            number must be.
    """
    source = Path(path)
    if source.is_dir():
        rows = record_rows(source, response=response)
    elif not source.is_file():
        raise UserError(f"No table at {source}: give a CSV, Parquet, Arrow or JSONL file, or a folder of runs.")
    else:
        rows = _read_rows(source)
    if not rows:
        raise UserError(f"{source} has no rows.")
    return table_from_rows(rows, mapping=mapping)


def _read_rows(source: Path) -> list[dict[str, Any]]:
    kind = source.suffix.lower()
    if kind not in READERS:
        raise unknown("table format", kind, READERS)
    try:
        if kind in (".csv", ".tsv"):
            with open(source, newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream, delimiter="\t" if kind == ".tsv" else ",", skipinitialspace=True)
                return [{(k or "").strip(): v for k, v in row.items() if isinstance(v, str | None)} for row in reader]
        if kind in (".jsonl", ".ndjson", ".json"):
            text = source.read_text(encoding="utf-8")
            whole = json.loads(text) if kind == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
            if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
                raise UserError(f"{source} must hold one object per row.")
            return whole
        return _read_arrow(source, kind)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source} cannot be read as {kind[1:]}: {error}.") from None


def _read_arrow(source: Path, kind: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if kind == ".parquet":
            return list(pyarrow.parquet.read_table(source).to_pylist())
        with pa.memory_map(str(source)) as stream:
            try:
                return list(pa.ipc.open_file(stream).read_all().to_pylist())
            except pa.ArrowInvalid:
                stream.seek(0)
                return list(pa.ipc.open_stream(stream).read_all().to_pylist())
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{source} cannot be read as {kind[1:]}: {str(error).splitlines()[0]}.") from None


def table_from_rows(rows: Sequence[Mapping[str, Any]], *, mapping: Mapping[str, str] | None = None) -> Table:
    """The table of rows given as dictionaries: numbers become columns, text becomes labels, empty cells NaN.

    Raises:
        UserError: a mapped column does not exist, or a law column holds text.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name))
    raw = {name: [row.get(name) for row in rows] for name in names}
    for law_column, source in (mapping or {}).items():
        if law_column not in COLUMNS and law_column not in names:
            raise unknown("law column in --map", law_column, COLUMNS)
        if source in names:
            raw[law_column] = [row.get(source) for row in rows]
        elif (constant := _number(source)) is not None:
            raw[law_column] = [constant] * len(rows)
        else:
            raise missing_column(source, Table({name: np.empty(0) for name in names}))
    columns: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    run = None
    for name, values in raw.items():
        numbers = [_number(value) for value in values]
        if name == "run":
            run = np.asarray([str(value) for value in values])
        elif all(number is not None for number in numbers):
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
    return Table(columns, run=run, labels=labels)


def _number(value: Any) -> float | None:
    """The number in a cell: 1e-3, "1_000", "1%"; NaN where empty; None where there is text."""
    if value is None:
        return float("nan")
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
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


# ------------------------------------------------------------------------------------------------ our own
# runs


def record_paths(folder: Path) -> list[Path]:
    """Every `record.json` at or below a folder, sorted."""
    return sorted(folder.rglob("record.json"))


def record_rows(folder: Path, *, response: str) -> list[dict[str, Any]]:
    """One row per finished or stopped run below a folder; diverged runs are left out.

    Raises:
        UserError: no records, an unreadable one, or another schema version.
    """
    paths = record_paths(folder)
    if not paths:
        raise UserError(f"No record.json below {folder}: give a folder of finished runs, or a table file.")
    rows = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise UserError(f"{path} is not JSON: the run did not end for good; remove it or run it again.") from None
        if record.get("schema_version") != RECORD_VERSION:
            raise UserError(
                f"{path} has schema version {record.get('schema_version')!r} and this release reads "
                f"{RECORD_VERSION}: "
                f"run it again, or use the release that wrote it."
            )
        if record.get("status") in ("finished", "stopped") and (record.get("losses") or {}).get("best"):
            rows.append(record_row(record, response=response))
    if not rows:
        raise UserError(f"None of the {len(paths)} runs below {folder} finished: there is nothing to fit.")
    return rows


def record_row(record: Mapping[str, Any], *, response: str) -> dict[str, Any]:
    """The law columns of one record: N, D (unique target tokens), p as served, L0, loss at the best target
    validation loss.
    """
    sources: Mapping[str, Mapping[str, Any]] = record.get("data") or {}
    target = {name: source for name, source in sources.items() if source.get("role") == "target"}
    replayed = {name: source for name, source in sources.items() if source.get("role") in ("pretrain", "replay")}
    seen = _total(sources.values(), "tokens_seen")
    losses = record["losses"]
    best, start = losses["best"], losses.get("start") or {}
    return {
        "N": record.get("num_params"),
        "D": _total(target.values(), "unique_tokens"),
        "p": _total(replayed.values(), "tokens_seen") / seen if seen else float("nan"),
        "P": record.get("num_trainable_params", record.get("num_params")),
        "steps": best.get("step"),
        "L0": start.get("pretrain_val"),
        "L_ft": best.get("target_val"),
        "loss": best.get("target_val") if response == "target" else best.get("pretrain_val"),
        "run": record.get("run_id"),
        "domain": "+".join(sorted(target)),
        "backend": record.get("backend"),
        "seed": record.get("seed"),
    }


def _total(sources: Iterable[Mapping[str, Any]], key: str) -> float:
    return float(sum(source.get(key) or 0 for source in sources))
