"""The device of a PyTorch trainer: which one, what it can do, its memory, and whether steps are compiled for it."""

import functools
import os
import resource
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from cuda_backend.attention import is_short
from cuda_backend.distributed import local_rank
from mlx_forget.costs import state_bytes
from mlx_forget.distributed import Group
from mlx_forget.errors import UserError
from mlx_forget.methods import TERM_REPLAY_KL, TERM_REPLAY_NTP, TERM_TASK
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.trainer import Capabilities, ModelSpec, Precision, RuntimeSpec, TrainerSpec


def capabilities() -> Capabilities:
    """What this backend can do here."""
    return Capabilities(
        precisions=("fp32", "bf16"),
        terms=(TERM_TASK, TERM_REPLAY_NTP, TERM_REPLAY_KL),
        adapters=("lora", "dora", "ia3"),
        anchor=True,
        fisher=True,
        sample=True,
        distributed=True,
        shard=True,
        document_masks=True,
        stack=True,
        accelerator=torch.cuda.is_available(),
        fast_bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        gpus=_gpus(),
        gpu_variable="CUDA_VISIBLE_DEVICES",
    )


def choose_device(wanted: str | None, group: Group, notes: list[str]) -> torch.device:
    """The device of that name, or the best one; a CPU that nobody asked for is noted.

    Raises:
        UserError: there is no such device, or no GPU for this process of the run.
    """
    if wanted is None or (wanted == "cuda" and torch.cuda.is_available()):
        if torch.cuda.is_available():
            return torch.device("cuda", _choose_gpu(group))
        notes.append("PyTorch sees no CUDA device: it runs on the CPU.")
        return torch.device("cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {wanted}: PyTorch sees no CUDA device here. Leave --device out to run on the CPU.")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"--device {wanted}: PyTorch knows no such device; use cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and group.size > 1:
        raise UserError(f"--device {wanted}: several processes cannot share one GPU; give --device cuda, which takes one for each.")
    return device


def limit_memory(device: torch.device, spec: TrainerSpec, num_processes: int, limit_gb: float) -> None:
    """Refuse to grow beyond a limit.

    Raises:
        UserError: the device has no limit, or the state of the model alone is above it.
    """
    if device.type != "cuda":
        raise UserError("PyTorch cannot limit its memory on a CPU: leave --memory-limit-gb out.")
    need_gb = state_bytes(spec) / 1e9 / (num_processes if spec.runtime.shard else 1)
    if need_gb > limit_gb:
        raise UserError(f"--memory-limit-gb {limit_gb:g}: the weights and their optimiser alone need {need_gb:.2f} GB.")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * 1e9 / total), device)


def compiler(runtime: RuntimeSpec, device: torch.device, notes: list[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What compiles a function of fixed shapes: `torch.compile` on a GPU or where it is asked for, else nothing.

    That it was asked for and no C++ compiler is found is noted.
    """
    if runtime.compile is False or (runtime.compile is None and device.type != "cuda"):
        return _as_it_is
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        notes.append("No C++ compiler is found, so torch.compile is off and the step runs eagerly.")
        return _as_it_is
    return functools.partial(torch.compile, dynamic=False)


def kept_bytes(model: ModelSpec | PretrainedSpec, precision: Precision, *, on_cpu: bool) -> int:
    """See `Trainer.kept_bytes`."""
    if isinstance(model, PretrainedSpec):
        return model.kept_bytes(precision)
    # Inputs of both norms in float32; queries, keys, values, mixture and both sides of the GELU in the type of products, what enters
    # a product besides. Norms of queries and keys are float32 and keep their own. Attention in fp32 keeps its own queries to mixture.
    per_width = {"gpt2": {"fp32": 64, "bf16": 36, "mixed": 46}, "qknorm": {"fp32": 76, "bf16": 50, "mixed": 54}}
    fp32_attention = precision == "bf16" and on_cpu and is_short(model.context_length, model.head_dim)
    return per_width[model.architecture]["mixed" if fp32_attention else precision] * model.width


def own_gpu() -> int:
    """The GPU that this process is going to use, before it has chosen: that of its number on this machine, where there is one."""
    return local_rank() if local_rank() < torch.cuda.device_count() else 0


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of the device where it has its own, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_memory_bytes(device: torch.device) -> int:
    """Memory in use now: of the device where it has its own, else of the process at its highest so far."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory_bytes(device)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _choose_gpu(group: Group) -> int:
    """One GPU a process: the current one, or that of this process's number on this machine."""
    if group.size == 1:
        return torch.cuda.current_device()
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs and at least {local_rank() + 1} processes of this run: "
            "start one process a GPU, or give --device cpu."
        )
    torch.cuda.set_device(local_rank())
    return local_rank()


def _gpus() -> tuple[str, ...]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return ()
    seen = tuple(name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip())
    return seen or tuple(map(str, range(torch.cuda.device_count())))
