"""The table of backends: where each is, which are installed, which one `--backend auto` takes."""

import importlib
import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from mlx_forget.distributed import Group, launched_rank, launcher
from mlx_forget.errors import UserError, unknown

if TYPE_CHECKING:
    from mlx_forget.trainer import Trainer


@dataclass(frozen=True)
class Backend:
    """A row of the registry: where the trainer is, what it needs, how to get that, and what starts it as several processes."""

    trainer: str
    requires: str
    install: str
    launcher: str = "its own launcher"


BACKENDS: dict[str, Backend] = {
    "mlx": Backend("mlx_forget.mlx_backend.backend:MLXBackend", "mlx.core", "pip install 'mlx-forget[mlx]'", "mlx.launch"),
    "cuda": Backend("cuda_backend.backend:TorchBackend", "torch", "pip install 'mlx-forget[cuda]'", "torchrun"),
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


def load_backend(name: str) -> type["Trainer"]:
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
