"""The result of a step, left on the device until somebody reads it."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mlx_forget.trainer import StepReading, StepResult, unpack_step


class TorchStep(StepResult):
    """A step whose numbers are still on the device."""

    def __init__(self, packed: Tensor, counts: npt.NDArray[np.float64]) -> None:
        self._packed = packed
        self._counts = counts

    def read(self) -> StepReading:
        return unpack_step(self._packed.double().cpu().numpy(), self._counts)
