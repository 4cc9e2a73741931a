"""What a run will cost before it is started: FLOPs, memory per device, disk and hours, by formulas that say what they assume."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mlx_forget.adapters import parameter_shapes, trained_names
from mlx_forget.errors import UserError, unknown
from mlx_forget.ladder import ModelSpec, linear_shapes, moment_shapes, num_params, param_shapes, train_flops_per_token
from mlx_forget.methods import MethodSpec
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.trainer import AdapterSpec, OptimSpec, Precision, TrainerSpec

# Of a device's memory: the rest is left to the framework, to fragments and to evaluations.
USABLE_SHARE = 0.9
# Of a device's peak that a step is assumed to reach where nothing was measured.
ASSUMED_SHARE = 0.4
# Tokens whose logits are held at once fill a chunk of this many elements on an accelerator: float32 logits, exponentials, gradient.
_CHUNK_ELEMENTS, _BYTES_PER_LOGIT = 1 << 27, 10
# Forward alone is a third of a training step.
_FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class Device:
    """A device by its data sheet.

    Args:
        flops: dense products a second by precision, without sparsity.
        memory_bytes: of one device.
    """

    name: str
    flops: dict[Precision, float]
    memory_bytes: float


# Data sheets of the makers; fp32 without TF32, as this tool multiplies.
DEVICES: dict[str, Device] = {
    "a100": Device("NVIDIA A100 80 GB", {"bf16": 312e12, "fp32": 19.5e12}, 80e9),
    "a100-40gb": Device("NVIDIA A100 40 GB", {"bf16": 312e12, "fp32": 19.5e12}, 40e9),
    "h100": Device("NVIDIA H100 SXM", {"bf16": 989e12, "fp32": 67e12}, 80e9),
    "h200": Device("NVIDIA H200", {"bf16": 989e12, "fp32": 67e12}, 141e9),
    "l40s": Device("NVIDIA L40S", {"bf16": 362e12, "fp32": 91.6e12}, 48e9),
    "rtx-4090": Device("NVIDIA RTX 4090", {"bf16": 165e12, "fp32": 82.6e12}, 24e9),
}


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        UserError: it is not in the table.
    """
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    return DEVICES[name]


def device_like(name: str | None) -> Device | None:
    """The device of the table that a driver calls by this name, or None."""
    words = (name or "").lower().replace("-", " ").split()
    found = [device for key, device in DEVICES.items() if all(word in words for word in key.split("-"))]
    return found[-1] if found else None


class KeptBytes(Protocol):
    """What a backend keeps of one token in one block for the gradient, in bytes."""

    def __call__(self, model: ModelSpec | PretrainedSpec, precision: Precision, *, on_cpu: bool) -> int: ...


@dataclass(frozen=True)
class Step:
    """What decides the memory and the FLOPs of a training step on one device.

    Args:
        rows: rows of a step on this device, replay rows included.
        row_length: tokens of a row.
        num_shards: devices that share weights, gradients and moments.
        kl_rows: rows of a step whose reference distribution is computed too.
        adapter: what is trained on a frozen base; None trains every weight.
        num_layers: without an adapter, only the weights of the last so many blocks are trained.
        on_cpu: whether it runs on a CPU, where a backend may attend otherwise than on a GPU.
    """

    model: ModelSpec | PretrainedSpec
    optim: OptimSpec
    method: MethodSpec
    precision: Precision
    rows: int
    row_length: int
    grad_checkpoint: bool = False
    num_shards: int = 1
    num_devices: int = 1
    kl_rows: int = 0
    adapter: AdapterSpec | None = None
    num_layers: int | None = None
    on_cpu: bool = False

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter that a step changes."""
        return _trained_shapes(self.model, self.adapter, self.num_layers)

    @property
    def flops(self) -> float:
        """Of a step on this device: 6 per matrix weight and token plus attention, a third of that for a frozen reference.

        The weights under adapters have no gradient of their own, which is another third.
        """
        share = 1 if self.adapter is None else 1 - _FORWARD_SHARE
        rows = share * self.rows + _FORWARD_SHARE * self.kl_rows
        attended = self.row_length if isinstance(self.model, PretrainedSpec) else None
        return rows * self.row_length * train_flops_per_token(self.model, attended)


def state_bytes(spec: TrainerSpec) -> int:
    """Bytes of float32 weights, gradients and moments, before any activation: no batch is small enough to need less."""
    trained = _trained_shapes(spec.model, spec.adapter, spec.num_layers)
    own = {} if spec.adapter is None else trained
    parts = (own, trained, moment_shapes(spec.optim.name, trained))
    return 4 * (num_params(spec.model) + sum(math.prod(shape) for shapes in parts for shape in shapes.values()))


def memory_bytes(step: Step, kept_bytes: KeptBytes, *, rows: int | None = None) -> dict[str, int]:
    """Bytes that a training step takes on one device, by kind, and `total`.

    Weights, gradients and moments are float32; bf16 runs keep a narrow copy of the weights during a pass. Each token keeps `kept_bytes`
    a block, or the block's input alone under checkpointing, where one block at a time is computed again.

    Args:
        rows: of a forward pass; None is all rows of the step.
    """
    model, shards = step.model, step.num_shards
    sizes = {name: math.prod(shape) for name, shape in step.trained.items()}
    gradients = 4 * sum(sizes.values())
    weights = 4 * num_params(model) + (0 if step.adapter is None else gradients)
    moments = 4 * sum(math.prod(shape) for shape in moment_shapes(step.optim.name, step.trained).values())
    anchors = 2 if step.method.anchor_precision == "bf16" else 4
    # Under adapters, the base is the reference.
    reference = 0 if step.method.reference is None or step.adapter is not None else anchors * num_params(model)
    if step.method.ewc:
        reference += weights
    tokens = (step.rows if rows is None else rows) * step.row_length
    kept = kept_bytes(model, step.precision, on_cpu=step.on_cpu)
    width = 4 * model.width
    # A block that is computed again stands beside its gradients.
    blocks = model.num_layers * width + 2 * kept if step.grad_checkpoint else model.num_layers * kept
    chunk = min(tokens * model.vocab_size, _CHUNK_ELEMENTS)
    # The final states, their gradient and that of the head; what the largest parameter needs beside itself in a step.
    head = (4 * model.vocab_size * model.width if step.adapter is None else 0) + 4 * width * tokens
    narrow = 2 * num_params(model) if step.precision == "bf16" else 0
    message = gradients if step.num_devices > 1 and shards == 1 else 0
    if shards > 1:
        # One block and the embeddings at a time are whole, the next one is on its way.
        largest = max(12 * model.width**2, model.vocab_size * model.width)
        narrow = 4 * (2 * largest + model.vocab_size * model.width)
    if step.optim.name == "adafactor":
        message += 3 * 4 * max(sizes.values())
    parts = {
        "weights": weights // shards,
        "gradients": gradients // shards + message,
        "moments": moments // shards,
        "reference": reference // shards,
        "copies": narrow,
        "activations": tokens * blocks,
        "logits": _BYTES_PER_LOGIT * chunk + head,
    }
    return parts | {"total": sum(parts.values())}


def fitting_rows(step: Step, kept_bytes: KeptBytes, available_bytes: float) -> int | None:
    """Rows of a forward pass that fit: all of a step, or the largest half, quarter, ... of them; None where not one row fits."""
    rows = step.rows
    while memory_bytes(step, kept_bytes, rows=rows)["total"] > USABLE_SHARE * available_bytes:
        if rows <= 1:
            return None
        rows = math.ceil(rows / 2)
    return rows


def disk_bytes(step: Step) -> int:
    """The most that the checkpoints of a run take at once: the last, the one before and one being written, and two of the best."""
    weights, moments = _saved_bytes(step)
    return 3 * (weights + moments) + 2 * weights


def kept_disk_bytes(step: Step) -> int:
    """What a run that has ended keeps: the last checkpoint with its moments, and the best weights."""
    weights, moments = _saved_bytes(step)
    return 2 * weights + moments


def _saved_bytes(step: Step) -> tuple[int, int]:
    """Weights and moments of a checkpoint. Of adapters there are two copies in each, one for peft and one for mlx-lm."""
    saved = param_shapes(step.model) if step.adapter is None else step.trained
    weights = (1 if step.adapter is None else 2) * 4 * sum(math.prod(shape) for shape in saved.values())
    moments = 4 * sum(math.prod(shape) for shape in moment_shapes(step.optim.name, step.trained).values())
    return weights, moments


def host_memory_bytes() -> int | None:
    """The memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def refuse_what_cannot_fit(step: Step, kept_bytes: KeptBytes, available_bytes: float | None, where: str) -> None:
    """Refuse a model of which not one row fits, before anything long begins.

    Raises:
        UserError: the estimate, what is there, and what would fit.
    """
    if available_bytes is None or fitting_rows(step, kept_bytes, available_bytes) is not None:
        return
    need = memory_bytes(step, kept_bytes, rows=1)
    ways = []
    if fitting_rows(replace(step, grad_checkpoint=True), kept_bytes, available_bytes) is not None:
        ways.append("--grad-checkpoint")
    if step.optim.name == "adamw":
        lean = replace(step, optim=replace(step.optim, name="adafactor"), grad_checkpoint=True)
        if fitting_rows(lean, kept_bytes, available_bytes) is not None:
            ways.append("--optimizer adafactor --grad-checkpoint")
    if step.adapter is None and not step.method.has_anchor:
        small = replace(step, adapter=AdapterSpec(), grad_checkpoint=True)
        if fitting_rows(small, kept_bytes, available_bytes) is not None:
            ways.append("--fine-tune-type lora --grad-checkpoint")
    for count in (2, 4, 8, 16, 32, 64):
        shared = replace(step, num_shards=count, num_devices=count, grad_checkpoint=True)
        if count > step.num_shards and fitting_rows(shared, kept_bytes, available_bytes) is not None:
            ways.append(f"{count} such devices with --shard --grad-checkpoint")
            break
    state = sum(need[part] for part in ("weights", "gradients", "moments", "reference"))
    raise UserError(
        f"A model of {num_params(step.model):,} parameters does not fit: one row of {step.row_length:,} tokens needs about "
        f"{_size(need['total'])} ({_size(state)} of them weights, gradients and optimiser), {where} has "
        f"{_size(available_bytes)}, of which {USABLE_SHARE:.0%} can be used. What would fit: {' or '.join(ways) if ways else 'a smaller model, or shorter rows'}."
    )


@dataclass(frozen=True)
class Rate:
    """FLOPs a second of all devices together, and where the figure is from."""

    flops_per_second: float
    says: str

    @classmethod
    def assumed(cls, device: Device, precision: Precision, num_devices: int) -> "Rate":
        peak = device.flops[precision]
        says = f"assumed: {ASSUMED_SHARE:.0%} of {peak / 1e12:g} TFLOP/s ({device.name}, {precision}, data sheet)"
        return cls(ASSUMED_SHARE * peak * num_devices, says + (f" on each of {num_devices}" if num_devices > 1 else ""))


def in_words(parts: dict[str, int]) -> str:
    """A memory estimate in one line."""
    named = [f"{name} {_size(size)}" for name, size in parts.items() if name != "total" and size > 0.01 * parts["total"]]
    return f"{_size(parts['total'])} ({', '.join(named)})"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"


def summary(step: Step, kept_bytes: KeptBytes, *, rows: int | None) -> dict[str, Any]:
    """The keys that a dry run adds: memory of one device by kind and disk, at most at once and in the end, in bytes."""
    return {
        "memory_bytes_per_device": memory_bytes(step, kept_bytes, rows=rows),
        "disk_bytes": disk_bytes(step),
        "kept_disk_bytes": kept_disk_bytes(step),
        "micro_batch_size": rows,
    }


def _trained_shapes(
    model: ModelSpec | PretrainedSpec, adapter: AdapterSpec | None, num_layers: int | None
) -> dict[str, tuple[int, ...]]:
    if adapter is not None:
        return parameter_shapes(linear_shapes(model), adapter)
    shapes = param_shapes(model)
    return {name: shapes[name] for name in trained_names(shapes, None, num_layers)}
