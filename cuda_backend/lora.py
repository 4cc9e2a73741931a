"""Adapters on the weights of a model that is a function of its weights (see `mlx_forget.adapters`).

Before a pass, the adapters are folded: B is multiplied by the scale, and DoRA's magnitudes become the factor of every output. The model
then finds, beside a module's weight, all that its adapter adds. The vectors of IA3 are multiplied into the weights (`scaled`), or, in a
module of another tool, into what enters or leaves its maps.

Shapes: N tokens, r rank.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from mlx_forget.adapters import MAGNITUDE, VECTOR, A, B, fused, fused_bias, is_adapter
from mlx_forget.trainer import AdapterSpec

Weights = Mapping[str, Tensor]

# Beside a module's own weights, once folded: what its output is multiplied by, [out].
FACTOR = ".lora_factor"
# Once for all modules, where a step drops inputs: the share that it keeps, 0-d.
KEPT = "lora_kept"


def folded(
    weights: dict[str, Tensor], adapter: AdapterSpec | None, *, training: bool = False, outputs_first: bool = False
) -> dict[str, Tensor]:
    """The weights with their adapters as the model reads them; without adapters, the weights themselves.

    Args:
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
    if training and adapter.dropout:
        ready[KEPT] = torch.tensor(1 - adapter.dropout, device=next(iter(weights.values())).device)
    return ready


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
    product = torch.addmm(product, _dropped(x, weights.get(KEPT)) @ weights[name + A].T, weights[name + B].T)
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
    product = product + _dropped(x, weights.get(KEPT)) @ weights[name + A].T @ weights[name + B].T
    if factor is None:
        return product
    return product * factor if bias is None else (product - bias) * factor + bias


def seed_dropout(seed: int, *place: int) -> None:
    """Make what the next pass drops a function of the run's seed, the step and the rows."""
    torch.manual_seed(int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0]))


@torch.no_grad()
def _lengths(ready: Weights, module: str, *, outputs_first: bool) -> Tensor:
    """|W + scale (B A)^T| of every output, [out]."""
    base = ready[module + ".weight"]
    weight = torch.addmm(base.T if outputs_first else base, ready[module + A].T, ready[module + B].T)
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=0)
    return lengths


def _dropped(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x * ((torch.rand_like(x) < kept) / kept).to(x.dtype)
