"""The seam: what the one loop asks of a backend, and, with `errors` and `methods`, all that a backend's author needs to import.

A backend holds every tensor. Only specs (`specs.py`), NumPy arrays, paths, Python scalars and `StepResult` (`steps.py`) cross; the table
of backends is `backends.py`. The loop lives in `training/loop.py`; `cuda_backend` (PyTorch) and `mlx_forget.mlx_backend` (MLX) implement `Trainer`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlx_forget.comparison import Comparison
from mlx_forget.distributed import ALONE, Group
from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec
from mlx_forget.pipeline.batches import Batch
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.specs import AdapterSpec, Optimizer, OptimSpec, Precision, RuntimeSpec, TrainerSpec
from mlx_forget.steps import (
    NoStep,
    StackedBatch,
    StepReading,
    StepResult,
    check_reference,
    group_counts,
    kl_weights,
    token_weights,
    unpack_step,
)

__all__ = [
    "AdapterSpec",
    "Batch",
    "Capabilities",
    "Comparison",
    "ModelSpec",
    "NoStep",
    "OptimSpec",
    "Optimizer",
    "Precision",
    "PretrainedSpec",
    "RuntimeSpec",
    "Stack",
    "StackedBatch",
    "StepReading",
    "StepResult",
    "Trainer",
    "TrainerSpec",
    "check_reference",
    "group_counts",
    "kl_weights",
    "token_weights",
    "unpack_step",
]


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, as data: the core asks here and never for a backend's name.

    `document_masks`: models of other tools keep the documents of a row apart; the ladder always does. `fast_bf16`: an accelerator that
    multiplies bf16 fast, which `precision: auto` then takes. No CPU says so: precision names a run, which is to be the same on every CPU.
    """

    precisions: tuple[Precision, ...]
    terms: tuple[int, ...]
    adapters: tuple[str, ...] = ()
    anchor: bool = False
    fisher: bool = False
    sample: bool = False
    stack: bool = False
    document_masks: bool = False
    distributed: bool = False
    shard: bool = False
    fast_bf16: bool = False
    accelerator: bool = False
    # GPUs that a process can be confined to, as the environment variable takes them.
    gpus: tuple[str, ...] = ()
    gpu_variable: str = ""


class Trainer(ABC):
    """One model, its optimiser and its frozen reference, behind a short list of verbs."""

    group: Group = ALONE

    @abstractmethod
    def __init__(self, spec: TrainerSpec) -> None: ...

    @classmethod
    def join(cls) -> Group:
        """The processes that a launcher started for this run; waits until all are there. One process is a group of its own."""
        return ALONE

    @classmethod
    @abstractmethod
    def describe(cls) -> Capabilities:
        """What this backend can do on this machine."""

    @property
    @abstractmethod
    def device(self) -> str:
        """The device in words, for records."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Fallbacks this trainer took, one sentence each: the caller announces them."""
        return ()

    @abstractmethod
    def train_step(self, batch: Batch, learning_rate: float) -> StepResult:
        """One optimiser step on the rows of this rank."""

    @abstractmethod
    def token_losses(self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.float32]:
        """Next-token losses in nats, float32[B, T], of int32[B, T+1] rows; `segment` int32[B, T] is as in a `Batch`."""

    @abstractmethod
    def compare(self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> Comparison:
        """Measures against the reference; zero where `mask` uint8[B, T] is 0."""

    @abstractmethod
    def set_reference(self, reference: Literal["start", "adapters_off"] | Path | None) -> None:
        """Freeze a reference: the weights as they are now, the base under the adapters (no second copy of it), a checkpoint file, or none."""

    def set_fisher(
        self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8], segment: npt.NDArray[np.int32] | None = None
    ) -> None:
        """Measure the diagonal Fisher information of the weights as they are now, on int32[B, T+1] rows with mask uint8[B, T].

        `segment` int32[B, T] is as in a `Batch`.

        It is the mean over rows of the squared gradient of the row's summed loss, per token: then lambda / 2 sum F (theta - theta0)^2
        is about lambda KL per token where rows are drawn from the model. For methods with `ewc` (capability `fisher`).
        """
        raise UserError("This backend does not measure Fisher information: choose another method than ewc.")

    def log_probs(
        self, tokens: npt.NDArray[np.int32], segment: npt.NDArray[np.int32] | None = None, *, from_reference: bool = False
    ) -> npt.NDArray[np.float32]:
        """Log-probabilities of every next token, float32[B, T, V], of int32[B, T+1] rows, to be kept beside a replay store.

        `from_reference` asks the frozen reference instead of the model. The caller asks for few rows at a time.
        """
        raise UserError("This backend does not give log-probabilities away: leave reference_log_probs live.")

    @abstractmethod
    def save(self, path: Path, *, trainable_only: bool = False) -> None:
        """Write the weights as safetensors in Hugging Face names, fp32.

        With adapters, the whole model has them fused into its weights; `trainable_only` writes them alone, in the names of peft.
        """

    @abstractmethod
    def load(self, path: Path) -> None:
        """Read weights that `save` of any backend wrote: those of a whole model, on which adapters start anew, or of adapters alone.

        A checkpoint in several files is read from its folder. The optimiser's moments stay.
        """

    @abstractmethod
    def save_state(self, path: Path) -> None:
        """Write the training state in fp32 and neutral names: the moments as `ladder.moment_shapes` names them, and `step`."""

    @abstractmethod
    def load_state(self, path: Path) -> None:
        """Read the training state that `save_state` of any backend wrote."""

    @abstractmethod
    def sample(
        self,
        prompts: npt.NDArray[np.int32],
        u: npt.NDArray[np.float64],
        *,
        temperature: float = 1.0,
        from_reference: bool = False,
        num_ids: int | None = None,
    ) -> npt.NDArray[np.int32]:
        """Continue int32[B, P] prompts by inverse-CDF sampling with uniforms `u` float64[B, T]; returns int32[B, T].

        Args:
            from_reference: sample the frozen reference instead of the model.
            num_ids: draw from the first ids alone, as many as the tokenizer has; None is the whole table, which may be larger.

        Raises:
            UserError: there is no reference, or the model's context is shorter than its inputs, P + T - 1 tokens.
            MemoryError: the batch needs more memory than the device has.
        """

    @classmethod
    def memory_bytes(cls) -> int | None:
        """What a run can use of the memory of a device of its own; None where it shares the host's."""
        return None

    @classmethod
    def hardware(cls) -> str | None:
        """The name of the accelerator of this machine; None where there is none."""
        return None

    @classmethod
    def kept_bytes(cls, model: ModelSpec | PretrainedSpec, precision: Precision, *, on_cpu: bool) -> int:
        """What the gradient needs of one token in one block, in bytes, on a CPU or on a GPU: for estimates."""
        return (84 if precision == "fp32" else 56) * model.width

    @property
    def micro_batch_size(self) -> int | None:
        """Rows per forward pass as they are now; None is the whole batch."""
        return None

    @contextmanager
    def gathered(self, *, with_training_state: bool) -> Iterator[None]:
        """Every rank enters; within, rank 0 can save weights, and moments if they are asked for, of a model that ranks share."""
        yield

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Highest memory use so far: of the device where it has its own, else of the process."""

    @classmethod
    def stack(cls, spec: TrainerSpec, seeds: Sequence[int]) -> "Stack":
        """Models of one shape that train as one, the weights of each initialised from its seed (capability `stack`)."""
        raise UserError("This backend cannot train several runs as one: start them one by one.")


class Stack(ABC):
    """Models of one shape that train as one: a step of all of them is one pass of batched products.

    Args:
        members: each model as a trainer of its own, for evaluation, saving and loading; its state is that within the stack.
    """

    members: Sequence[Trainer]

    @abstractmethod
    def train_step(self, batches: Sequence[Batch], learning_rates: Sequence[float], active: Sequence[bool]) -> list[StepResult]:
        """One optimiser step of each active member, on its own batch at its own rate; the results of the others are `NoStep`.

        All batches have one shape. A member that is no longer active stays as it is and never becomes active again.
        """
