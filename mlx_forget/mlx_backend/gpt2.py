"""GPT-2 in MLX as functions of a dict of weights in Hugging Face names, and the cross-entropy that never holds all logits.

Shapes: B rows, T tokens, D width, H heads, V vocabulary, N = B * T.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_forget.ladder import LAYER_NORM_EPSILON, ModelSpec
from mlx_forget.mlx_backend.operators import Operators

Weights = Mapping[str, mx.array]

# Elements of one chunk of logits: on a CPU a chunk should stay in cache, on a GPU it should fill the device.
_CHUNK_ELEMENTS_CPU = 1 << 21
_CHUNK_ELEMENTS_GPU = 1 << 27


def hidden_states(
    weights: Weights,
    spec: ModelSpec,
    tokens_BT: mx.array,
    segment_BT: mx.array | None = None,
    *,
    operators: Operators,
    grad_checkpoint: bool = False,
) -> mx.array:
    """Final hidden states float32[B, T, D] of int32[B, T] tokens; attention stays inside segments where they are given."""
    positions = weights["transformer.wpe.weight"][: tokens_BT.shape[1]]
    x_BTD = weights["transformer.wte.weight"][tokens_BT] + positions
    allowed = None if segment_BT is None else _segment_mask(segment_BT)

    def run(block_weights: Weights, x: mx.array) -> mx.array:
        return block(block_weights, spec, x, allowed, operators)

    for i in range(spec.num_layers):
        prefix = f"transformer.h.{i}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x_BTD = mx.checkpoint(run)(own, x_BTD) if grad_checkpoint else run(own, x_BTD)
    return _norm(x_BTD, weights, "transformer.ln_f")


def block(weights: Weights, spec: ModelSpec, x_BTD: mx.array, allowed: mx.array | None, operators: Operators) -> mx.array:
    """One pre-norm block; `weights` are its own, named without their prefix. The residual stream stays float32."""
    B, T, D = x_BTD.shape
    qkv = _linear(_norm(x_BTD, weights, "ln_1"), weights, "attn.c_attn", operators)
    q, k, v = qkv.reshape(B, T, 3, spec.num_heads, spec.head_dim).transpose(2, 0, 3, 1, 4)
    mixed = operators.attention(q, k, v, allowed).transpose(0, 2, 1, 3).reshape(B, T, D)
    x_BTD = x_BTD + _linear(mixed, weights, "attn.c_proj", operators)
    return x_BTD + _feed_forward(x_BTD, weights, operators)


def next_logits(
    weights: Weights,
    spec: ModelSpec,
    token_B: mx.array,
    position: int,
    cache: list[mx.array],
    operators: Operators,
) -> mx.array:
    """Logits float32[B, V] after one more token.

    `cache` holds keys and values of each layer, [2, B, H, T, head_dim], and is written at `position`.
    """
    B = len(token_B)
    x_BD = weights["transformer.wte.weight"][token_B] + weights["transformer.wpe.weight"][position]
    for i in range(spec.num_layers):
        prefix = f"transformer.h.{i}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        qkv = _linear(_norm(x_BD, own, "ln_1"), own, "attn.c_attn", operators)
        qkv = qkv.reshape(B, 3, spec.num_heads, 1, spec.head_dim).swapaxes(0, 1)
        cache[i][:, :, :, position : position + 1] = qkv[1:]
        k, v = cache[i][:, :, :, : position + 1]
        scores = (qkv[0].astype(mx.float32) * spec.head_dim**-0.5) @ k.astype(mx.float32).swapaxes(-1, -2)
        mixed = mx.softmax(scores, axis=-1).astype(v.dtype) @ v
        x_BD = x_BD + _linear(mixed.reshape(B, -1), own, "attn.c_proj", operators)
        x_BD = x_BD + _feed_forward(x_BD, own, operators)
    head = weights["transformer.wte.weight"].astype(operators.dtype)
    return operators.matmul(_norm(x_BD, weights, "transformer.ln_f").astype(operators.dtype), head.T).astype(mx.float32)


def chunk_rows(vocab_size: int, *, on_cpu: bool) -> int:
    """How many tokens' logits are held at once."""
    return max(64, (_CHUNK_ELEMENTS_CPU if on_cpu else _CHUNK_ELEMENTS_GPU) // vocab_size)


def cross_entropy(
    x: mx.array, head: mx.array, labels: mx.array, weight: mx.array, *, chunk: int, operators: Operators
) -> tuple[mx.array, mx.array]:
    """Tied head and weighted cross-entropy in chunks of rows, with the gradients made while the logits are at hand.

    Args:
        x: float32[N, D] hidden states; products run in the operators' type.
        head: float32[V, D].
        labels: int32[N].
        weight: float32[N].

    Returns:
        The objective, the sum of weight * nll, and the nll in nats, float32[N], which carries no gradient.
    """

    @mx.custom_function
    def fused(x: mx.array, head: mx.array) -> Any:
        narrow, narrow_head = x.astype(operators.dtype), head.astype(operators.dtype)
        # The label's part of the gradient, -weight * one_hot(label), never meets the logits: it is a gather and a scatter.
        grad_head = mx.zeros_like(head).at[labels].add(-weight[:, None] * x)
        nlls, grads = [], []
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            exponentials, total, nll = _exponentials(narrow[rows], narrow_head, labels[rows], operators)
            share = weight[rows, None] / total
            exponentials = exponentials.astype(operators.dtype)
            grads.append(operators.matmul(exponentials, narrow_head).astype(mx.float32) * share)
            scaled = (x[rows] * share).astype(operators.dtype)
            grad_head = _add_product(grad_head, exponentials.T, scaled, operators)
            nlls.append(nll)
        nll = mx.concatenate(nlls)
        grad_x = mx.concatenate(grads) - weight[:, None] * head[labels]
        return (nll * weight).sum(), nll, grad_x, grad_head

    @fused.vjp
    def fused_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return cotangents[0] * outputs[2], cotangents[0] * outputs[3]

    outputs: Any = fused(x, head)
    return outputs[0], mx.stop_gradient(outputs[1])


def token_nll(x: mx.array, head: mx.array, labels: mx.array, *, chunk: int, operators: Operators) -> mx.array:
    """Next-token losses in nats, float32[N], in chunks, without gradients."""
    x, head = x.astype(operators.dtype), head.astype(operators.dtype)
    chunks = [slice(start, start + chunk) for start in range(0, len(x), chunk)]
    return mx.concatenate([_exponentials(x[rows], head, labels[rows], operators)[2] for rows in chunks])


def log_probabilities(x: mx.array, head: mx.array, operators: Operators) -> mx.array:
    """float32[N, V] in nats."""
    logits = operators.matmul(x.astype(operators.dtype), head.astype(operators.dtype).T).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _exponentials(x: mx.array, head: mx.array, labels: mx.array, operators: Operators) -> tuple[mx.array, mx.array, mx.array]:
    """exp(logit - top) float32[N, V], its sum float32[N, 1], and the nll float32[N]; logits are float32 whatever the type of x."""
    logits = operators.matmul(x, head.T).astype(mx.float32)
    top = logits.max(axis=-1, keepdims=True)
    exponentials = operators.exp_below(logits, top)
    total = exponentials.sum(axis=-1, keepdims=True)
    # Not gathered from the logits: nothing else then holds them, and the exponentials take their memory.
    label_logit = (x.astype(mx.float32) * head[labels].astype(mx.float32)).sum(axis=-1, keepdims=True)
    return exponentials, total, (mx.log(total) + top - label_logit)[:, 0]


def _add_product(total: mx.array, a: mx.array, b: mx.array, operators: Operators) -> mx.array:
    if operators.dtype == mx.float32:
        return mx.addmm(total, a, b)
    return total + operators.matmul(a, b).astype(mx.float32)


def _feed_forward(x: mx.array, weights: Weights, operators: Operators) -> mx.array:
    expanded = operators.gelu(_linear(_norm(x, weights, "ln_2"), weights, "mlp.c_fc", operators))
    return _linear(expanded, weights, "mlp.c_proj", operators)


def _norm(x: mx.array, weights: Weights, name: str) -> mx.array:
    return mx.fast.layer_norm(x, weights[name + ".weight"], weights[name + ".bias"], LAYER_NORM_EPSILON)


def _linear(x: mx.array, weights: Weights, name: str, operators: Operators) -> mx.array:
    weight, bias = weights[name + ".weight"], weights[name + ".bias"]
    flat = x.reshape(-1, x.shape[-1]).astype(operators.dtype)
    if operators.dtype == mx.float32:
        product = mx.addmm(bias, flat, weight)
    else:
        product = operators.matmul(flat, weight.astype(operators.dtype)) + bias.astype(operators.dtype)
    return product.reshape(*x.shape[:-1], weight.shape[1])


def _segment_mask(segment_BT: mx.array) -> mx.array:
    same = segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
    return same & mx.tri(segment_BT.shape[1], dtype=mx.bool_)
