"""The device of an MLX trainer: which one, what it can do, its memory, its threads, and whether steps are compiled for it."""

import os
import resource
import shutil
import sys
from typing import Any

import mlx.core as mx

from mlx_forget.costs import state_bytes
from mlx_forget.errors import OutOfMemory, UserError
from mlx_forget.methods import TERM_REPLAY_KL, TERM_REPLAY_NTP, TERM_TASK
from mlx_forget.mlx_backend import BLAS_NOTE
from mlx_forget.mlx_backend.distributed import num_local_ranks
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.trainer import Capabilities, ModelSpec, Precision, RuntimeSpec, TrainerSpec

_GIGABYTE = 1e9


def capabilities() -> Capabilities:
    """What this backend can do here."""
    gpu = gpu_available()
    return Capabilities(
        precisions=("fp32", "bf16"),
        terms=(TERM_TASK, TERM_REPLAY_NTP, TERM_REPLAY_KL),
        adapters=("lora", "dora", "ia3"),
        anchor=True,
        fisher=True,
        sample=True,
        distributed=True,
        stack=True,
        accelerator=gpu,
        fast_bf16=gpu,
    )


def choose_device(wanted: str | None, notes: list[str]) -> bool:
    """Make the device MLX's default; returns whether it is a CPU, which is noted.

    Raises:
        UserError: there is no such device.
    """
    gpu = gpu_available()
    if wanted in ("gpu", "metal") and not gpu:
        raise UserError(f"--device {wanted}: MLX sees no GPU here. Leave --device out to run on the CPU.")
    if wanted not in (None, "cpu", "gpu", "metal"):
        raise UserError(f"--device {wanted}: MLX knows no such device; use cpu or gpu.")
    on_cpu = wanted == "cpu" or not gpu
    if wanted is not None:
        mx.set_default_device(mx.Device(mx.cpu if on_cpu else mx.gpu))
    if on_cpu:
        notes.append("MLX runs on the CPU." if gpu else "MLX sees no GPU: it runs on the CPU.")
        notes.extend([BLAS_NOTE] if BLAS_NOTE else [])
    return on_cpu


def make_streams(num_threads: int | None, *, on_cpu: bool) -> list[mx.Stream]:
    """One stream per thread on Linux; Apple's BLAS and a GPU have threads of their own."""
    first = mx.default_stream(mx.default_device())
    if not on_cpu or sys.platform != "linux":
        return [first]
    count = num_threads or max(1, len(os.sched_getaffinity(0)) // num_local_ranks())
    return [first, *_extra_cpu_streams(count - 1)]


def can_compile(runtime: RuntimeSpec, notes: list[str], *, on_cpu: bool) -> bool:
    """Whether `mx.compile` is wanted and works here; that a CPU lacks its compiler is noted."""
    if runtime.compile is False:
        return False
    if on_cpu and shutil.which("g++") is None:
        notes.append("No C++ compiler (g++) is found, so mx.compile is off and the step runs eagerly.")
        return False
    return True


def limit_memory(spec: TrainerSpec) -> None:
    """Tell MLX the limit of a spec, where it has one.

    Raises:
        UserError: the state of the model alone is above it.
    """
    limit = spec.runtime.memory_limit_gb
    if limit is None:
        return
    need = state_bytes(spec) / _GIGABYTE
    if limit < need and not spec.runtime.reads_only:
        raise UserError(
            f"--memory-limit-gb {limit:g} is below what this model needs: {need:.3g} GB for weights, gradients and moments alone."
        )
    mx.set_memory_limit(int(limit * _GIGABYTE))
    mx.set_cache_limit(int(limit * _GIGABYTE / 4))
    mx.reset_peak_memory()


def check_memory(limit_gb: float | None, last: mx.array) -> None:
    """Refuse to go on above the limit, once the last step is computed.

    Raises:
        OutOfMemory: what the step took, and the ways out.
    """
    if limit_gb is None:
        return
    mx.eval(last)
    need = mx.get_peak_memory() / _GIGABYTE
    if need > limit_gb:
        raise OutOfMemory(
            f"A step needs {need:.3g} GB, --memory-limit-gb is {limit_gb:g}: lower --micro-batch-size, or use --grad-checkpoint."
        )


def memory_bytes() -> int | None:
    """What a GPU can hold; None of a CPU."""
    size = device_info().get("max_recommended_working_set_size") if gpu_available() else None
    return None if size is None else int(size)


def kept_bytes(model: ModelSpec | PretrainedSpec, precision: Precision, *, on_cpu: bool) -> int:
    """See `Trainer.kept_bytes`."""
    if isinstance(model, PretrainedSpec):
        return model.kept_bytes(precision)
    # The gradient that is written out keeps both norms in float32 too, and the inner derivative of the GELU. A CPU attends in float32
    # and keeps its weights.
    per_width = {"gpt2": {"fp32": 80, "bf16": 56}, "qknorm": {"fp32": 112, "bf16": 76}}
    attended = 4 * model.num_heads * model.context_length if on_cpu else 0
    return per_width[model.architecture][precision] * model.width + attended


def peak_memory_bytes(*, on_cpu: bool) -> int:
    """The most memory so far: of the device where it has its own, else of the process."""
    if not on_cpu:
        return int(mx.get_peak_memory())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_memory_bytes(*, on_cpu: bool) -> int:
    """Memory in use now: of the device where it has its own, else of the process at its highest so far."""
    return peak_memory_bytes(on_cpu=True) if on_cpu else int(mx.get_active_memory())


def gpu_available() -> bool:
    """Whether MLX has a GPU here, by the documented check of its version."""
    return bool(mx.is_available(mx.Device(mx.gpu)) if hasattr(mx, "is_available") else mx.metal.is_available())


def device_info() -> dict[str, Any]:
    """What MLX says of its GPU."""
    info: dict[str, Any] = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    return info


_EXTRA_STREAMS: list[mx.Stream] = []


def _extra_cpu_streams(count: int) -> list[mx.Stream]:
    """Streams beside the default one, made once per process: each is a thread that lives as long."""
    while len(_EXTRA_STREAMS) < count:
        _EXTRA_STREAMS.append(mx.new_stream(mx.Device(mx.cpu)))
    return _EXTRA_STREAMS[:count]
