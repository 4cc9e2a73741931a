"""Adapters and their base as one checkpoint that anything loads: a command of its own, and what `--init` and audits do by themselves."""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget import adapters, checkpoint, imported_adapters
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.durable_files import read_object, sync
from mlx_forget.errors import UserError, unknown
from mlx_forget.ladder import ModelSpec, outputs_first, param_shapes
from mlx_forget.pipeline.corpora import forget_home
from mlx_forget.pipeline.store.writing import acquire
from mlx_forget.pipeline.vocabularies import copy_tokenizer
from mlx_forget.pretrained import PretrainedSpec, names_in_files
from mlx_forget.specs import AdapterSpec
from mlx_forget.weight_files import DTYPES, read_tensor, tensor_dtype, tensor_names, weight_files, write_tensors

# Of a checkpoint's state, what a whole one has not or has anew.
_OF_ADAPTERS = ("schema_version", "files", "adapter", "adapter_file", "base")


def base_of(start: Checkpoint) -> dict[str, Any]:
    """How a checkpoint of adapters names its base."""
    return {
        "folder": str(start.folder.resolve()),
        "run_id": start.state.get("run_id"),
        "weights_sha256": start.state["files"][checkpoint.WEIGHTS],
    }


def fuse(found: Checkpoint, folder: Path, *, base: Path | None = None, dtype: str | None = None) -> Checkpoint:
    """Write a whole checkpoint of adapters and their base at `folder`, aside first.

    Args:
        base: where the base is now; None is where it was when the adapters were trained.
        dtype: what weights are written as: float32, bfloat16 or float16; None is as the base has each of them.

    Raises:
        UserError: nothing to fuse, the folder is there already, the base is missing or another one, or its numbers do not fit the type.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    if found.adapter is None:
        raise UserError(f"{found.folder} holds whole weights: there is nothing to fuse.")
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another place or remove it.")
    start = _open_base(found, base)
    if (bits := getattr(start.model_spec(), "bits", None)) is not None:
        raise UserError(
            f"{start.folder} is quantised to {bits} bits, and adapters are fused into whole weights: give its original: "
            f"forget fuse {found.folder} --base ORIGINAL -o WHOLE"
        )
    parts = imported_adapters.read_parts(found.weights, found.adapter, start.model_spec(), start.folder)
    try:
        _fuse_aside(start, found, parts, folder, dtype)
    except OSError as error:
        raise UserError(f"Cannot write {folder}: {error.strerror or error}.") from None
    return replace(checkpoint.open_checkpoint(folder), trust_remote_code=found.trust_remote_code)


def whole_checkpoint(found: Checkpoint, *, stand_in: str | None = None) -> Checkpoint:
    """A checkpoint with whole weights: itself, or its adapters fused with their base, made once and kept in the cache.

    Args:
        stand_in: the base of imported adapters where the folder that they name is not here.

    Raises:
        UserError: the base of the adapters is missing or another one.
    """
    if found.adapter is None:
        return found
    if not found.is_own:
        named = found.state["base"]["folder"]
        found = _on_base(found, None if named and Path(named).exists() else stand_in)
    parts = [found.state["base"]["weights_sha256"], found.state["files"][adapters.WEIGHTS]]
    if not found.is_own:
        # Their scale is not in their weights.
        parts.append(hashlib.sha256(json.dumps(found.state["adapter"]).encode()).hexdigest())
    if code := _code(found):
        # Code that is trusted must not be another's that came with the same weights.
        parts.append(hashlib.sha256(json.dumps(code).encode()).hexdigest())
    folder = forget_home() / "fused" / "-".join(part[:16] for part in parts)
    if folder.is_dir():
        return _kept(folder, found)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return fuse(found, folder, dtype="float32")
    except UserError:
        # Another process was faster: the folder's name says what is in it, and its checksums are checked.
        if not folder.is_dir():
            raise
        return _kept(folder, found)


def _kept(folder: Path, found: Checkpoint) -> Checkpoint:
    """What was fused before, as made from the adapters and base of now: the same weights may have lain elsewhere then."""
    kept = checkpoint.open_checkpoint(folder)
    fused_from = {**kept.state["fused_from"], "folder": str(found.folder.resolve()), "base": found.state["base"]}
    return replace(kept, state={**kept.state, "fused_from": fused_from}, trust_remote_code=found.trust_remote_code)


def _on_base(found: Checkpoint, base: str | None) -> Checkpoint:
    """Imported adapters whose base has been found, as those of a run."""
    start = _open_base(found, base)
    return replace(found, state={**found.state, "base": base_of(start)})


def _code(found: Checkpoint) -> dict[str, str]:
    """The checksums of the code that came with a checkpoint, by file name."""
    return {name: sha for name, sha in sorted(found.state["files"].items()) if name.endswith(".py") and "/" not in name}


def _open_base(found: Checkpoint, base: Path | str | None) -> Checkpoint:
    wanted = found.state["base"]
    place = wanted["folder"] if base is None else base
    way_out = f"give the folder of their own base: forget fuse {found.folder} --base BASE -o WHOLE"
    if place is None:
        raise UserError(f"{found.folder} holds adapters that do not name their base: {way_out}.")
    whose = f"run {wanted['run_id']}" if found.is_own else str(wanted["folder"])
    if found.is_own and not os.path.exists(place):
        raise UserError(f"{found.folder} holds adapters for {whose}, which is no longer at {place}: {way_out}.")
    try:
        start = whole_checkpoint(checkpoint.find_checkpoint(place, trust_remote_code=found.trust_remote_code))
    except UserError as error:
        if base is not None or found.is_own:
            raise
        raise UserError(f"{found.folder} holds adapters for {whose}. {error} Or {way_out}.") from None
    sha = start.state["files"][checkpoint.WEIGHTS]
    if wanted["weights_sha256"] not in (None, sha):
        raise UserError(
            f"{found.folder} holds adapters for {whose} (weights {wanted['weights_sha256'][:12]}), and {place} holds other weights "
            f"({sha[:12]}): {way_out}."
        )
    return start


def _fuse_aside(start: Checkpoint, found: Checkpoint, parts: imported_adapters.Parts, folder: Path, dtype: str | None) -> None:
    """Write the checkpoint beside its place, which one process does at a time, and move it there when it is whole."""
    aside = folder.with_name(f".{folder.name}.part")
    lock = acquire(aside, folder, wait=True)
    try:
        # What a killed process left.
        for path in aside.iterdir():
            path.unlink()
        _write_checkpoint(start, found, parts, aside, dtype)
        os.rename(aside, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        lock.release()


def _write_checkpoint(
    start: Checkpoint, found: Checkpoint, parts: imported_adapters.Parts, folder: Path, dtype: str | None
) -> None:
    model = start.model_spec()
    assert found.adapter is not None
    written = _write_fused(start, model, parts, found.adapter, folder / checkpoint.WEIGHTS, dtype)
    # Imported adapters come without a model's files, or with some that were written again.
    whose = found if found.is_own else start
    copy_tokenizer(whose.tokenizer, folder)
    config = read_object(found.folder / checkpoint.CONFIG) if found.is_own else checkpoint.config_of(model, start.tokenizer)
    config = {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": written}
    (folder / checkpoint.CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    checkpoint.copy_companions(whose.folder, folder, _code(whose))
    kept = {key: value for key, value in found.state.items() if key not in _OF_ADAPTERS}
    named = found.state["base"] if found.is_own else base_of(start)
    fused_from = {"folder": str(found.folder.resolve()), "adapter": found.state["adapter"], "base": named, "dtype": written}
    checkpoint.seal(folder, {**kept, "fused_from": fused_from})


def _write_fused(
    start: Checkpoint,
    model: ModelSpec | PretrainedSpec,
    parts: imported_adapters.Parts,
    adapter: AdapterSpec,
    target: Path,
    dtype: str | None,
) -> str:
    """The weights of a base with adapters in them; one tensor is in memory at a time. Returns the type of most of them."""
    shapes = param_shapes(model)
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

    # Wider types than float32 become float32.
    dtypes = {name: DTYPES[dtype] if dtype else tensor_dtype(*places[name]) for name in shapes}
    dtypes = {name: kind if kind in DTYPES.values() else "F32" for name, kind in dtypes.items()}
    write_tensors(target, shapes, tensors(), dtypes)
    sizes = Counter[str]()
    for name, shape in shapes.items():
        sizes[dtypes[name]] += math.prod(shape)
    return next(name for name, kind in DTYPES.items() if kind == sizes.most_common(1)[0][0])
