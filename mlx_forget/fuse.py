"""Adapters and their base as one checkpoint that anything loads: a command of its own, and what `--init` and audits do by themselves."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget import adapters, checkpoint
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.durable_files import sync
from mlx_forget.errors import UserError
from mlx_forget.ladder import outputs_first, param_shapes
from mlx_forget.pipeline.corpora import forget_home
from mlx_forget.pipeline.store.writing import acquire
from mlx_forget.pipeline.vocabularies import copy_tokenizer
from mlx_forget.pretrained import names_in_files, read_tensor, tensor_names, weight_files, write_tensors


def base_of(start: Checkpoint) -> dict[str, Any]:
    """How a checkpoint of adapters names its base."""
    return {
        "folder": str(start.folder.resolve()),
        "run_id": start.state.get("run_id"),
        "weights_sha256": start.state["files"][checkpoint.WEIGHTS],
    }


def fuse(found: Checkpoint, folder: Path, *, base: Path | None = None) -> Checkpoint:
    """Write a whole checkpoint of adapters and their base at `folder`, aside first.

    Args:
        base: where the base is now; None is where it was when the adapters were trained.

    Raises:
        UserError: nothing to fuse, the folder is there already, or the base is missing or another one.
    """
    if found.adapter is None:
        raise UserError(f"{found.folder} holds whole weights: there is nothing to fuse.")
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another place or remove it.")
    start = _open_base(found, base)
    try:
        _fuse_aside(start, found, folder)
    except OSError as error:
        raise UserError(f"Cannot write {folder}: {error.strerror or error}.") from None
    except UserError:
        # Another process was faster; what it wrote is checked below.
        if not folder.is_dir():
            raise
    return replace(checkpoint.open_checkpoint(folder), trust_remote_code=found.trust_remote_code)


def whole_checkpoint(found: Checkpoint) -> Checkpoint:
    """A checkpoint with whole weights: itself, or its adapters fused with their base, made once and kept in the cache.

    Raises:
        UserError: the base of the adapters is missing or another one.
    """
    if found.adapter is None:
        return found
    parts = [found.state["base"]["weights_sha256"], found.state["files"][adapters.WEIGHTS]]
    if code := _code(found):
        # Code that is trusted must not be another's that came with the same weights.
        parts.append(hashlib.sha256(json.dumps(code).encode()).hexdigest())
    folder = forget_home() / "fused" / "-".join(part[:16] for part in parts)
    if folder.is_dir():
        return replace(checkpoint.open_checkpoint(folder), trust_remote_code=found.trust_remote_code)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return fuse(found, folder)


def _code(found: Checkpoint) -> dict[str, str]:
    """The checksums of the code that came with a checkpoint, by file name."""
    return {name: sha for name, sha in sorted(found.state["files"].items()) if name.endswith(".py") and "/" not in name}


def _open_base(found: Checkpoint, base: Path | None) -> Checkpoint:
    wanted = found.state["base"]
    place = Path(wanted["folder"]) if base is None else base
    if not place.exists():
        raise UserError(
            f"{found.folder} holds adapters for run {wanted['run_id']}, which is no longer at {place}: give its folder with --base."
        )
    start = whole_checkpoint(checkpoint.find_checkpoint(place, trust_remote_code=found.trust_remote_code))
    sha = start.state["files"][checkpoint.WEIGHTS]
    if sha != wanted["weights_sha256"]:
        raise UserError(
            f"{found.folder} holds adapters for run {wanted['run_id']} (weights {wanted['weights_sha256'][:12]}), and {place} holds "
            f"other weights ({sha[:12]}): give the folder of their own base with --base."
        )
    return start


def _fuse_aside(start: Checkpoint, found: Checkpoint, folder: Path) -> None:
    """Write the checkpoint beside its place, which one process does at a time, and move it there when it is whole."""
    aside = folder.with_name(f".{folder.name}.part")
    lock = acquire(aside, folder, wait=True)
    try:
        # What a killed process left.
        for path in aside.iterdir():
            path.unlink()
        _write_checkpoint(start, found, aside)
        os.rename(aside, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _write_checkpoint(start: Checkpoint, found: Checkpoint, folder: Path) -> None:
    _write_fused(start, found, folder / checkpoint.WEIGHTS)
    copy_tokenizer(found.tokenizer, folder)
    shutil.copyfile(found.folder / checkpoint.CONFIG, folder / checkpoint.CONFIG)
    checkpoint.copy_companions(found.folder, folder, _code(found))
    kept = {key: value for key, value in found.state.items() if key not in ("schema_version", "files", "adapter", "base")}
    fused_from = {"folder": str(found.folder.resolve()), "adapter": found.state["adapter"], "base": found.state["base"]}
    checkpoint.seal(folder, {**kept, "fused_from": fused_from})


def _write_fused(start: Checkpoint, found: Checkpoint, target: Path) -> None:
    """The weights of a base with adapters in them, float32; one tensor is in memory at a time."""
    from safetensors.numpy import load_file

    adapter, model = found.adapter, start.model_spec()
    assert adapter is not None
    parts: dict[str, adapters.Arrays] = {}
    for file_name, value in load_file(found.weights).items():
        name = adapters.parameter_name(file_name)
        module = adapters.module_of(name)
        parts.setdefault(module, {})[name.removeprefix(module)] = value
    shapes = param_shapes(model)
    for name in {f"{module}.weight" for module in parts} - set(shapes):
        raise UserError(f"{found.weights} has adapters for {name}, which {start.folder} does not have.")
    places = {
        name: (file, name_in_file)
        for file in weight_files(start.weights)
        for name_in_file, name in names_in_files(tensor_names(file), shapes).items()
    }

    def tensors() -> Iterator[npt.NDArray[np.float32]]:
        for name in shapes:
            value = read_tensor(*places[name])
            module, _, kind = name.rpartition(".")
            own = parts.get(module)
            if own is None:
                yield value
            elif kind == "bias":
                yield adapters.fused_bias(value, own)
            else:
                yield adapters.fused(value, own, adapter, outputs_first=outputs_first(model))

    write_tensors(target, shapes, tensors())
