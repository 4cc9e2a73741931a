"""The seam: what the one loop asks of a backend, the values that cross it, and the table of backends.

A backend holds every tensor. Only specs, NumPy arrays, paths, Python scalars and `StepResult` cross. The loop lives in
`loop.py`; `cuda_backend` (PyTorch) and `mlx_forget.mlx_backend` (MLX) implement `Trainer`.
"""

import importlib
import importlib.util
import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlx_forget.comparison import Comparison
from mlx_forget.distributed import ALONE, Group, launched_rank, launcher
from mlx_forget.errors import UserError, unknown
from mlx_forget.ladder import ModelSpec
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS, TERM_REPLAY_KL, TERM_TASK, MethodSpec
from mlx_forget.pipeline.batches import Batch
from mlx_forget.pretrained import PretrainedSpec

__all__ = [
    "AdapterSpec",
    "Backend",
    "Batch",
    "Capabilities",
    "Comparison",
    "ModelSpec",
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
    "available_backends",
    "backend_names",
    "check_reference",
    "choose_backend",
    "group_counts",
    "kl_weights",
    "load_backend",
    "token_weights",
    "unpack_step",
]

Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adamw", "adafactor"]


@dataclass(frozen=True)
class AdapterSpec:
    """Adapters on a frozen base (see `adapters`).

    Args:
        kind: low-rank products (`lora`, `dora`), or vectors that outputs and inputs are multiplied by (`ia3`), which have no rank.
        scaling: what the product of the factors is multiplied by: alpha/r (Hu et al. 2022), alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023),
            or none, which is 1.
        dropout: share of an adapter's inputs that a training step leaves out.
        target_modules: names of modules, or their ends; `attention` or `all-linear`; none is `attention`.
        num_layers: only the last so many blocks have adapters; None is all.
    """

    kind: Literal["lora", "dora", "ia3"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "none"] = "alpha/r"
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    num_layers: int | None = None

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return {"alpha/r": self.alpha / self.rank, "alpha/sqrt(r)": self.alpha / math.sqrt(self.rank), "none": 1.0}[self.scaling]


@dataclass(frozen=True)
class OptimSpec:
    """The optimiser: decoupled decay multiplied by the learning rate, and global-norm clipping, are those of both.

    `adamw` has bias correction and epsilon outside the square root. `adafactor` (Shazeer and Stern 2018) has no first moment; its decay
    is 1 - t^-0.8, epsilon is 1e-30 within the mean of squares, an update is clipped to a root mean square of 1, and the rate is absolute:
    neither relative to the weights' size nor to the step. `ladder.decays` names the parameters that decay. `max_grad_norm` 0 switches
    clipping off.
    """

    name: Optimizer = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 5.0


@dataclass(frozen=True)
class RuntimeSpec:
    """How a step is executed. Apart from precision, nothing here changes what is computed.

    Args:
        precision: `fp32`, or `bf16` activations over fp32 master weights.
        device: a device name the backend understands, or None for its best one.
        compile: None compiles where the backend finds that it pays.
        micro_batch_size: rows per forward pass; None is the whole batch. Gradients add up to those of the whole batch.
        grad_checkpoint: recompute block activations in the backward pass.
        shard: share weights, gradients and moments among the processes of the run (capability `shard`).
        num_threads: CPU threads; None leaves the framework's choice.
        memory_limit_gb: refuse to grow beyond this.
        reads_only: for measuring: weights come from `load`, and neither gradients nor moments take memory.
    """

    precision: Precision = "fp32"
    device: str | None = None
    compile: bool | None = None
    micro_batch_size: int | None = None
    grad_checkpoint: bool = False
    shard: bool = False
    num_threads: int | None = None
    memory_limit_gb: float | None = None
    reads_only: bool = False


@dataclass(frozen=True)
class TrainerSpec:
    """Everything a backend is built from: the shape of a ladder model, or a checkpoint of another tool, whose weights it starts with.

    Args:
        num_layers: without an adapter, only the weights of the last so many blocks are trained; None is every weight.
    """

    model: ModelSpec | PretrainedSpec
    optim: OptimSpec = field(default_factory=OptimSpec)
    method: MethodSpec = field(default_factory=MethodSpec)
    adapter: AdapterSpec | None = None
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)
    seed: int = 0
    num_layers: int | None = None


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, as data: the core asks here and never for a backend's name.

    `document_masks`: models of other tools keep the documents of a row apart; the ladder always does.
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
    bitwise_resume: bool = False
    fast_bf16: bool = False
    accelerator: bool = False
    # GPUs that a process can be confined to, as the environment variable takes them.
    gpus: tuple[str, ...] = ()
    gpu_variable: str = ""


@dataclass(frozen=True)
class StepReading:
    """The numbers of one step on the host, summed over all ranks.

    Args:
        loss_sums: float64[terms, sources], sums of token losses in nats.
        counts: float64[terms, sources], tokens behind each sum.
        grad_norm: global norm before clipping.
        skipped: 1 if the update was masked because the loss or gradient was not finite.
    """

    loss_sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]
    grad_norm: float
    skipped: int


class StepResult(ABC):
    """A step that may still be running: reading it is the only host sync."""

    @abstractmethod
    def read(self) -> StepReading: ...


def group_counts(batch: Batch, method: MethodSpec) -> npt.NDArray[np.float64]:
    """Tokens behind each loss sum, float64[terms, sources]."""
    counts = np.zeros((NUM_TERMS, NUM_SOURCES))
    np.add.at(counts, (batch.term, batch.source), batch.loss_mask.sum(axis=1, dtype=np.float64))
    if method.kl_on_task:
        counts[TERM_REPLAY_KL] += counts[TERM_TASK]
    return counts


def token_weights(batch: Batch, counts: npt.NDArray[np.float64], method: MethodSpec) -> npt.NDArray[np.float32]:
    """The weight of each token's next-token loss in the objective, float32[B, T]: coefficient / token count of its term.

    It is 0 where masked and in the rows of the KL term, which has weights of its own. `counts` are those of the whole batch over all ranks and micro-batches, so partial gradients add up to the whole one.
    """
    per_term = counts.sum(axis=1)
    weights = np.divide(np.asarray(method.coefficients), per_term, out=np.zeros(NUM_TERMS), where=per_term > 0)
    weights[TERM_REPLAY_KL] = 0
    per_token: npt.NDArray[np.float64] = weights[batch.term, None] * batch.loss_mask
    return per_token.astype(np.float32)


def kl_weights(batch: Batch, counts: npt.NDArray[np.float64], method: MethodSpec) -> npt.NDArray[np.float32] | None:
    """The weight of each token's KL(reference || model) in the objective, float32[B, T]; None where the method has no such term."""
    if not method.has_kl:
        return None
    rows = batch.term == TERM_REPLAY_KL
    if method.kl_on_task:
        rows = rows | (batch.term == TERM_TASK)
    weight = method.coefficients[TERM_REPLAY_KL] / max(1.0, counts[TERM_REPLAY_KL].sum())
    per_token: npt.NDArray[np.float64] = weight * (rows[:, None] * batch.loss_mask)
    return per_token.astype(np.float32)


def check_reference(method: MethodSpec, *, reference: bool, fisher: bool) -> None:
    """Refuse a step of a method whose frozen reference or Fisher information is not there yet.

    Raises:
        UserError: which call is missing.
    """
    if (method.has_kl or method.has_anchor) and not reference:
        raise UserError(f"Method {method.name!r} needs a reference: call set_reference first.")
    if method.ewc and not fisher:
        raise UserError(f"Method {method.name!r} needs the Fisher information: call set_fisher first.")


@dataclass(frozen=True)
class StackedBatch:
    """The batches of K members side by side.

    Args:
        tokens: int32[K, B, T+1].
        token_weight: float32[K, B, T], of each member's own objective (see `token_weights`).
        loss_mask: uint8[K, B, T].
        groups: float32[K, B, terms * sources], 1 at the term and source of a row.
        segment: int32[K, B, T] or None.
        counts: float64[terms, sources] of each member.
    """

    tokens: npt.NDArray[np.int32]
    token_weight: npt.NDArray[np.float32]
    loss_mask: npt.NDArray[np.uint8]
    groups: npt.NDArray[np.float32]
    segment: npt.NDArray[np.int32] | None
    counts: list[npt.NDArray[np.float64]]

    @classmethod
    def of(cls, batches: Sequence[Batch], method: MethodSpec) -> "StackedBatch":
        counts = [group_counts(batch, method) for batch in batches]
        group = np.stack([batch.term.astype(np.int64) * NUM_SOURCES + batch.source for batch in batches])
        segments = [batch.segment for batch in batches if batch.segment is not None]
        assert len(segments) in (0, len(batches)), "members of one stack have segments or have none"
        return cls(
            tokens=np.stack([batch.tokens for batch in batches]),
            token_weight=np.stack([token_weights(batch, n, method) for batch, n in zip(batches, counts, strict=True)]),
            loss_mask=np.stack([batch.loss_mask for batch in batches]),
            groups=np.eye(NUM_TERMS * NUM_SOURCES, dtype=np.float32)[group],
            segment=np.stack(segments) if segments else None,
            counts=counts,
        )

    def parts(self, num_rows: int | None) -> "Iterator[StackedBatch]":
        """The same in micro-batches of so many rows of each member; None is the whole."""
        size = num_rows or self.tokens.shape[1]
        for start in range(0, self.tokens.shape[1], size):
            rows = slice(start, start + size)
            yield replace(
                self,
                tokens=self.tokens[:, rows],
                token_weight=self.token_weight[:, rows],
                loss_mask=self.loss_mask[:, rows],
                groups=self.groups[:, rows],
                segment=None if self.segment is None else self.segment[:, rows],
            )


def unpack_step(packed: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> StepReading:
    """A reading from the flat vector that backends fetch in one transfer: loss sums, then gradient norm, then skipped."""
    sums = packed[: NUM_TERMS * NUM_SOURCES].reshape(NUM_TERMS, NUM_SOURCES)
    return StepReading(sums, counts, grad_norm=float(packed[-2]), skipped=int(packed[-1]))


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
        self, prompts: npt.NDArray[np.int32], u: npt.NDArray[np.float64], *, temperature: float = 1.0, from_reference: bool = False
    ) -> npt.NDArray[np.int32]:
        """Continue int32[B, P] prompts by inverse-CDF sampling with uniforms `u` float64[B, T]; returns int32[B, T].

        `from_reference` samples the frozen reference instead of the model.

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
    def kept_bytes(cls, model: ModelSpec | PretrainedSpec, precision: Precision) -> int:
        """What the gradient needs of one token in one block, in bytes: for estimates."""
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
        """One optimiser step of each active member, on its own batch at its own rate; the results of the others mean nothing.

        All batches have one shape. A member that is no longer active stays as it is and never becomes active again.
        """


@dataclass(frozen=True)
class Backend:
    """A row of the registry: where the trainer is, what it needs, how to get that, and what starts it as several processes."""

    trainer: str
    requires: str
    install: str
    launcher: str = "its own launcher"


BACKENDS: dict[str, Backend] = {
    "mlx": Backend("mlx_forget.mlx_backend.trainer:MLXTrainer", "mlx.core", "pip install 'mlx-forget[mlx]'", "mlx.launch"),
    "cuda": Backend("cuda_backend.trainer:TorchTrainer", "torch", "pip install 'mlx-forget[cuda]'", "torchrun"),
}
ENTRY_POINT_GROUP = "mlx_forget.backends"


def backend_names() -> list[str]:
    """Built-in backends, then those of other packages (entry-point group `mlx_forget.backends`)."""
    return [*BACKENDS, *(e.name for e in entry_points(group=ENTRY_POINT_GROUP) if e.name not in BACKENDS)]


def available_backends() -> list[str]:
    """Backends whose framework is installed, found without importing it."""
    return [name for name in backend_names() if name not in BACKENDS or _installed(BACKENDS[name].requires)]


def choose_backend() -> tuple[str, str]:
    """The backend of `--backend auto` and the reason: MLX on Apple silicon, else PyTorch, else whatever is installed.

    Raises:
        UserError: no backend is installed.
    """
    available = available_backends()
    if "mlx" in available and platform.system() == "Darwin" and platform.machine() == "arm64":
        return "mlx", "this is Apple silicon"
    if "cuda" in available:
        return "cuda", "PyTorch is installed and this is not a Mac with MLX"
    if available:
        return available[0], "no other backend is installed"
    ways = " or ".join(f"{backend.install} ({name})" for name, backend in BACKENDS.items())
    raise UserError(f"No backend is installed. Install one: {ways}.")


def load_backend(name: str) -> type[Trainer]:
    """The trainer class of a backend.

    Raises:
        UserError: unknown name, or a framework that is not installed (with the pip line).
    """
    if name in BACKENDS:
        backend = BACKENDS[name]
        if not _installed(backend.requires):
            raise UserError(f"Backend {name!r} needs {backend.requires.split('.')[0]}, which is not installed: {backend.install}")
        module, _, attribute = backend.trainer.partition(":")
        trainer: type[Trainer] = getattr(importlib.import_module(module), attribute)
        return trainer
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            external: type[Trainer] = entry.load()
            return external
    raise unknown("backend", name, ["auto", *backend_names()])


def join_group(name: str) -> Group:
    """The processes of this run as a backend joins them.

    Raises:
        UserError: the process was launched by a launcher that this backend does not understand.
    """
    group = load_backend(name).join()
    if group.size == 1 and launched_rank():
        started_by = BACKENDS[name].launcher if name in BACKENDS else "its own launcher"
        raise UserError(f"Backend {name!r} cannot join processes that {launcher()} started: start them with {started_by}.")
    return group


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
