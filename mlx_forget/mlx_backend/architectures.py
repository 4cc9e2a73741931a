"""The ladder's models in MLX, made of the blocks of their architecture, with the gradient written out.

By hand, it lets the cross-entropy hold a chunk of logits at a time, and keeps compiled operators fused (see `operators.py`).

Shapes: B rows, T tokens, D width, N = B * T. A stack of K models is one dict whose weights all have a leading dimension K (see `gpt2`).
"""

from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_forget.ladder import ModelSpec, block_prefix, head_name
from mlx_forget.mlx_backend import gpt2, lora, qknorm
from mlx_forget.mlx_backend.gpt2 import Weights
from mlx_forget.mlx_backend.losses import KLTerm, objective
from mlx_forget.mlx_backend.operators import Operators


def functions_of(spec: ModelSpec) -> ModuleType:
    """The module with an architecture's `begin`, `block`, `finish`, their gradients, and `next_logits`."""
    return {"gpt2": gpt2, "qknorm": qknorm}[spec.architecture]


def hidden_states(
    weights: Weights, spec: ModelSpec, tokens_BT: mx.array, segment_BT: mx.array | None = None, *, operators: Operators
) -> mx.array:
    """Final hidden states float32[B, T, D] of int32[B, T] tokens; segments, where given, are as if each were alone."""
    functions = functions_of(spec)
    x_BTD, context = functions.begin(weights, spec, tokens_BT, segment_BT)
    states: mx.array = functions.finish(weights, _through_blocks(x_BTD, weights, spec, range(spec.num_layers), context, operators))
    return states


def hidden_states_of_two(
    weights: Weights, reference: Weights, spec: ModelSpec, tokens_BT: mx.array, *, shared: int, operators: Operators
) -> tuple[mx.array, mx.array]:
    """Final hidden states float32[B, T, D] of two models; the first `shared` blocks are those of both and computed once."""
    functions, states = functions_of(spec), []
    x_BTD, context = functions.begin(weights, spec, tokens_BT, None)
    start = None if shared < 0 else _through_blocks(x_BTD, weights, spec, range(shared), context, operators)
    for own in (weights, reference):
        x_BTD = functions.begin(own, spec, tokens_BT, None)[0] if start is None else start
        x_BTD = _through_blocks(x_BTD, own, spec, range(max(0, shared), spec.num_layers), context, operators)
        states.append(functions.finish(own, x_BTD))
    return states[0], states[1]


def gradients(
    weights: Weights,
    spec: ModelSpec,
    tokens_BT: mx.array,
    labels_BT: mx.array,
    weight_BT: mx.array,
    segment_BT: mx.array | None = None,
    *,
    chunk: int,
    operators: Operators,
    grad_checkpoint: bool = False,
    penalty: KLTerm | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Next-token losses in nats, float32[B, T], and the float32 gradients of their sum weighted by float32[B, T].

    Of a stack, tokens, labels, weights, segments and losses are [K, B, T].
    `grad_checkpoint` keeps the inputs of each block only and computes the block again on the way back. With a `penalty`, which a stack
    does not have, the losses are those of its `nll_rows`, followed by the KL of its `kl_rows`, float32[n + k, T], and the gradients
    those of both terms. Of weights with folded adapters, the gradients are those of the adapters' entries alone.
    """
    functions = functions_of(spec)
    x_BTD, context = functions.begin(weights, spec, tokens_BT, segment_BT)
    inputs: list[mx.array] = []
    saved: list[Any] = []
    for i in range(spec.num_layers):
        inputs.append(x_BTD)
        x_BTD, kept = functions.block(weights, block_prefix(spec, i), spec, x_BTD, *context, operators)
        saved.append(None if grad_checkpoint else kept)

    def states_of(reference: Weights, tokens: mx.array, segment: mx.array | None) -> mx.array:
        return hidden_states(reference, spec, tokens, segment, operators=operators)

    final, name = functions.finish(weights, x_BTD), head_name(spec)
    losses, grad_final, grad_head = objective(
        final, weights[name], name, tokens_BT, labels_BT, weight_BT, segment_BT, penalty, chunk, operators, states_of
    )
    grads: dict[str, mx.array] = {}
    grad = functions.finish_gradient(grad_final.reshape(x_BTD.shape), x_BTD, weights, grads)
    for i in reversed(range(spec.num_layers)):
        prefix, kept = block_prefix(spec, i), saved.pop()
        if grad_checkpoint:
            # Without the dependency, nothing would stop the evaluation from computing every block again at once.
            _, kept = functions.block(weights, prefix, spec, mx.depends([inputs[i]], [grad])[0], *context, operators)
        grad = functions.block_gradient(grad, inputs.pop(), kept, weights, prefix, operators, grads)
    functions.begin_gradient(grad, grad_head, weights, tokens_BT, segment_BT, grads)
    return losses, {name: grads[name] for name in lora.trained_entries(weights) or weights}


def _through_blocks(
    x_BTD: mx.array, weights: Weights, spec: ModelSpec, blocks: range, context: tuple[Any, ...], operators: Operators
) -> mx.array:
    for i in blocks:
        x_BTD, _ = functions_of(spec).block(weights, block_prefix(spec, i), spec, x_BTD, *context, operators)
    return x_BTD
