"""Documents that share a row: each is read as if it were alone.

Shapes: B rows, T tokens; a stack has a leading dimension K.
"""

import mlx.core as mx


def segment_positions(segment_BT: mx.array) -> mx.array:
    """Places int32[..., T] counted from the start of each segment."""
    place = mx.arange(segment_BT.shape[-1], dtype=mx.int32)
    begins = mx.pad(segment_BT[..., 1:] != segment_BT[..., :-1], [(0, 0)] * (segment_BT.ndim - 1) + [(1, 0)])
    return place - mx.cummax(mx.where(begins, place, 0), axis=-1)


def segment_mask(segment_BT: mx.array | None) -> mx.array | None:
    """Which key each query may see, bool[B, 1, T, T]: earlier ones of its segment; None where rows have none."""
    if segment_BT is None:
        return None
    segment_BT = segment_BT.reshape(-1, segment_BT.shape[-1])
    same = segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
    return same & mx.tri(segment_BT.shape[1], dtype=mx.bool_)
