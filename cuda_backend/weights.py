"""The weights of a PyTorch trainer: at the start, which of them learn, and read from files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cuda_backend import lora
from cuda_backend.decoder import Decoder
from mlx_forget.adapters import initial_adapters, is_adapter, parameter_name, parameter_shapes, trained_names
from mlx_forget.errors import UserError
from mlx_forget.ladder import linear_shapes, outputs_first
from mlx_forget.pretrained import names_in_files
from mlx_forget.trainer import TrainerSpec
from mlx_forget.weight_files import weight_files

Weights = dict[str, Tensor]


def start_weights(spec: TrainerSpec, decoder: Decoder, device: torch.device) -> Weights:
    """The weights of step 0, with new adapters where the spec has some; none of a trainer that only reads."""
    if spec.runtime.reads_only:
        return {}
    weights = dict(decoder.start_weights(spec.seed))
    if spec.adapter is not None:
        shapes = parameter_shapes(linear_shapes(spec.model), spec.adapter)
        weights |= {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        weights |= new_adapters(spec, device)
        lora.restart_magnitudes(weights, outputs_first=outputs_first(spec.model))
    trained = set(trained_names(weights, spec.adapter, spec.num_layers))
    for name, value in weights.items():
        value.requires_grad_(name in trained)
    return weights


def new_adapters(spec: TrainerSpec, device: torch.device) -> Weights:
    """The factors of adapters that have learnt nothing."""
    assert spec.adapter is not None
    start = initial_adapters(linear_shapes(spec.model), spec.adapter, spec.seed)
    return {name: torch.from_numpy(value).to(device) for name, value in start}


def read_weights(path: Path, spec: TrainerSpec, decoder: Decoder, device: torch.device, *, or_adapters: bool = False) -> Weights:
    """The weights of a file or a folder, float32.

    Args:
        or_adapters: it may hold adapters alone.

    Raises:
        UserError: it holds the weights of another model.
    """
    weights: Weights = {}
    wanted: Mapping[str, tuple[int, ...]] = decoder.shapes
    for file in weight_files(path):
        stored = load_file(file, device=str(device))
        if or_adapters and spec.adapter is not None and any(map(is_adapter, map(parameter_name, stored))):
            stored = {parameter_name(name): value for name, value in stored.items()}
            wanted = parameter_shapes(linear_shapes(spec.model), spec.adapter)
        weights |= {name: stored[old].float() for old, name in names_in_files(stored, wanted).items()}
    if {name: tuple(value.shape) for name, value in weights.items()} != wanted:
        raise UserError(f"{path} does not hold the weights of this model: names or shapes differ.")
    return weights
