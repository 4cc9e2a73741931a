"""Read anyone's run table, or our own run folders, into the table that the laws are fitted to."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlx_forget.errors import UserError
from mlx_forget.laws.table import Table
from mlx_forget.records import HISTORY, RECORD
from mlx_forget.runs.export import EXPORTED, as_written
from mlx_forget.runs.index import read_index
from mlx_forget.runs.rows import MARK, Row, fitted_rows
from mlx_forget.table_files import read_rows, table_from_rows


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
    whole = as_written(source, rows)
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
