"""Adapters on the weights of a model that is a function of its weights (see `mlx_forget.adapters`).

Before a pass, the adapters are folded: B is multiplied by the scale, and DoRA's magnitudes become the factor of every output. The model
then finds, beside a module's weight, all that its adapter adds. The vectors of IA3 are multiplied into the weights (`scaled`), or, in a
module of another tool, into what enters or leaves its maps.

Shapes: N tokens, r rank.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mlx_forget.adapter_dropout import FEATURE, FIRST, SECOND, SHIFTS, TOKEN
from mlx_forget.adapters import MAGNITUDE, VECTOR, A, B, fused, fused_bias, is_adapter
from mlx_forget.trainer import AdapterSpec

Weights = Mapping[str, Tensor]

# Beside a module's own weights, once folded: what its output is multiplied by, [out].
FACTOR = ".lora_factor"
# Where a step drops inputs: the keys of its rows, int32[B], and once for all modules the share that it keeps, 0-d.
KEY, KEPT = ".lora_key", "lora_kept"


def folded(
    weights: dict[str, Tensor], adapter: AdapterSpec | None, *, keys: Tensor | None = None, outputs_first: bool = False
) -> dict[str, Tensor]:
    """The weights with their adapters as the model reads them; without adapters, the weights themselves.

    Args:
        keys: int32[modules, B], by which the pass drops inputs, of the modules in the order of `modules_of`; None drops none.
        outputs_first: matrices are [out, in] instead of [in, out].
    """
    if adapter is None:
        return weights
    ready = dict(weights)
    for name, value in weights.items():
        if not name.endswith(B):
            continue
        module = name.removesuffix(B)
        ready[name] = value * adapter.scale
        if adapter.kind == "dora":
            ready[module + FACTOR] = ready.pop(module + MAGNITUDE) / _lengths(ready, module, outputs_first=outputs_first)
    if keys is not None:
        ready |= {module + KEY: own for module, own in zip(modules_of(weights), keys.unbind(), strict=True)}
        ready[KEPT] = torch.tensor(1 - adapter.dropout, device=keys.device)
    return ready


def modules_of(weights: Weights) -> list[str]:
    """The modules that have adapters."""
    return sorted(name.removesuffix(B) for name in weights if name.endswith(B))


def scaled(weights: Weights) -> Weights:
    """The weights with the vectors of IA3 in them, of a model whose matrices are [in, out]; without vectors, the weights themselves."""
    vectors = {name.removesuffix(VECTOR): value for name, value in weights.items() if name.endswith(VECTOR)}
    if not vectors:
        return weights
    ready = {name: value for name, value in weights.items() if not name.endswith(VECTOR)}
    for module, vector in vectors.items():
        ready[module + ".weight"] = ready[module + ".weight"] * vector.T
        if vector.shape[1] == 1 and module + ".bias" in ready:
            ready[module + ".bias"] = ready[module + ".bias"] * vector[:, 0]
    return ready


def linear(x: Tensor, weights: Weights, name: str, bias: Tensor | None = None) -> Tensor:
    """[N, out] of [N, in]; the module `name` has a folded adapter."""
    weight, factor = weights[name + ".weight"], weights.get(name + FACTOR)
    product = x @ weight if bias is None or factor is not None else torch.addmm(bias, x, weight)
    product = torch.addmm(product, _dropped(x, weights, name) @ weights[name + A].T, weights[name + B].T)
    if factor is None:
        return product
    return product * factor if bias is None else torch.addcmul(bias, product, factor)


def restart_magnitudes(weights: dict[str, Tensor], *, outputs_first: bool = False) -> None:
    """Make the magnitudes those of the base, in place."""
    for name in weights:
        if name.endswith(MAGNITUDE):
            weights[name].data.copy_(weights[name.removesuffix(MAGNITUDE) + ".weight"].norm(dim=int(outputs_first)))


def whole(weights: Weights, adapter: AdapterSpec, *, outputs_first: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the base in order, adapters fused in."""
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if is_adapter(name):
            continue
        parts = {
            part: weights[module + part].detach().cpu().numpy() for part in (A, B, MAGNITUDE, VECTOR) if module + part in weights
        }
        if parts and kind == "bias":
            yield name, torch.from_numpy(fused_bias(value.detach().cpu().numpy(), parts))
        elif parts:
            yield name, torch.from_numpy(fused(value.detach().cpu().numpy(), parts, adapter, outputs_first=outputs_first))
        else:
            yield name, value


def adapted(product: Tensor, x: Tensor, weights: Weights, name: str, bias: Tensor | None) -> Tensor:
    """The output [..., out] of a module with a folded adapter, from that of the module alone and its input [..., in]."""
    factor = weights.get(name + FACTOR)
    product = product + _dropped(x, weights, name) @ weights[name + A].T @ weights[name + B].T
    if factor is None:
        return product
    return product * factor if bias is None else (product - bias) * factor + bias


@torch.no_grad()
def _lengths(ready: Weights, module: str, *, outputs_first: bool) -> Tensor:
    """|W + scale (B A)^T| of every output, [out]."""
    base = ready[module + ".weight"]
    weight = torch.addmm(base.T if outputs_first else base, ready[module + A].T, ready[module + B].T)
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=0)
    return lengths


def _dropped(x: Tensor, weights: Weights, name: str) -> Tensor:
    """The inputs [..., in] of an adapter without what its rows drop, of as many rows as there are keys."""
    key = weights.get(name + KEY)
    if key is None:
        return x
    kept, rows = weights[KEPT], x.reshape(len(key), -1, x.shape[-1])
    return (rows * (_stays(key, rows.shape[1], rows.shape[2], kept) / kept).to(x.dtype)).view(x.shape)


def _stays(key: Tensor, num_tokens: int, width: int, kept: Tensor) -> Tensor:
    """bool[B, T, width]: which inputs stay, by the hash of `mlx_forget.adapter_dropout`."""
    places, features = (torch.arange(size, dtype=torch.int32, device=key.device) for size in (num_tokens, width))
    drawn = _mixed(key[:, None] + places * TOKEN)[..., None] ^ _mixed(features * FEATURE)
    drawn = drawn * FIRST
    drawn = (drawn ^ _shifted(drawn, 15)) * SECOND
    return _shifted(drawn, 8) < (kept * 2**24).to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    first, second, last = SHIFTS
    x = (x ^ _shifted(x, first)) * FIRST
    x = (x ^ _shifted(x, second)) * SECOND
    return x ^ _shifted(x, last)


def _shifted(x: Tensor, places: int) -> Tensor:
    """A shift to the right of numbers without a sign, which int32 holds here."""
    return (x >> places) & ((1 << (32 - places)) - 1)
