"""Choosing runs: rows that meet a condition, in an order; and the run that a user names."""

import ast
import difflib
from collections.abc import Sequence
from pathlib import Path

from mlx_forget.errors import UserError, unknown
from mlx_forget.runs.index import RunIndex, read_index
from mlx_forget.runs.rows import Row

STATUSES = ("finished", "stopped", "diverged")
# How runs are found where only an id is given.
DEFAULT_FOLDER = Path("runs")


def select(rows: Sequence[Row], *, where: str | None = None, status: str | None = None, sort: str | None = None) -> list[Row]:
    """The rows that meet a condition, in an order; rows without a value come last.

    Args:
        where: comparisons of columns, as `forget fit --where` reads them: `N<=3.4e8 and method == "injection"`.
        status: one of STATUSES.
        sort: a column; `-column` puts the largest first.

    Raises:
        UserError: an unknown status or column, or a condition that cannot be read.
    """
    chosen = list(rows)
    if status is not None:
        if status not in STATUSES:
            raise unknown("status", status, STATUSES)
        chosen = [row for row in chosen if row["status"] == status]
    if where is not None and chosen:
        chosen = _where(chosen, where)
    if sort is not None and chosen:
        chosen = _sorted(chosen, sort)
    return chosen


def _where(rows: list[Row], condition: str) -> list[Row]:
    from mlx_forget.table_files import table_from_rows

    try:
        names = {node.id for node in ast.walk(ast.parse(condition.strip(), mode="eval")) if isinstance(node, ast.Name)}
    except (SyntaxError, MemoryError, RecursionError):
        names = set()
    wanted, known = sorted(names), columns_of(rows)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"The condition {condition!r} names {name!r}, which is no column of runs.{hint} Text is written in quotes, as in "
                f"'domain == \"{name}\"'; forget runs export writes every column."
            )
    # N tells how many rows there are where only names of runs are asked for, or nothing that can be read.
    wanted = ["N", *wanted]
    mask = table_from_rows([{name: row.get(name) for name in wanted} for row in rows]).where(condition)
    return [row for row, keep in zip(rows, mask.tolist(), strict=True) if keep]


def _sorted(rows: list[Row], key: str) -> list[Row]:
    name = key.removeprefix("-")
    known = columns_of(rows)
    if name not in known:
        raise unknown("column in --sort", name, known)
    having = [row for row in rows if row.get(name) is not None]
    as_text = len({isinstance(row[name], str) for row in having}) > 1
    having.sort(key=lambda row: str(row[name]) if as_text else row[name], reverse=key.startswith("-"))
    return having + [row for row in rows if row.get(name) is None]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every column of the rows, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def find_run(name: str, *, folder: Path | None = None) -> Path:
    """The folder of the run that a user names: a run folder, or the beginning of a run id below a folder.

    Args:
        folder: where to look for an id; default: `runs`.

    Raises:
        UserError: no such run, or several.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    root = folder or DEFAULT_FOLDER
    index: RunIndex | None = read_index(root) if root.is_dir() else None
    rows = index.rows if index is not None else []
    found = [row for row in rows if str(row["run"]).startswith(name)]
    if not found or index is None:
        raise UserError(
            f"There is no run folder {name}, and no run of that id below {root}: forget runs list FOLDER shows what there is."
        )
    if len(found) > 1:
        shown = ", ".join(str(index.folder_of(row)) for row in found[:4]) + (", ..." if len(found) > 4 else "")
        raise UserError(f"{len(found)} runs are called {name}... ({shown}): give more of the id, or the folder.")
    return index.folder_of(found[0])
