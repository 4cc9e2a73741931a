"""The weights of an MLX trainer: at the start, which of them learn, read from files and made ready to be written."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_forget.adapters import initial_adapters, is_adapter, parameter_name, parameter_shapes
from mlx_forget.errors import UserError
from mlx_forget.ladder import linear_shapes, outputs_first
from mlx_forget.mlx_backend import lora
from mlx_forget.mlx_backend.decoder import Decoder
from mlx_forget.mlx_backend.packed import widened
from mlx_forget.pretrained import PretrainedSpec, names_in_files
from mlx_forget.trainer import TrainerSpec
from mlx_forget.weight_files import weight_files

Arrays = dict[str, mx.array]


def start_weights(spec: TrainerSpec, decoder: Decoder) -> Arrays:
    """The weights of step 0, with new adapters where the spec has some; none of a trainer that only reads."""
    if spec.runtime.reads_only:
        return {}
    weights = dict(decoder.start_weights(spec.seed))
    return weights if spec.adapter is None else with_new_adapters(weights, spec)


def with_new_adapters(base: Arrays, spec: TrainerSpec) -> Arrays:
    """A base's weights and adapters that start on it."""
    adapter, linears = spec.adapter, linear_shapes(spec.model)
    assert adapter is not None
    start = {name: mx.array(value) for name, value in initial_adapters(linears, adapter, spec.seed)}
    weights = {**base, **start}
    weights |= lora.start_magnitudes(weights, adapter, outputs_first=outputs_first(spec.model))
    return {**base, **{name: weights[name] for name in parameter_shapes(linears, adapter)}}


def read_weights(path: Path, spec: TrainerSpec, decoder: Decoder, *, or_adapters: bool = False) -> Arrays:
    """The weights of a file or a folder, float32 but for packed ones.

    Args:
        or_adapters: it may hold adapters alone.

    Raises:
        UserError: it holds the weights of another model.
    """
    found: Arrays = {}
    wanted: Mapping[str, tuple[int, ...]] = decoder.shapes
    for file in weight_files(path):
        stored = read_arrays(file)
        if or_adapters and spec.adapter is not None and any(map(is_adapter, map(parameter_name, stored))):
            stored = {parameter_name(name): value for name, value in stored.items()}
            wanted = parameter_shapes(linear_shapes(spec.model), spec.adapter)
        found |= {name: stored[old] for old, name in names_in_files(stored, wanted).items()}
    if {name: tuple(value.shape) for name, value in found.items()} != wanted:
        raise UserError(f"{path} does not hold the weights of this model: names or shapes differ.")
    return {name: widened(found[name]) for name in wanted}


def check_quantised(spec: TrainerSpec) -> None:
    """Refuse to train packed weights.

    Raises:
        UserError: the ways out.
    """
    model, adapter = spec.model, spec.adapter
    if not isinstance(model, PretrainedSpec) or model.bits is None or spec.runtime.reads_only:
        return
    if adapter is None:
        raise UserError(
            f"{model.folder} is quantised to {model.bits} bits: give --fine-tune-type lora, or its original, to train it."
        )
    if adapter.kind != "lora":
        raise UserError(f"{adapter.kind} needs whole weights, and {model.folder} is quantised: give --fine-tune-type lora.")


def read_arrays(path: Path) -> Arrays:
    """What a safetensors file holds."""
    arrays = mx.load(str(path), format="safetensors")
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return arrays


def to_numpy(arrays: Arrays) -> dict[str, npt.NDArray[np.float32]]:
    """Arrays as they are written, float32."""
    return {name: np.array(value.astype(mx.float32)) for name, value in arrays.items()}
