"""Several processes, one run: what `mlx.launch` started talks over `mx.distributed`.

Sums travel on the CPU stream: float64 exists there only, and the ring backend (the one that needs nothing installed) runs there.
"""

import functools
import json
import os
from pathlib import Path
from typing import final

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_forget.distributed import ALONE, Group, launcher


@final
class MLXGroup(Group):
    """The processes that `mlx.launch` or an MPI launcher started."""

    def __init__(self) -> None:
        self._group = mx.distributed.init(strict=True)
        self.rank, self.size = self._group.rank(), self._group.size()

    def all_sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        with mx.stream(mx.cpu):
            total = mx.distributed.all_sum(mx.array(values, dtype=mx.float64), group=self._group, stream=mx.cpu)
            return np.array(total)

    def sum_arrays(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Sum of every float32 array over ranks, in one message; lazy."""
        message = mx.concatenate([value.reshape(-1) for value in arrays.values()])
        total = mx.distributed.all_sum(message, group=self._group, stream=mx.cpu)
        ends = np.cumsum([value.size for value in arrays.values()]).tolist()
        parts = mx.split(total, ends[:-1])
        return {name: part.reshape(value.shape) for (name, value), part in zip(arrays.items(), parts, strict=True)}


@functools.cache
def join() -> Group:
    """The group of this process, made once; a process of its own is a group of one."""
    if launcher() not in ("mlx.launch", "mpirun") or _ring() == []:
        return ALONE
    group = MLXGroup()
    return group if group.size > 1 else ALONE


def num_local_ranks() -> int:
    """How many processes of this run share this machine, as far as the ring's host file says."""
    hosts = _ring()
    return hosts.count(hosts[int(os.environ["MLX_RANK"])]) if hosts else 1


def _ring() -> list[str] | None:
    """The host of each rank of a ring; empty where `mlx.launch -n 1` wrote none, None where it started no ring."""
    if "MLX_HOSTFILE" not in os.environ:
        return None
    text = Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8")
    return [node[0].rsplit(":", 1)[0] for node in json.loads(text)] if text.strip() else []
