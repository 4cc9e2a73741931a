"""Documents that share a row: each is read as if it were alone.

Shapes: B rows, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_positions(segment_BT: Tensor) -> Tensor:
    """Places int64[B, T] counted from the start of each segment."""
    place = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    begins = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0))
    return place - torch.where(begins, place, 0).cummax(1).values


def segment_mask(segment_BT: Tensor) -> Tensor:
    """Which key each query may see, bool[B, 1, T, T]: earlier ones of its segment."""
    same = segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
    return same & torch.ones(segment_BT.shape[1], segment_BT.shape[1], dtype=torch.bool, device=same.device).tril()
