"""Rows of a matrix, of one model or of each model of a stack: read, and added to.

Shapes: D width, V vocabulary, K models.
"""

import mlx.core as mx


def read_rows(table: mx.array, index: mx.array) -> mx.array:
    """Rows of a [V, D] table at integers of any shape; of a stack's [K, V, D], at integers [K, ...] within each member's own."""
    return table[index] if table.ndim == 2 else table.reshape(-1, table.shape[-1])[_offset(table, index)]


def add_rows(table: mx.array, index: mx.array, values: mx.array) -> mx.array:
    """The table with values added at the rows that `read_rows` reads; values are [..., D] in the order of the index."""
    flat = table.reshape(-1, table.shape[-1])
    index = index if table.ndim == 2 else _offset(table, index)
    return flat.at[index.reshape(-1)].add(values.reshape(-1, table.shape[-1])).reshape(table.shape)


def _offset(table: mx.array, index: mx.array) -> mx.array:
    """Rows within each member's table as rows of all tables one after the other."""
    first = mx.arange(len(table), dtype=mx.int32) * table.shape[1]
    return index + first.reshape(-1, *[1] * (index.ndim - 1))
