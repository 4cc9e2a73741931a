"""Adapters on the weights of a model that is a function of its weights, and their gradients written out (see `adapters`).

Before a pass, the adapters are folded: B is multiplied by the scale, and DoRA's magnitudes become the factor of every output. The model
then finds, beside a module's weight, all that its adapter adds. The vectors of IA3 are multiplied into the weights, of which the model
then knows nothing: their gradients are those of the weights, summed.

Shapes: N tokens, r rank.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_forget.adapter_dropout import FEATURE, FIRST, SECOND, SHIFTS, TOKEN
from mlx_forget.adapters import MAGNITUDE, VECTOR, A, B, fused, fused_bias, is_adapter
from mlx_forget.mlx_backend.operators import Operators
from mlx_forget.trainer import AdapterSpec

Arrays = dict[str, mx.array]
# What the gradients of a block's adapters need, by module.
Tape = dict[str, tuple[Any, ...]]

# Beside a module's own weights, once folded: |W + scale (B A)^T| and what its output is multiplied by, [out]; and, where a step drops
# inputs, the keys of its rows, uint32[B], and the share that it keeps.
LENGTH, FACTOR, KEY, KEPT = ".lora_length", ".lora_factor", ".lora_key", ".lora_kept"


def folded(weights: Arrays, adapter: AdapterSpec | None, *, outputs_first: bool = False) -> Arrays:
    """The weights with their adapters as the model reads them; without adapters, the weights themselves.

    Args:
        outputs_first: matrices are [out, in] instead of [in, out].
    """
    if adapter is None:
        return weights
    if adapter.kind == "ia3":
        return _scaled(weights, outputs_first=outputs_first)
    ready = dict(weights)
    modules = [name.removesuffix(B) for name in weights if name.endswith(B)]
    for module in modules:
        ready[module + B] = weights[module + B] * adapter.scale
        if adapter.kind == "dora":
            base = ready[module + ".weight"]
            whole = mx.addmm(base.T if outputs_first else base, ready[module + A].T, ready[module + B].T)
            ready[module + LENGTH] = mx.sqrt(whole.square().sum(axis=0))
            ready[module + FACTOR] = ready.pop(module + MAGNITUDE) / ready[module + LENGTH]
    return ready


def _scaled(weights: Arrays, *, outputs_first: bool) -> Arrays:
    """The weights with the vectors of IA3 in them."""
    ready = {name: value for name, value in weights.items() if not name.endswith(VECTOR)}
    for name, vector in weights.items():
        module = name.removesuffix(VECTOR)
        if module == name:
            continue
        ready[module + ".weight"] = ready[module + ".weight"] * (vector if outputs_first else vector.T)
        if vector.shape[1] == 1 and module + ".bias" in ready:
            ready[module + ".bias"] = ready[module + ".bias"] * vector[:, 0]
    return ready


def with_keys(ready: Arrays, adapter: AdapterSpec, keys: mx.array) -> Arrays:
    """Folded weights whose pass drops inputs by these keys, uint32[modules, B], of the modules in the order of `modules_of`."""
    modules = modules_of(ready)
    kept = mx.array(1 - adapter.dropout, dtype=mx.float32)
    own = {module + KEY: keys[number] for number, module in enumerate(modules)}
    return {**ready, **own, **{module + KEPT: kept for module in modules}}


def modules_of(weights: Mapping[str, mx.array]) -> list[str]:
    """The modules that have adapters."""
    return sorted(name.removesuffix(B) for name in weights if name.endswith(B))


def dropped(x: mx.array, key: mx.array, kept: mx.array) -> mx.array:
    """What the inputs [..., in] of an adapter are multiplied by, in their shape and type: 0, or 1 / kept; as many rows as keys."""
    shape = (len(key), x.size // (len(key) * x.shape[-1]), x.shape[-1])
    return (_stays(key, shape, kept).reshape(x.shape) / kept).astype(x.dtype)


def _stays(key: mx.array, shape: tuple[int, int, int], kept: mx.array) -> mx.array:
    """bool[B, T, in]: which inputs stay, by the hash of `mlx_forget.adapter_dropout`."""
    places, features = (mx.arange(size, dtype=mx.uint32) for size in shape[1:])
    drawn = _mixed(key[:, None] + places * TOKEN)[..., None] ^ _mixed(features * FEATURE)
    drawn = drawn * FIRST
    drawn = (drawn ^ (drawn >> 15)) * SECOND
    return (drawn >> 8) < (kept * 2**24).astype(mx.uint32)


def _mixed(x: mx.array) -> mx.array:
    first, second, last = SHIFTS
    x = (x ^ (x >> first)) * FIRST
    x = (x ^ (x >> second)) * SECOND
    return x ^ (x >> last)


def linear(x: mx.array, weights: Mapping[str, mx.array], name: str, operators: Operators, tape: Tape | None) -> mx.array:
    """[N, out] of [N, in] in the operators' type; the module `name` has a folded adapter. The tape takes what its gradient needs."""
    weight, a, b = (weights[name + part].astype(operators.dtype) for part in (".weight", A, B))
    bias = weights[name + ".bias"].astype(operators.dtype) if name + ".bias" in weights else None
    factor = weights.get(name + FACTOR)
    inputs, mask = x, None
    if name + KEY in weights:
        mask = dropped(x, weights[name + KEY], weights[name + KEPT])
        inputs = x * mask
    low = operators.matmul(inputs, a.T)
    # DoRA's factor is of the products alone.
    product = operators.matmul(x, weight) if bias is None or factor is not None else _affine(x, weight, bias, operators)
    product = _add_product(product, low, b.T, operators)
    if tape is not None:
        tape[name] = (inputs, mask, low, product if factor is not None else None)
    if factor is None:
        return product
    # In bf16, a factor near 1 would move by steps of 1/128, and smaller ones be lost.
    scaled = product.astype(mx.float32) * factor
    return (scaled if bias is None else scaled + bias).astype(operators.dtype)


def linear_gradient(
    grad: mx.array, weights: Mapping[str, mx.array], name: str, operators: Operators, grads: Arrays, tape: Tape
) -> mx.array:
    """float32[N, in] gradient of `linear`'s input from float32[N, out]; those of the folded adapter go into `grads`."""
    weight, a, b = (weights[name + part].astype(operators.dtype) for part in (".weight", A, B))
    inputs, mask, low, product = tape[name]
    if product is not None:
        grads[name + FACTOR] = (grad * product).sum(axis=0)
        grad = grad * weights[name + FACTOR]
    narrow = grad.astype(operators.dtype)
    grads[name + B] = operators.matmul(narrow.T, low).astype(mx.float32)
    grad_low = operators.matmul(narrow, b)
    grads[name + A] = operators.matmul(grad_low.T, inputs).astype(mx.float32)
    through = operators.matmul(grad_low, a)
    if mask is not None:
        through = through * mask
    return _add_product(through, narrow, weight.T, operators).astype(mx.float32)


def trained_entries(weights: Mapping[str, mx.array]) -> list[str]:
    """The entries of folded weights that have a gradient; none without adapters."""
    return [name for name in weights if name.endswith((A, B, FACTOR))]


def parameter_gradients(
    grads: Arrays, weights: Arrays, ready: Arrays, adapter: AdapterSpec | None, *, outputs_first: bool = False
) -> Arrays:
    """The gradients of the adapters' parameters from those of the folded entries; without adapters, the same.

    Args:
        weights: before they were folded.
    """
    if adapter is None:
        return grads
    if adapter.kind == "ia3":
        return {
            name: _vector_gradient(grads, weights, name.removesuffix(VECTOR), outputs_first=outputs_first)
            for name in weights
            if name.endswith(VECTOR)
        }
    found = {}
    for name, grad in grads.items():
        if name.endswith(FACTOR):
            module = name.removesuffix(FACTOR)
            found[module + MAGNITUDE] = grad / ready[module + LENGTH]
        else:
            found[name] = grad * adapter.scale if name.endswith(B) else grad
    return found


def _vector_gradient(grads: Arrays, weights: Arrays, module: str, *, outputs_first: bool) -> mx.array:
    """The gradient of a vector of IA3, [out, 1] or [1, in], from those of the weight and bias that it is folded into."""
    vector, name = weights[module + VECTOR], module + ".weight"
    part = grads[name] * weights[name]
    part = part if outputs_first else part.T
    if vector.shape[0] == 1:
        return part.sum(axis=0, keepdims=True)
    total = part.sum(axis=1, keepdims=True)
    bias = module + ".bias"
    return total + (grads[bias] * weights[bias])[:, None] if bias in weights else total


def start_magnitudes(weights: Arrays, adapter: AdapterSpec, *, outputs_first: bool = False) -> Arrays:
    """DoRA's magnitudes as those of the base."""
    if adapter.kind != "dora":
        return {}
    modules = [name.removesuffix(B) for name in weights if name.endswith(B)]
    return {module + MAGNITUDE: mx.sqrt(weights[module + ".weight"].square().sum(axis=int(outputs_first))) for module in modules}


def whole(
    weights: Mapping[str, npt.NDArray[np.float32]], adapter: AdapterSpec, *, outputs_first: bool = False
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every weight of the base in order, adapters fused in."""
    for name, value in weights.items():
        if is_adapter(name):
            continue
        module, _, kind = name.rpartition(".")
        parts = {part: weights[module + part] for part in (A, B, MAGNITUDE, VECTOR) if module + part in weights}
        if parts and kind == "bias":
            yield name, fused_bias(value, parts)
        else:
            yield name, fused(value, parts, adapter, outputs_first=outputs_first) if parts else value


def _affine(x: mx.array, weight: mx.array, bias: mx.array, operators: Operators) -> mx.array:
    return mx.addmm(bias, x, weight) if operators.dtype == mx.float32 else operators.matmul(x, weight) + bias


def _add_product(total: mx.array, a: mx.array, b: mx.array, operators: Operators) -> mx.array:
    return mx.addmm(total, a, b) if operators.dtype == mx.float32 else total + operators.matmul(a, b)
