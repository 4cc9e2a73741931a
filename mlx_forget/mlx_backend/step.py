"""The result of a step, left to be computed until somebody reads it."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_forget.trainer import StepReading, StepResult, unpack_step


class MLXStep(StepResult):
    """A step whose numbers may not be computed yet."""

    def __init__(self, packed: mx.array, counts: npt.NDArray[np.float64]) -> None:
        self._packed = packed
        self._counts = counts

    def read(self) -> StepReading:
        return unpack_step(np.array(self._packed).astype(np.float64), self._counts)
