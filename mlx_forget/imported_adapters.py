"""Adapters that peft or mlx-lm trained: read as the change of weights that they are, exactly, or refused in a sentence.

    adapter_config.json, adapter_model.safetensors    peft: LoRA (alpha/r, rsLoRA), DoRA, IA3
    adapter_config.json, adapters.safetensors         mlx-lm: LoRA, DoRA

Neither says which weights it was trained on but by a name, so that only names and shapes can be checked against a base.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget.adapters import (
    CONFIG,
    MAGNITUDE,
    MLX_LM_WEIGHTS,
    VECTOR,
    WEIGHTS,
    A,
    Arrays,
    B,
    is_adapter,
    module_of,
    parameter_name,
)
from mlx_forget.durable_files import read_object
from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec, linear_shapes
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.specs import AdapterSpec
from mlx_forget.weight_files import read_tensor, refuse_pickles, tensor_names

Parts = dict[str, Arrays]

_WAY_OUT = (
    "Merge it with its base where it was made (peft's merge_and_unload and save_pretrained, or mlx_lm.fuse), and give the result."
)
# Keys of peft's configuration that change nothing in what a finished adapter computes, or that are read here.
_KNOWN = frozenset(
    "peft_type auto_mapping peft_version task_type base_model_name_or_path revision inference_mode r lora_alpha lora_dropout use_rslora "
    "use_dora init_lora_weights init_ia3_weights target_modules exclude_modules feedforward_modules layers_to_transform layers_pattern "
    "fan_in_fan_out bias megatron_core qalora_group_size eva_config ensure_weight_tying runtime_config".split()
)
# Other ways to start change the base, and what is stored is a change of that.
_STARTS: tuple[Any, ...] = (None, True, False, "gaussian", "eva", "orthogonal")
_MLX_LM_PARTS = {".lora_a": A, ".lora_b": B, ".m": MAGNITUDE}


@dataclass(frozen=True)
class ImportedAdapter:
    """What the files of another tool's adapter say.

    Args:
        weights: its file.
        spec: kind, rank and scaling.
        base: its base's folder or Hub id, as its author's machine knew it; None where nothing is said.
    """

    weights: Path
    spec: AdapterSpec
    base: str | None


def is_imported(folder: Path) -> bool:
    """Whether a folder holds another tool's adapter and no whole model."""
    return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def read_adapter(folder: Path) -> ImportedAdapter:
    """The facts of an adapter; its weights are not read.

    Raises:
        UserError: a damaged or missing file, pickled weights, or a kind of adapter that is no such change of weights.
    """
    try:
        config = read_object(folder / CONFIG)
    except (OSError, ValueError):
        raise UserError(f"{folder / CONFIG} is damaged: fetch the adapter again.") from None
    by_mlx_lm = "lora_parameters" in config or "fine_tune_type" in config
    weights = folder / (MLX_LM_WEIGHTS if by_mlx_lm else WEIGHTS)
    try:
        spec, base = _of_mlx_lm(config) if by_mlx_lm else _of_peft(config)
    except _NotExpressed as what:
        raise UserError(f"{folder}: {what}, which is not read here. {_WAY_OUT}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder / CONFIG} does not describe an adapter: {error!r}.") from None
    if not weights.is_file():
        refuse_pickles(folder)
        raise UserError(f"{folder} lacks {weights.name}: fetch the adapter again.")
    return ImportedAdapter(weights, spec, base)


class _NotExpressed(Exception):
    """What an adapter has that no `AdapterSpec` says."""


def _of_peft(config: Mapping[str, Any]) -> tuple[AdapterSpec, str | None]:
    kind = config["peft_type"]
    if kind not in ("LORA", "IA3"):
        raise _NotExpressed(f"an adapter of peft's type {kind}")
    for key, value in config.items():
        if key not in _KNOWN and value:
            raise _NotExpressed(f"an adapter with {key}")
    if config.get("bias", "none") != "none":
        raise _NotExpressed(f"an adapter with bias: {config['bias']}")
    if not any(config.get("init_lora_weights") is start or config.get("init_lora_weights") == start for start in _STARTS):
        raise _NotExpressed(f"an adapter that started as {config['init_lora_weights']}, which changes the base")
    base, revision = _text(config.get("base_model_name_or_path")), _text(config.get("revision"))
    if base and revision and not os.path.exists(base):
        base = f"{base}@{revision}"
    if kind == "IA3":
        return AdapterSpec(kind="ia3"), base
    spec = AdapterSpec(
        kind="dora" if config.get("use_dora") else "lora",
        rank=_positive(config["r"]),
        alpha=_number(config["lora_alpha"]),
        scaling="alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
    )
    return spec, base


def _of_mlx_lm(config: Mapping[str, Any]) -> tuple[AdapterSpec, str | None]:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise _NotExpressed(f"a finetune of mlx-lm's type {kind}")
    parameters = config["lora_parameters"]
    rank = _positive(parameters["rank"])
    return AdapterSpec(kind=kind, rank=rank, alpha=_number(parameters["scale"]) * rank), _text(config.get("model"))


def _text(value: Any) -> str | None:
    """A name; None where nothing is said."""
    if not isinstance(value, (str, type(None))):
        raise ValueError(value)
    return value or None


def _positive(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(value)
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def read_parts(weights: Path, spec: AdapterSpec, model: ModelSpec | PretrainedSpec, base: Path) -> Parts:
    """Every adapted module's arrays, float32, in the names and layouts of `adapters`.

    Args:
        weights: the file, of any tool that is read here.
        model: the shape of the base in `base`.

    Raises:
        UserError: parameters of another kind, an incomplete adapter, or modules or shapes that the base does not have.
    """
    by_mlx_lm = weights.name == MLX_LM_WEIGHTS
    linears = linear_shapes(model)
    head = dict(model.shapes).get("lm_head.weight") if isinstance(model, PretrainedSpec) else None
    if head is not None:
        linears["lm_head"] = (head[1], head[0])
    parts: Parts = {}
    for stored in tensor_names(weights):
        module, part = _place(stored, linears, by_mlx_lm=by_mlx_lm)
        if part is None:
            raise UserError(f"{weights} holds {stored}, which is no factor of a linear map and is not read here. {_WAY_OUT}")
        if module not in linears:
            raise UserError(f"{weights} has an adapter for {module}, which is no linear map of {base}: give its own base.")
        value = read_tensor(weights, stored)
        parts.setdefault(module, {})[part] = value.T if by_mlx_lm else value.reshape(-1) if part == MAGNITUDE else value
    if not parts:
        raise UserError(f"{weights} holds no adapter.")
    for module, own in parts.items():
        _check(own, spec, linears[module], f"{weights}: the adapter of {module}", base)
    return parts


def _place(stored: str, linears: Mapping[str, Any], *, by_mlx_lm: bool) -> tuple[str, str | None]:
    """(module, part) of a parameter's name in a file; the part is None for what belongs to no adapter."""
    if not by_mlx_lm:
        name = parameter_name(stored)
        if not is_adapter(name):
            return stored, None
        return module_of(name), name.removeprefix(module_of(name))
    module, _, kind = stored.rpartition(".")
    renamed = "transformer." + module.removeprefix("model.")
    return (renamed if module not in linears and renamed in linears else module), _MLX_LM_PARTS.get(f".{kind}")


def _check(own: Arrays, spec: AdapterSpec, shape: tuple[int, int], what: str, base: Path) -> None:
    inputs, outputs = shape
    found = {part: value.shape for part, value in own.items()}
    if spec.kind == "ia3":
        if found not in ({VECTOR: (outputs, 1)}, {VECTOR: (1, inputs)}):
            raise UserError(f"{what} is not as long as its inputs or outputs in {base}: give its own base.")
        return
    wanted = {A, B, MAGNITUDE} if spec.kind == "dora" else {A, B}
    if set(found) != wanted:
        raise UserError(f"{what} has the parts {', '.join(sorted(found))} instead of {', '.join(sorted(wanted))}: fetch it again.")
    rank = found[A][0]
    if (found[A], found[B], found.get(MAGNITUDE, (outputs,))) != ((rank, inputs), (outputs, rank), (outputs,)):
        raise UserError(f"{what} does not fit the map of {inputs} to {outputs} in {base}: give its own base.")
    if rank != spec.rank:
        raise UserError(f"{what} has rank {rank}, where {CONFIG} says {spec.rank}. {_WAY_OUT}")
