"""A table of runs in memory: numeric columns, the run and base model of each row, and the checks that come before a fit."""

import ast
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.laws.forms import COLUMNS, Array, Law

POSITIVE = frozenset({"N", "D", "P", "steps", "R", "loss"})
SHARES = frozenset({"p", "r", "R"})
# What others call our columns, surest first; a part of the name is enough.
USUAL_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "N": ("param", "model_size", "size"),
        "D": ("unique_tokens", "train_tokens", "token", "_d", "data"),
        "p": ("replay", "inject", "mix", "ratio", "share", "frac"),
        "r": ("ratio", "share", "frac", "mix"),
        "R": ("ratio", "share", "frac", "mix"),
        "P": ("trainable", "param"),
        "steps": ("step", "iter"),
        "L0": ("l0", "base_loss", "initial", "start", "before", "base"),
        "L_ft": ("finetun", "target", "ft_loss"),
        "loss": ("final_loss", "val_loss", "loss", "nll"),
        "run": ("run", "name", "id"),
        "base": ("base", "init", "checkpoint"),
    }
)
# With more of the rows than this below their L0, there is no forgetting to fit.
MOST_BELOW = 0.8
# Names of columns in a message.
MOST_LISTED = 24
# Below these, a count is almost surely in thousands, millions or billions.
SMALLEST = {"N": 3e4, "D": 2e3, "P": 500.0}


@dataclass(frozen=True)
class Table:
    """Rows of measurements.

    Args:
        columns: numeric columns, float64[n], under the law names (`COLUMNS`) or any other.
        run: the run of each row, any labels of length n; None makes every row its own run.
        base: the base model that each row's run started from, any labels of length n; None where unknown.
        labels: text columns of length n, for grouping and hold-outs.
        rows: the row numbers to report to the user, int[n]; None counts from 1.
        left_out: what the source held and this table does not, {reason: sources}.
    """

    columns: Mapping[str, Array]
    run: npt.NDArray[np.generic] | None = None
    base: npt.NDArray[np.generic] | None = None
    labels: Mapping[str, npt.NDArray[np.str_]] = field(default_factory=dict)
    rows: npt.NDArray[np.int64] | None = None
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        *,
        run: Iterable[object] | None = None,
        base: Iterable[object] | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
        **columns: npt.ArrayLike,
    ) -> "Table":
        """A table from arrays: `Table.of(N=..., D=..., loss=...)`; scalars are broadcast."""
        length = max(np.size(np.asarray(values)) for values in columns.values())
        made = {name: np.array(np.broadcast_to(np.asarray(values, float), (length,))) for name, values in columns.items()}
        return cls(
            made,
            run=None if run is None else np.asarray([str(value) for value in run]),
            base=None if base is None else np.asarray([str(value) for value in base]),
            labels={name: np.asarray(values, dtype=np.str_) for name, values in (labels or {}).items()},
        )

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    @property
    def row_numbers(self) -> npt.NDArray[np.int64]:
        return np.arange(1, self.num_rows + 1) if self.rows is None else self.rows

    def select(self, mask: npt.NDArray[np.bool_]) -> "Table":
        """The rows where mask [n] is true; they keep their row numbers."""
        return Table(
            {name: values[mask] for name, values in self.columns.items()},
            run=None if self.run is None else self.run[mask],
            base=None if self.base is None else self.base[mask],
            labels={name: values[mask] for name, values in self.labels.items()},
            rows=self.row_numbers[mask],
            left_out=self.left_out,
        )

    def text(self, column: str) -> npt.NDArray[np.str_] | None:
        """A text column [n], the run and the base model among them; None where there is none of that name."""
        if column in self.labels:
            return self.labels[column]
        known = {"run": self.run, "base": self.base}.get(column)
        return None if known is None else known.astype(np.str_)

    def groups(self, column: str) -> dict[str, "Table"]:
        """One table per value of a label column (or numeric column), sorted.

        Raises:
            UserError: there is no such column.
        """
        values = self.text(column)
        if values is None:
            if column not in self.columns:
                raise missing_columns([column], self)
            values = np.asarray([f"{value:g}" for value in self.columns[column]])
        return {str(value): self.select(values == value) for value in sorted(set(values.tolist()))}

    def where(self, expression: str) -> npt.NDArray[np.bool_]:
        """The rows [n] where an expression such as `N<=3.4e8 and D<=3e6` or `domain == "math"` holds.

        Raises:
            UserError: the expression is no comparison of columns with numbers or text.
        """
        try:
            tree = ast.parse(expression.strip(), mode="eval").body
        # Thousands of brackets are too deep for Python's parser.
        except (SyntaxError, MemoryError, RecursionError):
            raise UserError(f"Cannot read the condition {expression!r}: write it like 'N<=3.4e8 and D<=3e6'.") from None
        return _mask(tree, self, expression)


def missing_columns(names: Sequence[str], table: Table) -> UserError:
    """The error for columns that the table does not have: which exist, and the nearest to each."""
    meant = {name: _nearest(name, table) for name in names}
    lacking = " and none ".join(f"{name!r}" + (f" ({COLUMNS[name]})" if name in COLUMNS else "") for name in names)
    options = " ".join(f"--map {name}={near or 'COLUMN'}" for name, near in meant.items())
    guesses = [repr(near) for near in meant.values() if near]
    way_out = f" Name {'it' if len(names) == 1 else 'them'} with {options}."
    if len(guesses) == len(names):
        way_out = f" {'Is it' if len(names) == 1 else 'Are they'} {', '.join(guesses)}? Then add {options}."
    shown = _listed([*table.columns, *table.labels])
    return UserError(f"The table has no numeric column {lacking}; it has {shown or 'none'}.{way_out}")


def _nearest(name: str, table: Table) -> str | None:
    known = [*table.columns, *table.labels]
    nearest = [column for column in known if column.lower() == name.lower()][:1]
    nearest = nearest or [column for usual in USUAL_NAMES.get(name, ()) for column in known if usual in column.lower()][:1]
    nearest = nearest or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return nearest[0] if nearest else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_LISTED]) + ", ..." * (len(names) > MOST_LISTED)


def _mask(node: ast.expr, table: Table, expression: str) -> npt.NDArray[np.bool_]:
    if isinstance(node, ast.BoolOp):
        masks = [_mask(value, table, expression) for value in node.values]
        combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return np.asarray(combine.reduce(masks))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_mask(node.operand, table, expression)
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        result = np.ones(table.num_rows, dtype=bool)
        for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
            result &= _compare(_operand(left, table, expression), operator, _operand(right, table, expression), expression)
        return result
    raise UserError(f"Cannot read the condition {expression!r}: write comparisons joined by and/or, like 'N<=3.4e8 and D<=3e6'.")


def _operand(node: ast.expr, table: Table, expression: str) -> npt.NDArray[np.generic] | float | str:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _operand(node.operand, table, expression)
        if isinstance(value, float):
            return -value
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        text = table.text(node.id)
        if text is not None:
            return text
        if node.id in table.columns:
            return table.columns[node.id]
        known = _listed([*table.columns, *table.labels])
        raise UserError(
            f"The condition {expression!r} names {node.id!r}, which is no column ({known}): write text in quotes, as in 'domain == \"{node.id}\"'."
        )
    raise UserError(f"Cannot read the condition {expression!r}: compare columns with numbers or quoted text.")


def _compare(
    left: npt.NDArray[np.generic] | float | str,
    operator: ast.cmpop,
    right: npt.NDArray[np.generic] | float | str,
    expression: str,
) -> npt.NDArray[np.bool_]:
    operations = {
        ast.Lt: np.less,
        ast.LtE: np.less_equal,
        ast.Gt: np.greater,
        ast.GtE: np.greater_equal,
        ast.Eq: np.equal,
        ast.NotEq: np.not_equal,
    }
    operation = operations.get(type(operator))
    is_text = [isinstance(side, str) or (isinstance(side, np.ndarray) and side.dtype.kind in "US") for side in (left, right)]
    if operation is None or is_text[0] != is_text[1]:
        raise UserError(
            f"Cannot read the condition {expression!r}: compare with < <= > >= == !=, text with text, numbers with numbers."
        )
    return np.asarray(operation(np.asarray(left), np.asarray(right)))


def check_columns(table: Table, needed: Sequence[str], *, allow_units: bool = False) -> None:
    """Refuse columns that are missing, or whose values cannot be what their names say.

    Raises:
        UserError: as for `check`, of the columns alone.
    """
    missing = [column for column in needed if column not in table.columns]
    if missing:
        raise missing_columns(missing, table)
    for column in needed:
        values = table.columns[column]
        _refuse_rows(table, ~np.isfinite(values), f"column {column!r} is not a finite number")
        if column in POSITIVE:
            _refuse_rows(table, values <= 0, f"column {column!r} is not positive")
        if column in SHARES:
            _refuse_rows(
                table,
                (values < 0) | (values > 1),
                f"column {column!r} is a share and must lie in 0..1 (1% is 0.01)",
            )
        if column == "p":
            _refuse_rows(table, values == 1, "p is 100%, which leaves no target data (is it in percent? 1% is 0.01)")
    if not allow_units:
        for column in needed:
            if column in SMALLEST and table.num_rows and table.columns[column].max() < SMALLEST[column]:
                raise UserError(
                    f"Column {column!r} never exceeds {table.columns[column].max():g}: it looks as if "
                    "it were in millions or "
                    "billions; give plain counts, or pass allow_units (--allow-units) if it really "
                    "is so small."
                )


def check(
    table: Table,
    law: Law,
    *,
    num_free: int | None = None,
    allow_duplicates: bool = False,
    allow_units: bool = False,
) -> None:
    """Refuse what a fit could not answer honestly, in one sentence that names the rows and the way out.

    Raises:
        UserError: a column is missing; a value is not finite, not positive or not a share; a count looks as if it were in millions;
            rows are duplicated; there are fewer rows than free parameters.
    """
    needed = (*law.columns, "loss")
    check_columns(table, needed, allow_units=allow_units)
    has_offset = any(parameter.linear and not parameter.log for parameter in law.parameters)
    if "L0" in law.columns and not has_offset:
        below = int(np.sum(table.columns["loss"] < table.columns["L0"]))
        if below > MOST_BELOW * table.num_rows:
            raise UserError(
                f"In {below} of {table.num_rows} rows 'loss' is below 'L0', so nothing was forgotten: are the two columns swapped?"
            )
    if not allow_duplicates:
        refuse_duplicates(table, needed)
    free = len(law.parameters) if num_free is None else num_free
    if table.num_rows < free:
        raise UserError(
            f"{law.name} has {free} free parameters and the table {table.num_rows} rows: add at least "
            f"{free - table.num_rows} more, or fix parameters with --fix NAME=VALUE."
        )


def _refuse_rows(table: Table, bad: npt.NDArray[np.bool_], what: str) -> None:
    if bad.any():
        rows = table.row_numbers[bad]
        shown = ", ".join(str(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
        raise UserError(
            f"In {'row' if len(rows) == 1 else 'rows'} {shown}, {what}: correct or remove {'it' if len(rows) == 1 else 'them'}."
        )


def refuse_duplicates(table: Table, columns: Sequence[str]) -> None:
    """Refuse rows that repeat another in every needed column and in the run: counted twice, they fake precision.

    Raises:
        UserError: with the first pair of row numbers.
    """
    stacked = np.stack([table.columns[column] for column in columns], axis=1)
    if table.run is not None:
        stacked = np.concatenate([stacked, np.unique(table.run, return_inverse=True)[1].reshape(-1, 1)], axis=1)
    _, first, inverse, counts = np.unique(stacked, axis=0, return_index=True, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    if (counts > 1).any():
        later = np.flatnonzero(first[inverse] != np.arange(table.num_rows))
        numbers = table.row_numbers
        raise UserError(
            f"Row {numbers[later[0]]} repeats row {numbers[first[inverse[later[0]]]]} exactly "
            f"({len(later)} duplicated "
            f"{'row' if len(later) == 1 else 'rows'} in all): remove them, or pass --allow-duplicates "
            "if they are separate measurements."
        )
