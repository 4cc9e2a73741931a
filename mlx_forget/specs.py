"""What a backend is built from: model, adapters, optimiser, method, and how a step is executed; all of it data."""

import math
from dataclasses import dataclass, field
from typing import Literal

from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec
from mlx_forget.methods import MethodSpec
from mlx_forget.pretrained import PretrainedSpec

Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adamw", "adafactor"]


@dataclass(frozen=True)
class AdapterSpec:
    """Adapters on a frozen base (see `adapters`).

    Args:
        kind: low-rank products (`lora`, `dora`), or vectors that outputs and inputs are multiplied by (`ia3`), which have no rank.
        scaling: what the product of the factors is multiplied by: alpha/r (Hu et al. 2022), alpha/sqrt(r) (rsLoRA, Kalajdzievski 2023),
            or none, which is 1.
        dropout: share of an adapter's inputs that a training step leaves out; `ia3` has none.
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

    def __post_init__(self) -> None:
        if self.kind == "ia3" and self.dropout:
            raise UserError(f"ia3 has no inputs of its own to leave out, and its dropout is {self.dropout:g}: leave dropout at 0.")

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
