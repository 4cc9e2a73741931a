"""Adapters as data: which modules they sit on, how they start, and the files they travel in.

An adapter of a linear map W [in, out] adds scale (x A^T) B^T to its output (Hu et al. 2022); DoRA (Liu et al. 2024) then gives every
output a length m of its own: (m / |W + scale (B A)^T|) (x W + scale (x A^T) B^T), the norm taken per output and held constant in the
gradient. IA3 (Liu et al. 2022) has no product: a vector of ones, which learns, multiplies what enters the last map of a feed-forward part
and what leaves any other map. The base is frozen. Both backends start from the arrays made here.

Parameters are named as peft names them: `MODULE.lora_A.weight` [r, in], `MODULE.lora_B.weight` [out, r],
`MODULE.lora_magnitude_vector.weight` [out], and `MODULE.ia3_l.weight` [out, 1], or [1, in] where it multiplies what enters.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.trainer import AdapterSpec

ATTENTION, ALL_LINEAR = "attention", "all-linear"
# What IA3 sits on: keys, values and the last map of a feed-forward part.
KEYS_VALUES_DOWN = "keys-values-down"
A, B, MAGNITUDE, VECTOR = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight", ".ia3_l.weight"
_PARTS = (A, B, MAGNITUDE, VECTOR)
_KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "k", "v", "c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv")
# peft writes its parameters under this name, and the magnitudes without their last part.
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# mlx-lm's file names; its configuration has the name of peft's, so that it needs a folder of its own.
MLX_LM, MLX_LM_WEIGHTS = "mlx-lm", "adapters.safetensors"

Shapes = Mapping[str, tuple[int, int]]
Arrays = dict[str, npt.NDArray[np.float32]]


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.endswith(_PARTS)


def trained_names(names: Iterable[str], adapter: AdapterSpec | None, num_layers: int | None) -> list[str]:
    """Which parameters a step changes: adapters where there are some, else the weights of the last so many blocks, or all."""
    if adapter is not None:
        return [name for name in names if is_adapter(name)]
    blocks = sorted({_block_of(name) for name in names} - {-1})
    last = None if num_layers is None else blocks[-num_layers:]
    return [name for name in names if last is None or _block_of(name) in last]


def module_of(name: str) -> str:
    """The module that an adapter's parameter belongs to."""
    return next(name.removesuffix(part) for part in _PARTS if name.endswith(part))


def adapted_modules(linears: Shapes, adapter: AdapterSpec) -> tuple[str, ...]:
    """The names of the linear maps that get an adapter, in the model's order.

    Args:
        linears: {module: (in, out)} of every linear map in the blocks of a model.

    Raises:
        UserError: a target that names no module, or a rank that is no low rank.
    """
    blocks = sorted({_block_of(name) for name in linears})
    if adapter.num_layers is not None:
        linears = {name: shape for name, shape in linears.items() if _block_of(name) in blocks[-adapter.num_layers :]}
    targets = adapter.target_modules or (KEYS_VALUES_DOWN if adapter.kind == "ia3" else ATTENTION,)
    chosen = {target: [name for name in linears if _matches(name, target, linears[name])] for target in targets}
    for target, found in chosen.items():
        if not found:
            raise UserError(
                f"--lora-target-modules {target} names no linear module of this model: give {ATTENTION}, {ALL_LINEAR}, or some of "
                f"{', '.join(dict.fromkeys(within_block(name) for name in linears))}."
            )
    wanted = {name for found in chosen.values() for name in found}
    for name in wanted:
        if adapter.kind != "ia3" and adapter.rank > min(linears[name]):
            raise UserError(
                f"--lora-rank {adapter.rank} exceeds the size of {name} ({linears[name][0]} to {linears[name][1]}): "
                "take a smaller rank, or --fine-tune-type full."
            )
    return tuple(name for name in linears if name in wanted)


def _matches(name: str, target: str, shape: tuple[int, int]) -> bool:
    if target == ALL_LINEAR:
        return True
    if target == ATTENTION:
        return _in_attention(name)
    if target == KEYS_VALUES_DOWN:
        return name.rsplit(".", 1)[-1] in _KEYS_VALUES if _in_attention(name) else _narrows(name, shape)
    return name == target or name.endswith(f".{target}")


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def _narrows(name: str, shape: tuple[int, int]) -> bool:
    """Whether a map [in, out] is the last of a feed-forward part."""
    return shape[0] > shape[1] and not _in_attention(name)


def _block_of(name: str) -> int:
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else -1


def within_block(name: str) -> str:
    """A module's name within its block: `attn.c_attn` of `transformer.h.0.attn.c_attn`."""
    match = re.match(r".*?\.\d+\.(.+)", name)
    return match[1] if match else name


def parameter_shapes(linears: Shapes, adapter: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every trained parameter under its name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in adapted_modules(linears, adapter):
        inputs, outputs = linears[name]
        if adapter.kind == "ia3":
            shapes[name + VECTOR] = (1, inputs) if _narrows(name, linears[name]) else (outputs, 1)
            continue
        shapes |= {name + A: (adapter.rank, inputs), name + B: (outputs, adapter.rank)}
        if adapter.kind == "dora":
            shapes[name + MAGNITUDE] = (outputs,)
    return shapes


def num_trainable(linears: Shapes, adapter: AdapterSpec) -> int:
    """Parameters that are trained: the P of the laws."""
    return sum(int(np.prod(shape)) for shape in parameter_shapes(linears, adapter).values())


def initial_adapters(linears: Shapes, adapter: AdapterSpec, seed: int) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield (name, float32 array): A uniform within 1 / sqrt(in), which is peft's Kaiming start, B zero, and IA3's vectors one.

    Each array draws from a counter-based generator keyed by the seed and its place. Magnitudes are not here: they are those of the base.
    """
    for index, (name, shape) in enumerate(parameter_shapes(linears, adapter).items()):
        if name.endswith(A):
            bound = shape[1] ** -0.5
            generator = np.random.Generator(np.random.Philox(key=np.array([seed, 1 << 32 | index], np.uint64)))
            yield name, generator.uniform(-bound, bound, shape).astype(np.float32)
        elif name.endswith(B):
            yield name, np.zeros(shape, np.float32)
        elif name.endswith(VECTOR):
            yield name, np.ones(shape, np.float32)


def file_name(name: str) -> str:
    """A parameter's name in the files of peft."""
    return PREFIX + (name.removesuffix(".weight") if name.endswith((MAGNITUDE, VECTOR)) else name)


def parameter_name(name: str) -> str:
    """The inverse of `file_name`."""
    name = name.removeprefix(PREFIX)
    return name if name.endswith(".weight") else f"{name}.weight"


def write_configs(folder: Path, adapter: AdapterSpec, linears: Shapes, *, base: str, num_layers: int, model_type: str) -> None:
    """Beside `WEIGHTS` in a checkpoint: peft's configuration, and mlx-lm's files in a folder of their own (it knows no IA3).

    Args:
        base: where the base model is, for peft.
        num_layers: blocks of the model.
        model_type: of the model's `config.json`.
    """
    (folder / CONFIG).write_text(json.dumps(peft_config(adapter, linears, base=base, model_type=model_type), indent=1))
    if adapter.kind == "ia3":
        return
    inner = folder / MLX_LM
    inner.mkdir()
    (inner / CONFIG).write_text(json.dumps(mlx_lm_config(adapter, linears, num_layers=num_layers), indent=1))
    _write_for_mlx_lm(folder / WEIGHTS, inner / MLX_LM_WEIGHTS, model_type)


def peft_config(adapter: AdapterSpec, linears: Shapes, *, base: str, model_type: str) -> dict[str, Any]:
    """What `PeftModel.from_pretrained` reads. A product that is not scaled is alpha / r with alpha = r."""
    modules = adapted_modules(linears, adapter)
    if adapter.kind == "ia3":
        # peft knows no layers of IA3: where it sits on some only, every module has its whole name.
        named = modules if adapter.num_layers is not None else {within_block(name) for name in modules}
        whole = parameter_shapes(linears, adapter)
        narrow = {within_block(name) for name in modules if whole[name + VECTOR][0] == 1}
        return {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "target_modules": sorted(named),
            "feedforward_modules": sorted(name for name in named if within_block(name) in narrow),
            "fan_in_fan_out": model_type == "gpt2",
            "init_ia3_weights": True,
            "inference_mode": True,
        }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.rank if adapter.scaling == "none" else adapter.alpha,
        "use_rslora": adapter.scaling == "alpha/sqrt(r)",
        "use_dora": adapter.kind == "dora",
        "lora_dropout": adapter.dropout,
        "target_modules": sorted({within_block(name) for name in modules}),
        "layers_to_transform": None if adapter.num_layers is None else sorted({_block_of(name) for name in modules}),
        "fan_in_fan_out": model_type == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }


def mlx_lm_config(adapter: AdapterSpec, linears: Shapes, *, num_layers: int) -> dict[str, Any]:
    """What mlx-lm's `--adapter-path` reads."""
    return {
        "fine_tune_type": adapter.kind,
        "num_layers": adapter.num_layers or num_layers,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": adapter.dropout,
            "keys": sorted({within_block(name) for name in adapted_modules(linears, adapter)}),
        },
    }


def _write_for_mlx_lm(source: Path, target: Path, model_type: str) -> None:
    from safetensors.numpy import load_file, save_file

    arrays: Arrays = {}
    for stored, value in load_file(source).items():
        name = parameter_name(stored)
        module = module_of(name)
        if model_type == "gpt2":
            module = "model." + module.removeprefix("transformer.")
        own = {A: ".lora_a", B: ".lora_b", MAGNITUDE: ".m"}[name.removeprefix(module_of(name))]
        arrays[module + own] = np.ascontiguousarray(value.T)
    save_file(arrays, target)


def fused(weight: npt.NDArray[np.float32], parts: Arrays, adapter: AdapterSpec, *, outputs_first: bool) -> npt.NDArray[np.float32]:
    """A weight with its adapter in it, float32 in the layout of the weight, summed in float64.

    Args:
        weight: [in, out], or [out, in] where `outputs_first`.
        parts: `A`, `B` and, of DoRA, `MAGNITUDE`; or `VECTOR`.
    """
    if VECTOR in parts:
        return np.ascontiguousarray(weight * (parts[VECTOR] if outputs_first else parts[VECTOR].T))
    whole = np.asarray(weight if outputs_first else weight.T, np.float64)
    whole = whole + adapter.scale * (parts[B].astype(np.float64) @ parts[A].astype(np.float64))
    if adapter.kind == "dora":
        whole *= (parts[MAGNITUDE] / np.linalg.norm(whole, axis=1))[:, None]
    return np.ascontiguousarray(whole if outputs_first else whole.T).astype(np.float32)


def fused_bias(bias: npt.NDArray[np.float32], parts: Arrays) -> npt.NDArray[np.float32]:
    """The bias of a module with its adapter in it: a vector of IA3 that multiplies outputs multiplies it too."""
    vector = parts.get(VECTOR)
    return bias if vector is None or vector.shape[1] != 1 else np.ascontiguousarray(bias * vector[:, 0])
