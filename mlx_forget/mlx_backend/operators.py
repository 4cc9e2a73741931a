"""The operators of a block that depend on the device: MLX's own on a GPU, written out on a CPU where its own are slow.

MLX's CPU build computes exp, tanh and erf one element at a time, without vector instructions (16 ns each, measured). The exponential
below is made of operators that `mx.compile` fuses into loops that the C++ compiler vectorises: five times as fast, to 2.3e-7.
Attention is then exp and products in blocks of queries that skip the keys after them, with the gradient written out.

Each fused loop costs a run of the C++ compiler (a second) the first time a machine meets it, so on a CPU only these few operators
are compiled, and the rest of a step is not: its operators are products and copies, which fusing does not help.

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
_EXP2 = (
    1.0,
    6.931472028550421e-1,
    2.402264791363012e-1,
    5.550332471162809e-2,
    9.618437357674640e-3,
    1.339887440266574e-3,
    1.535336188319500e-4,
)
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
        exp_below: (x [..., K], top [..., 1]) -> exp(x - top) for x <= top, float32, without a gradient.
    """

    dtype: mx.Dtype
    matmul: Callable[[mx.array, mx.array], mx.array]
    attention: Callable[[mx.array, mx.array, mx.array, mx.array | None], mx.array]
    gelu: Callable[[mx.array], mx.array]
    exp_below: Callable[[mx.array, mx.array], mx.array]


def operators(*, dtype: mx.Dtype, on_cpu: bool, fused: bool) -> Operators:
    """The operators for a device; on a CPU `fused` says whether `mx.compile` can be used."""
    if not on_cpu:
        return Operators(dtype, matmul=mx.matmul, attention=_fast_attention, gelu=_gelu_by_tanh, exp_below=_exp_below)
    exp_below = _fused_exp_below if fused else _exp_below
    return Operators(
        dtype,
        matmul=_matmul_in_float32,
        attention=_attention_by_blocks(exp_below, _fused_score_gradient if fused else _score_gradient),
        gelu=_fused_gelu if fused else _gelu_by_tanh,
        exp_below=exp_below,
    )


def _fast_attention(q: mx.array, k: mx.array, v: mx.array, allowed: mx.array | None) -> mx.array:
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if allowed is None else allowed)


def _gelu_by_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(_GELU_SCALE * (x + _GELU_CUBE * x * x * x)))


def _exp_below(x: mx.array, top: mx.array) -> mx.array:
    return mx.exp(x - top)


def _matmul_in_float32(a: mx.array, b: mx.array) -> mx.array:
    if a.dtype == mx.float32:
        return a @ b
    return (a.astype(mx.float32) @ b.astype(mx.float32)).astype(a.dtype)


def _exp(x: mx.array) -> mx.array:
    """exp of float32 arguments up to 88; it has no gradient.

    2^y is 2^n 2^f; n + 127 is the exponent of the float whose bits are made by a shift.
    """
    y = mx.maximum(x, _EXP_LOWEST) * _LOG2_E
    biased = (y + 127.5).astype(mx.int32)
    f = y - (biased.astype(mx.float32) - 127.0)
    c, f2 = _EXP2, f * f
    low = (c[0] + c[1] * f) + f2 * (c[2] + c[3] * f)
    high = (c[4] + c[5] * f) + c[6] * f2
    return (low + (f2 * f2) * high) * (biased * (1 << 23)).view(mx.float32)


@mx.compile
def _fused_exp_below(x: mx.array, top: mx.array) -> mx.array:
    return _exp(x - top)


@mx.compile
def _gelu_forward(x: mx.array) -> tuple[mx.array, mx.array]:
    """tanh GELU as x * sigmoid(2u), and the sigmoid: with it the gradient needs no second exponential."""
    minus_2u = x * (-2 * _GELU_SCALE) * (1 + _GELU_CUBE * x * x)
    sigmoid = 1 / (1 + _exp(mx.minimum(minus_2u, _EXP_HIGHEST)))
    return x * sigmoid, sigmoid


@mx.compile
def _gelu_gradient(x: mx.array, sigmoid: mx.array, cotangent: mx.array) -> mx.array:
    slope = (2 * _GELU_SCALE) * (1 + 3 * _GELU_CUBE * x * x)
    return cotangent * sigmoid * (1 + x * (1 - sigmoid) * slope)


@mx.custom_function
def _gelu(x: mx.array) -> Any:
    return _gelu_forward(x)


@_gelu.vjp
def _gelu_vjp(x: mx.array, cotangents: Any, outputs: Any) -> mx.array:
    return _gelu_gradient(x, outputs[1], cotangents[0])


def _fused_gelu(x: mx.array) -> mx.array:
    outputs: Any = _gelu(x.astype(mx.float32))
    y: mx.array = outputs[0]
    return y.astype(x.dtype)


def _score_gradient(weights: mx.array, grad: mx.array, row: mx.array) -> mx.array:
    return weights * (grad - row)


_fused_score_gradient = mx.compile(_score_gradient)


def _attention_by_blocks(
    exp_below: Callable[[mx.array, mx.array], mx.array],
    score_gradient: Callable[[mx.array, mx.array, mx.array], mx.array],
) -> Callable[[mx.array, mx.array, mx.array, mx.array | None], mx.array]:
    """Attention in float32, one block of queries at a time."""

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array, bias: mx.array) -> Any:
        scores = q @ k.swapaxes(-1, -2) + bias
        weights = exp_below(scores, scores.max(axis=-1, keepdims=True))
        inverse = 1 / weights.sum(axis=-1, keepdims=True)
        return (weights @ v) * inverse, weights, inverse

    @attend.vjp
    def attend_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        q, k, v, bias = primals
        mixed, weights, inverse = outputs
        grad = cotangents[0] * inverse
        row = (grad * mixed).sum(axis=-1, keepdims=True)
        grad_scores = score_gradient(weights, grad @ v.swapaxes(-1, -2), row)
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
            outputs: Any = attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], past)
            blocks.append(outputs[0])
        return mx.concatenate(blocks, axis=2).astype(dtype)

    return attention
