"""Several processes, one run: what `mlx.launch` started talks over `mx.distributed`; a process of its own is a group of one.

Sums travel on the CPU stream: float64 exists there only, and the ring backend (the one that needs nothing installed) runs there.
"""

import os

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# Set by mlx.launch (ring, jaccl, nccl), and by the common MPI launchers.
_LAUNCHER_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


class Group:
    """The processes of this run."""

    def __init__(self) -> None:
        launched = any(name in os.environ for name in _LAUNCHER_VARIABLES)
        self._group = mx.distributed.init(strict=True) if launched else None
        self.rank = 0 if self._group is None else self._group.rank()
        self.size = 1 if self._group is None else self._group.size()

    def all_sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum over ranks, float64 in the shape of `values`; waits for all of them."""
        if self.size == 1:
            return values
        with mx.stream(mx.cpu):
            total = mx.distributed.all_sum(mx.array(values, dtype=mx.float64), group=self._group, stream=mx.cpu)
            return np.array(total)

    def broadcast(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Rank 0's values on every rank."""
        return self.all_sum(values if self.rank == 0 else np.zeros_like(values))

    def sum_arrays(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Sum of every float32 array over ranks, in one message; lazy."""
        if self.size == 1:
            return arrays
        message = mx.concatenate([value.reshape(-1) for value in arrays.values()])
        total = mx.distributed.all_sum(message, group=self._group, stream=mx.cpu)
        ends = np.cumsum([value.size for value in arrays.values()]).tolist()
        parts = mx.split(total, ends[:-1])
        return {name: part.reshape(value.shape) for (name, value), part in zip(arrays.items(), parts, strict=True)}
