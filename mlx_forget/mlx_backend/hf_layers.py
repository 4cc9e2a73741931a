"""Layers of mlx-lm's modules that do more than their own class: linear maps with adapters, blocks that recompute their activations."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_forget.adapters import A, B
from mlx_forget.mlx_backend import lora
from mlx_forget.mlx_backend.packed import is_floating

# What a linear map with a folded adapter holds besides its own.
ADAPTER_PARTS = ("lora_A", "lora_B", "lora_factor", "lora_key", "lora_kept")


def checkpointed(kind: type) -> Callable[..., Any]:
    """How a block of this kind is called so that it recomputes its activations in the backward pass."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        def run(parameters: Any, *inner: Any, **named: Any) -> Any:
            layer.update(parameters)
            return kind.__call__(layer, *inner, **named)

        # Keys of dropout and packed weights have no gradient, and stay where they are.
        own: dict[str, mx.array] = dict(tree_flatten(layer.parameters()))
        floats = [(name, value) for name, value in own.items() if is_floating(value)]
        return mx.checkpoint(run)(tree_unflatten(floats), *args, **kwargs)

    return call


def adapted(kind: type) -> Callable[..., Any]:
    """How a linear map of this kind is called so that it adds what its adapter adds; a 0-d entry stands for none."""

    def call(layer: Any, x: mx.array) -> mx.array:
        product: mx.array = kind.__call__(layer, x)
        if layer["lora_A"].ndim == 0:
            return product
        inputs = x
        if layer["lora_key"].ndim:
            inputs = x * lora.dropped(x, layer["lora_key"], layer["lora_kept"])
        product = product + (inputs @ layer["lora_A"].T) @ layer["lora_B"].T
        if layer["lora_factor"].ndim == 0:
            return product
        # The factor is float32: in bf16 it would move by steps of 1/128.
        bias = layer["bias"].astype(mx.float32) if "bias" in layer else mx.zeros(())
        whole: mx.array = (product.astype(mx.float32) - bias) * layer["lora_factor"] + bias
        return whole.astype(product.dtype)

    return call


def within_module(name: str) -> str:
    """The name of an adapter's entry within the module tree: `MODULE.lora_A` of `MODULE.lora_A.weight`."""
    return name.removesuffix(".weight") if name.endswith((A, B)) else name
