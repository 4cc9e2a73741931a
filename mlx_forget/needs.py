"""What each purpose needs, and what of it this machine lacks: packages by the extras of pyproject.toml, and what pip cannot install."""

import os
import platform
import shutil
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_forget.errors import unknown

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_DISTRIBUTION = "mlx-forget"
_PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


@dataclass(frozen=True)
class Need:
    """A purpose.

    Args:
        name: what `forget doctor` calls it.
        purpose: what it is for.
        ways: extras of this package, together enough; any one of the ways will do, and the first is proposed where several lack as much.
        beyond: what it needs or should be known of it besides packages: sentences about what is missing, then other ones.
    """

    name: str
    purpose: str
    ways: tuple[tuple[str, ...], ...]
    beyond: Callable[[], tuple[list[str], list[str]]] = lambda: ([], [])


@dataclass(frozen=True)
class Found:
    """What a purpose lacks here.

    Args:
        least: the packages that are enough.
        missing: of the way that lacks least, packages with the versions they must have, and in parentheses the ones they have; then sentences about what no package is.
        install: the command that brings the packages; "" where none is missing.
        notes: sentences worth knowing.
    """

    need: Need
    least: str
    missing: tuple[str, ...]
    install: str
    notes: tuple[str, ...]

    @property
    def is_ready(self) -> bool:
        return not self.missing


def _is_apple_silicon() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def _of_mlx() -> tuple[list[str], list[str]]:
    if _is_apple_silicon():
        return [], []
    if platform.system() != "Linux":
        return [f"MLX runs on Macs with Apple silicon and on Linux, not on {platform.system()} {platform.machine()}"], []
    slow = [] if shutil.which("g++") else ["without g++ its loops are not compiled: slower (install g++)"]
    return [], ["on Linux on the CPU; on the GPU of Macs with Apple silicon", *slow]


def _of_cuda() -> tuple[list[str], list[str]]:
    notes = []
    if _version("torch") is not None and "+cpu" in str(_version("torch")):
        notes.append(
            "this PyTorch is built for CPUs: for a GPU, pip install torch --index-url https://download.pytorch.org/whl/cu128"
        )
    if not shutil.which("nvidia-smi"):
        notes.append("no NVIDIA driver (nvidia-smi): PyTorch runs on the CPU")
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        notes.append("no C++ compiler: steps run eagerly")
    return [], notes


def _of_lora() -> tuple[list[str], list[str]]:
    places = {"peft": "CHECKPOINT", "mlx-lm": "CHECKPOINT/mlx-lm"}
    readers = [f"{name} loads it from {place}" for name, place in places.items() if _version(name) is not None]
    extra = "mlx" if _is_apple_silicon() else "peft"
    return [], readers or [f"to load it outside of this tool: {_install((extra,))}"]


def _of_tracking() -> tuple[list[str], list[str]]:
    lacking = [name for name in ("tensorboard", "wandb") if _lacking(name)]
    return [], [f"for --log-to {name}: {_install((name,))}" for name in lacking] if len(lacking) == 1 else []


def _of_slurm() -> tuple[list[str], list[str]]:
    if shutil.which("sbatch"):
        return [], []
    return ["sbatch is not on the PATH: run on a login node (--slurm cluster=local tries it without Slurm)"], []


def _of_ray() -> tuple[list[str], list[str]]:
    address = os.environ.get("RAY_ADDRESS")
    return [], [f"RAY_ADDRESS is {address}" if address else "RAY_ADDRESS is not set: --engine ray starts Ray on this machine"]


def _of_hub() -> tuple[list[str], list[str]]:
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    return [], ["HF_HUB_OFFLINE is set: only what is in the Hub's cache is found"] if offline else []


_BACKENDS = (("mlx",), ("cuda",)) if _is_apple_silicon() else (("cuda",), ("mlx",))
NEEDS = (
    Need("mlx", "train with MLX (Macs)", (("mlx",),), _of_mlx),
    Need("cuda", "train with PyTorch (NVIDIA GPUs, CPUs)", (("cuda",),), _of_cuda),
    Need("hf-mlx", "Hugging Face models with MLX", (("mlx", "hf"),), _of_hub),
    Need("hf-cuda", "Hugging Face models with PyTorch", (("cuda", "hf"),), _of_hub),
    Need("hub", "data sets and models from the Hub", (("hf",),), _of_hub),
    Need("lora", "train LoRA, export it for peft and mlx-lm", _BACKENDS, _of_lora),
    Need("eval", "lm-eval tasks in an audit", (("eval",),)),
    Need("ray", "sweeps on a Ray cluster", (("ray",),), _of_ray),
    Need("slurm", "sweeps on a Slurm cluster", (("slurm",),), _of_slurm),
    Need("tracking", "losses in TensorBoard or Weights & Biases", (("tensorboard",), ("wandb",)), _of_tracking),
)


def look(names: Iterable[str] = ()) -> list[Found]:
    """What the purposes of these names lack; without names, what every purpose lacks.

    Raises:
        UserError: a name that is none.
    """
    known = {need.name: need for need in NEEDS}
    wanted = list(names) or list(known)
    for name in wanted:
        if name not in known:
            raise unknown("purpose", name, known)
    return [_look(known[name]) for name in dict.fromkeys(wanted)]


def _look(need: Need) -> Found:
    # What an extra has nothing of for this machine, it does not bring here.
    ways = [way for way in need.ways if all(_requirements(extra) for extra in way)] or need.ways
    lacking = {way: {extra: _lacking(extra) for extra in way} for way in ways}
    found = min(lacking.values(), key=lambda extras: sum(map(len, extras.values())))
    packages = list(dict.fromkeys(package for own in found.values() for package in own))
    extras = tuple(extra for extra, own in found.items() if own)
    least = [", ".join(f"{one.name}{one.specifier}" for extra in way for one in _requirements(extra)) for way in ways]
    missing, notes = need.beyond()
    return Found(need, "; or ".join(least), (*packages, *missing), _install(extras) if extras else "", tuple(notes))


def _install(extras: tuple[str, ...]) -> str:
    return f"pip install -U '{_DISTRIBUTION}[{','.join(extras)}]'"


def _lacking(extra: str) -> list[str]:
    """The packages of an extra that are not installed here, or too old."""
    found = []
    for wanted in _requirements(extra):
        own = _version(wanted.name)
        if own is None:
            found.append(f"{wanted.name}{wanted.specifier}")
        elif not wanted.specifier.contains(own, prereleases=True):
            found.append(f"{wanted.name}{wanted.specifier} (here {own})")
    return found


def _requirements(extra: str) -> "list[Requirement]":
    """The requirements of an extra on this machine: of the source tree that runs, else of the installed package."""
    from packaging.requirements import Requirement

    if _PYPROJECT.is_file():
        texts = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"][extra]
    else:
        texts = [text for text in requires(_DISTRIBUTION) or [] if f'extra == "{extra}"' in text or f"extra == '{extra}'" in text]
    wanted = [Requirement(text) for text in texts]
    return [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": extra})]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
