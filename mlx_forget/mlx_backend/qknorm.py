"""The ladder's second architecture in MLX, with its gradients written out: norms without parameters, normalised queries and keys, rotary
positions, untied head.

As Marek et al. (2026) train it. Its functions are named as those of `gpt2`, so that `architectures` makes a model of
either; it does not stack.

Shapes: B rows, T tokens, D width, H heads, E head size, V vocabulary.
"""

import math
from typing import Any

import mlx.core as mx

from mlx_forget.adapters import A
from mlx_forget.ladder import QKNORM_HEAD, RMS_NORM_EPSILON, ROPE_BASE, ModelSpec, block_prefix
from mlx_forget.mlx_backend import lora
from mlx_forget.mlx_backend.embeddings import add_rows
from mlx_forget.mlx_backend.gpt2 import Arrays, Weights
from mlx_forget.mlx_backend.operators import Operators
from mlx_forget.mlx_backend.segments import segment_mask, segment_positions

_EMBEDDING = "decoder.embed_in.weight"

Angles = tuple[mx.array, mx.array]


def begin(weights: Weights, spec: ModelSpec, tokens_BT: mx.array, segment_BT: mx.array | None) -> tuple[mx.array, tuple[Any, ...]]:
    """What enters the first block, and what every block is given besides."""
    return weights[_EMBEDDING][tokens_BT], (_angles(spec, tokens_BT, segment_BT), segment_mask(segment_BT))


def begin_gradient(
    grad: mx.array, grad_head: mx.array, weights: Weights, tokens_BT: mx.array, segment_BT: mx.array | None, grads: Arrays
) -> None:
    """Put the gradients of embedding and head into `grads`, from those of `begin`'s result and of the head."""
    grads[QKNORM_HEAD] = grad_head
    grads[_EMBEDDING] = add_rows(mx.zeros_like(weights[_EMBEDDING]), tokens_BT, grad)


def finish(weights: Weights, x_BTD: mx.array) -> mx.array:
    """Final hidden states from what leaves the last block; the norm has no weights."""
    return _norm(x_BTD)


def finish_gradient(grad: mx.array, x_BTD: mx.array, weights: Weights, grads: Arrays) -> mx.array:
    """The gradient of what `finish` is given from that of its result."""
    return _norm_gradient(grad, x_BTD)


def block(
    weights: Weights, prefix: str, spec: ModelSpec, x_BTD: mx.array, angles: Angles, allowed: mx.array | None, operators: Operators
) -> tuple[mx.array, Any]:
    """One pre-norm block, and what its gradient needs. The residual stream stays float32."""
    B, T, D = x_BTD.shape
    tape: lora.Tape = {}
    normed = _norm(x_BTD)
    qkv = _linear(normed, weights, prefix + "attn.qkv", operators, tape)
    q, k, v = qkv.reshape(B, T, 3, spec.num_heads, spec.head_dim).transpose(2, 0, 3, 1, 4)
    turned_q, turned_k = (_turned(part, *angles).astype(operators.dtype) for part in (q, k))
    mixed_BHTE, saved = operators.attention(turned_q, turned_k, v, allowed)
    mixed = mixed_BHTE.transpose(0, 2, 1, 3).reshape(B, T, D)
    middle = x_BTD + _linear(mixed, weights, prefix + "attn.out", operators, tape)
    normed_middle = _norm(middle)
    expanded = _linear(normed_middle, weights, prefix + "mlp.up", operators, tape)
    activated, gelu_saved = operators.gelu(expanded)
    out = middle + _linear(activated, weights, prefix + "mlp.down", operators, tape)
    return out, (angles, normed, q, k, saved, mixed, middle, normed_middle, expanded, gelu_saved, activated, tape)


def block_gradient(
    grad: mx.array, x: mx.array, kept: Any, weights: Weights, prefix: str, operators: Operators, grads: Arrays
) -> mx.array:
    """The gradient of a block's input from that of its output, both float32[B, T, D]; those of its weights go into `grads`."""
    angles, normed, q, k, saved, mixed, middle, normed_middle, expanded, gelu_saved, activated, tape = kept
    B, T, D = x.shape

    def back(grad: mx.array, x: mx.array, name: str) -> mx.array:
        name = prefix + name
        if name + A in weights:
            flat = grad.reshape(-1, grad.shape[-1]).astype(mx.float32)
            return lora.linear_gradient(flat, weights, name, operators, grads, tape).reshape(x.shape)
        result, grads[name + ".weight"] = _product_gradient(grad, x, weights[name + ".weight"], operators)
        return result

    inner = operators.gelu_gradient(expanded, gelu_saved, back(grad, activated, "mlp.down"))
    grad = grad + _norm_gradient(back(inner, normed_middle, "mlp.up"), middle)
    inner = back(grad, mixed, "attn.out")
    heads = inner.astype(mixed.dtype).reshape(B, T, q.shape[1], -1).transpose(0, 2, 1, 3)
    grad_q, grad_k, grad_v = operators.attention_gradient(saved, heads)
    parts = [_turned_gradient(part, own, angles) for part, own in ((grad_q, q), (grad_k, k))]
    stacked = mx.stack([*parts, grad_v.astype(mx.float32)])
    inner = stacked.transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * D)
    return grad + _norm_gradient(back(inner, normed, "attn.qkv"), x)


def next_logits(
    weights: Weights, spec: ModelSpec, token_B: mx.array, position: int, cache: list[mx.array], operators: Operators
) -> mx.array:
    """Logits float32[B, V] after one more token.

    `cache` holds rotated keys, and values, of each layer, [2, B, H, T, E], and is written at `position`.
    """
    B = len(token_B)
    x_BD = weights[_EMBEDDING][token_B]
    angles = _cos_and_sin(spec, mx.array([[position]]))
    for i in range(spec.num_layers):
        prefix = block_prefix(spec, i)
        qkv = _linear(_norm(x_BD), weights, prefix + "attn.qkv", operators)
        q, k, v = qkv.reshape(B, 3, spec.num_heads, 1, spec.head_dim).swapaxes(0, 1)
        q, k = (_turned(part, *angles).astype(operators.dtype) for part in (q, k))
        cache[i][:, :, :, position : position + 1] = mx.stack([k, v])
        keys, values = cache[i][:, :, :, : position + 1]
        scores = (q.astype(mx.float32) * spec.head_dim**-0.5) @ keys.astype(mx.float32).swapaxes(-1, -2)
        exponentials = operators.exp_below(scores, scores.max(axis=-1, keepdims=True))
        mixed = (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(values.dtype) @ values
        x_BD = x_BD + _linear(mixed.reshape(B, -1), weights, prefix + "attn.out", operators)
        activated, _ = operators.gelu(_linear(_norm(x_BD), weights, prefix + "mlp.up", operators))
        x_BD = x_BD + _linear(activated, weights, prefix + "mlp.down", operators)
    return _product(_norm(x_BD), weights[QKNORM_HEAD].T, operators).astype(mx.float32)


def _norm(x: mx.array) -> mx.array:
    """Root-mean-square norm without parameters, float32."""
    return mx.fast.rms_norm(x.astype(mx.float32), None, RMS_NORM_EPSILON)


def _norm_gradient(grad: mx.array, x: mx.array) -> mx.array:
    _, (grad_x,) = mx.vjp(_norm, [x], [grad])
    return grad_x


def _turned(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Queries or keys normalised, then rotated: the pairs are an entry of the first half and its fellow of the second; float32."""
    first, second = mx.split(_norm(x), 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _turned_gradient(grad: mx.array, x: mx.array, angles: Angles) -> mx.array:
    """A rotation's gradient is the rotation back."""
    cos, sin = angles
    first, second = mx.split(grad.astype(mx.float32), 2, axis=-1)
    back = mx.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
    return _norm_gradient(back, x.astype(mx.float32))


def _linear(x: mx.array, weights: Weights, name: str, operators: Operators, tape: lora.Tape | None = None) -> mx.array:
    weight = weights[name + ".weight"]
    if name + A not in weights:
        return _product(x, weight, operators)
    flat = x.reshape(-1, x.shape[-1]).astype(operators.dtype)
    return lora.linear(flat, weights, name, operators, tape).reshape(*x.shape[:-1], weight.shape[-1])


def _product(x: mx.array, weight: mx.array, operators: Operators) -> mx.array:
    flat = x.reshape(-1, x.shape[-1]).astype(operators.dtype)
    return operators.matmul(flat, weight.astype(operators.dtype)).reshape(*x.shape[:-1], weight.shape[-1])


def _product_gradient(grad: mx.array, x: mx.array, weight: mx.array, operators: Operators) -> tuple[mx.array, mx.array]:
    """float32 gradients of the input and of the weight of a product."""
    narrow = grad.reshape(-1, grad.shape[-1]).astype(operators.dtype)
    flat = x.reshape(-1, x.shape[-1]).astype(operators.dtype)
    grad_x = operators.matmul(narrow, weight.astype(operators.dtype).T).astype(mx.float32)
    return grad_x.reshape(x.shape), operators.matmul(flat.T, narrow).astype(mx.float32)


def _angles(spec: ModelSpec, tokens_BT: mx.array, segment_BT: mx.array | None) -> Angles:
    return _cos_and_sin(spec, mx.arange(tokens_BT.shape[1])[None] if segment_BT is None else segment_positions(segment_BT))


def _cos_and_sin(spec: ModelSpec, place_BT: mx.array) -> Angles:
    """Cosines and sines float32[B or 1, 1, T, E / 2] of the angles at int32 places."""
    half = spec.head_dim // 2
    frequency = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(ROPE_BASE) / half))
    angle = place_BT[:, None, :, None].astype(mx.float32) * frequency
    return mx.cos(angle), mx.sin(angle)
