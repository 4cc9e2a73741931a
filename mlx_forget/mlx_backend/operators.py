"""The operators of a block that depend on the device: MLX's own on a GPU, written out on a CPU where its own are slow.

MLX's CPU build computes exp, tanh and erf one element at a time, without vector instructions (16 ns each, measured). The exponential
below is made of operators that `mx.compile` fuses into one loop that the C++ compiler vectorises: five times as fast, to 2.3e-7.
Attention is then exp and products in blocks of queries that skip the keys after them, with the gradient written out: it reads the scores once.

Shapes: B rows, T tokens, H heads, E head size, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBE = 0.044715
_LOG2_E = 1.4426950408889634
# Below this the result is exactly 0: half the smallest power of two that float32 holds at full precision.
_EXP_LOWEST, _EXP_HIGHEST = -127 / _LOG2_E, 88.0
# Minimax polynomial of 2^f for |f| <= 1/2 (Cephes), constant first.
_EXP2 = (1.0, 6.931472028550421e-1, 2.402264791363012e-1, 5.550332471162809e-2, 9.618437357674640e-3, 1.339887440266574e-3, 1.535336188319500e-4)
_MASKED = -1e9
_QUERY_BLOCK = 64


@dataclass(frozen=True)
class Operators:
    """How a block computes.

    Args:
        dtype: the type of products and of what enters them; sums, norms and losses are float32.
        matmul: product of two arrays of `dtype`; on a CPU low precision is multiplied in float32, the only type its BLAS has.
        attention: (q, k, v [B, H, T, E], allowed bool[B or 1, 1, T, T] or None for causal) -> [B, H, T, E].
        gelu: the tanh approximation.
        exp: of float32 arguments <= 0.
    """

    dtype: mx.Dtype
    matmul: Callable[[mx.array, mx.array], mx.array]
    attention: Callable[[mx.array, mx.array, mx.array, mx.array | None], mx.array]
    gelu: Callable[[mx.array], mx.array]
    exp: Callable[[mx.array], mx.array]


def operators(*, dtype: mx.Dtype, on_cpu: bool, compiled: bool) -> Operators:
    """The operators for a device; the written-out exponential pays only where `compiled` fuses it."""
    if not on_cpu:
        return Operators(dtype=dtype, matmul=mx.matmul, attention=_fast_attention, gelu=_gelu_by_tanh, exp=mx.exp)
    exp = _exp_by_polynomial if compiled else mx.exp
    return Operators(
        dtype=dtype,
        matmul=_matmul_in_float32,
        attention=_attention_by_blocks(exp),
        gelu=_gelu_by_exp(exp),
        exp=exp,
    )


def _fast_attention(q: mx.array, k: mx.array, v: mx.array, allowed: mx.array | None) -> mx.array:
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if allowed is None else allowed)


def _gelu_by_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(_GELU_SCALE * (x + _GELU_CUBE * x * x * x)))


def _matmul_in_float32(a: mx.array, b: mx.array) -> mx.array:
    if a.dtype == mx.float32:
        return a @ b
    return (a.astype(mx.float32) @ b.astype(mx.float32)).astype(a.dtype)


def _exp_by_polynomial(x: mx.array) -> mx.array:
    """exp of float32 arguments up to 88, without a gradient of its own.

    2^y is 2^n 2^f; n + 127 is the exponent of the float whose bits are made by a shift.
    """
    y = mx.maximum(x, _EXP_LOWEST) * _LOG2_E
    biased = (y + 127.5).astype(mx.int32)
    f = y - (biased.astype(mx.float32) - 127.0)
    c, f2 = _EXP2, f * f
    low = (c[0] + c[1] * f) + f2 * (c[2] + c[3] * f)
    high = (c[4] + c[5] * f) + c[6] * f2
    return (low + (f2 * f2) * high) * (biased * (1 << 23)).view(mx.float32)


def _gelu_by_exp(exp: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """tanh GELU as x * sigmoid(2u), whose gradient needs no second exponential."""

    @mx.custom_function
    def gelu(x: mx.array) -> Any:
        minus_2u = x * (-2 * _GELU_SCALE) * (1 + _GELU_CUBE * x * x)
        sigmoid = 1 / (1 + exp(mx.minimum(minus_2u, _EXP_HIGHEST)))
        return x * sigmoid, sigmoid

    @gelu.vjp
    def gelu_vjp(x: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        s = outputs[1]
        return cotangents[0] * s * (1 + x * (1 - s) * (2 * _GELU_SCALE) * (1 + 3 * _GELU_CUBE * x * x))

    def apply(x: mx.array) -> mx.array:
        y: mx.array = gelu(x.astype(mx.float32))[0]
        return y.astype(x.dtype)

    return apply


def _attention_by_blocks(
    exp: Callable[[mx.array], mx.array],
) -> Callable[[mx.array, mx.array, mx.array, mx.array | None], mx.array]:
    """Attention in float32, one block of queries at a time."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array, bias: mx.array) -> Any:
        scores = q @ k.swapaxes(-1, -2) + bias
        weights = exp(scores - scores.max(axis=-1, keepdims=True))
        inverse = 1 / weights.sum(axis=-1, keepdims=True)
        return (weights @ v) * inverse, weights, inverse

    @attend.vjp
    def attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        q, k, v, bias = primals
        mixed, weights, inverse = outputs
        grad = cotangents[0] * inverse
        row = (grad * mixed).sum(axis=-1, keepdims=True)
        grad_scores = weights * (grad @ v.swapaxes(-1, -2) - row)
        grad_k, grad_v = grad_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ grad
        return grad_scores @ k, grad_k, grad_v, mx.zeros_like(bias)

    def attention(q: mx.array, k: mx.array, v: mx.array, allowed: mx.array | None) -> mx.array:
        dtype, length = q.dtype, q.shape[2]
        q, k, v = (x.astype(mx.float32) for x in (q * q.shape[-1] ** -0.5, k, v))
        if allowed is None:
            allowed = mx.tri(length, dtype=mx.bool_)[None, None]
        bias = mx.where(allowed, 0.0, _MASKED)
        blocks = []
        for start in range(0, length, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, length)
            past = bias[:, :, start:stop, :stop]
            blocks.append(attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], past)[0])
        return mx.concatenate(blocks, axis=2).astype(dtype)

    return attention
