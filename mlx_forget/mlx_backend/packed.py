"""Packed weights of quantised bases among others: what is converted and what must stay as it is."""

import mlx.core as mx


def widened(value: mx.array) -> mx.array:
    """A weight as float32; a packed one stays as it is."""
    return value.astype(mx.float32) if is_floating(value) else value


def is_floating(value: mx.array) -> bool:
    """Whether a weight is made of numbers, not of packed bits."""
    return bool(mx.issubdtype(value.dtype, mx.floating))
