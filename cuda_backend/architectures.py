"""The ladder's models in PyTorch, made of the blocks of their architecture.

Shapes: B rows, T tokens, D width. A stack of K models is one dict whose weights all have a leading dimension K (see `gpt2`).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cuda_backend import gpt2, qknorm
from cuda_backend.gpt2 import Weights
from mlx_forget.ladder import ModelSpec, block_prefix


def functions_of(spec: ModelSpec) -> ModuleType:
    """The module with an architecture's `begin`, `block`, `finish` and `next_logits`."""
    return {"gpt2": gpt2, "qknorm": qknorm}[spec.architecture]


def hidden_states(
    weights: Weights,
    spec: ModelSpec,
    tokens_BT: Tensor,
    segment_BT: Tensor | None = None,
    *,
    grad_checkpoint: bool = False,
) -> Tensor:
    """Final hidden states [B, T, D] of int64[B, T] tokens; segments, where given, are as if each were alone.

    Of a stack: [K * B, T, D] of int64[K, B, T].
    """
    functions = functions_of(spec)
    x_BTD, context = functions.begin(weights, spec, tokens_BT, segment_BT)
    for i in range(spec.num_layers):
        if grad_checkpoint and torch.is_grad_enabled():
            x_BTD = checkpoint(functions.block, weights, block_prefix(spec, i), spec, x_BTD, *context, use_reentrant=False)
        else:
            x_BTD = functions.block(weights, block_prefix(spec, i), spec, x_BTD, *context)
    states: Tensor = functions.finish(weights, x_BTD)
    return states


def hidden_states_of_two(
    weights: Weights, reference: Weights, spec: ModelSpec, tokens_BT: Tensor, *, shared: int
) -> tuple[Tensor, Tensor]:
    """Final hidden states [B, T, D] of two models; the first `shared` blocks are those of both and computed once."""
    functions, states = functions_of(spec), []
    x_BTD, context = functions.begin(weights, spec, tokens_BT, None)
    start = None if shared < 0 else _through_blocks(x_BTD, weights, spec, range(shared), context)
    for own in (weights, reference):
        x_BTD = functions.begin(own, spec, tokens_BT, None)[0] if start is None else start
        states.append(functions.finish(own, _through_blocks(x_BTD, own, spec, range(max(0, shared), spec.num_layers), context)))
    return states[0], states[1]


def _through_blocks(x_BTD: Tensor, weights: Weights, spec: ModelSpec, blocks: range, context: tuple[Any, ...]) -> Tensor:
    for i in blocks:
        x_BTD = functions_of(spec).block(weights, block_prefix(spec, i), spec, x_BTD, *context)
    return x_BTD
