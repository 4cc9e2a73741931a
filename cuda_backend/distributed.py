"""Several processes, one run: what `torchrun` started talks over `torch.distributed`.

Host values and CPU tensors travel over gloo, GPU tensors over NCCL, in one process group.
"""

import atexit
import datetime
import functools
import os
from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mlx_forget.distributed import ALONE, Group, launcher

# The others wait this long while rank 0 prepares data; a process that has ended is noticed at once.
_PATIENCE = datetime.timedelta(hours=12)


@final
class TorchGroup(Group):
    """The processes that `torchrun` started, by its environment variables."""

    def __init__(self) -> None:
        if not dist.is_initialized():
            # Only a process that will use a GPU may open NCCL: it takes memory on one.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
            atexit.register(_leave)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        total = torch.from_numpy(np.array(values, np.float64))
        dist.all_reduce(total)
        return total.numpy()

    def sum_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum of every tensor over ranks, in one message; all of one type and device."""
        message = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        dist.all_reduce(message)
        parts = torch.split(message, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@functools.cache
def join() -> Group:
    """The group of this process, made once; a process of its own is a group of one."""
    if launcher() != "torchrun" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    return TorchGroup()


def local_rank() -> int:
    """Which process of this machine this is; 0 for a process of its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
