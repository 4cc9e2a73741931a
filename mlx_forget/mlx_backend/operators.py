"""The operators of a block that depend on the device: MLX's own on a GPU, written out on a CPU where its own are slow.

MLX's CPU build computes exp, tanh and erf one element at a time, without vector instructions (16 ns each, measured). The exponential
below is made of operators that `mx.compile` fuses into loops that the C++ compiler vectorises: five times as fast, to 2.3e-7.
Attention is then exp and products in blocks of queries that skip the keys after them.

Each fused loop costs a run of the C++ compiler (a second) the first time a machine meets it, so on a CPU only these few operators
are compiled, and the rest of a step is not: its operators are products and copies, which fusing does not help. Operators that are
compiled by themselves run unfused inside `mx.grad`, so each comes with its gradient, and the model's is written out in `architectures.py`.

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


Saved = Any


@dataclass(frozen=True)
class Operators:
    """How a block computes. What an operator saves for its gradient is its own affair.

    Args:
        dtype: the type of products and of what enters them; sums, norms and losses are float32.
        matmul: product of two arrays of `dtype`; on a CPU low precision is multiplied in float32, the only type its BLAS has.
        attention: (q, k, v [B, H, T, E], allowed bool[B or 1, 1, T, T] or None for causal) -> mixed [B, H, T, E], saved.
        attention_gradient: (saved, gradient of mixed) -> gradients of q, k and v.
        gelu: the tanh approximation, x -> y, saved.
        gelu_gradient: (x, saved, gradient of y) -> gradient of x, float32.
        exp_below: (x [..., K], top [..., 1]) -> exp(x - top) for x <= top, float32.
    """

    dtype: mx.Dtype
    matmul: Callable[[mx.array, mx.array], mx.array]
    attention: Callable[[mx.array, mx.array, mx.array, mx.array | None], tuple[mx.array, Saved]]
    attention_gradient: Callable[[Saved, mx.array], tuple[mx.array, mx.array, mx.array]]
    gelu: Callable[[mx.array], tuple[mx.array, Saved]]
    gelu_gradient: Callable[[mx.array, Saved, mx.array], mx.array]
    exp_below: Callable[[mx.array, mx.array], mx.array]


def operators(*, dtype: mx.Dtype, on_cpu: bool, fused: bool) -> Operators:
    """The operators for a device; on a CPU `fused` says whether `mx.compile` can be used."""
    if not on_cpu:
        return Operators(
            dtype,
            matmul=mx.matmul,
            attention=_fast_attention,
            attention_gradient=_fast_attention_gradient,
            gelu=_gelu_by_tanh,
            gelu_gradient=_gelu_by_tanh_gradient,
            exp_below=_exp_below,
        )
    exp_below = _fused_exp_below if fused else _exp_below
    attention, attention_gradient = _attention_by_blocks(exp_below, _fused_score_gradient if fused else _score_gradient)
    return Operators(
        dtype,
        matmul=_matmul_in_float32,
        attention=attention,
        attention_gradient=attention_gradient,
        gelu=_gelu_by_exp if fused else _gelu_by_tanh,
        gelu_gradient=_gelu_by_exp_gradient if fused else _gelu_by_tanh_gradient,
        exp_below=exp_below,
    )


def _fast_attention(q: mx.array, k: mx.array, v: mx.array, allowed: mx.array | None) -> tuple[mx.array, Saved]:
    return _scaled_dot_product_attention(q, k, v, allowed), (q, k, v, allowed)


def _fast_attention_gradient(saved: Saved, grad: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    *inputs, allowed = saved
    _, (grad_q, grad_k, grad_v) = mx.vjp(lambda q, k, v: _scaled_dot_product_attention(q, k, v, allowed), inputs, [grad])
    return grad_q, grad_k, grad_v


def _scaled_dot_product_attention(q: mx.array, k: mx.array, v: mx.array, allowed: mx.array | None) -> mx.array:
    scale = q.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if allowed is None else allowed)


def _gelu_by_tanh(x: mx.array) -> tuple[mx.array, Saved]:
    wide = x.astype(mx.float32)
    tanh = mx.tanh(_GELU_SCALE * (wide + _GELU_CUBE * wide * wide * wide))
    return (0.5 * wide * (1 + tanh)).astype(x.dtype), tanh


def _gelu_by_tanh_gradient(x: mx.array, tanh: Saved, grad: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBE * x * x)
    result: mx.array = grad * 0.5 * (1 + tanh + x * (1 - tanh * tanh) * slope)
    return result


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
def _exp_below_2d(x: mx.array, top: mx.array) -> mx.array:
    return _exp(x - top)


def _fused_exp_below(x: mx.array, top: mx.array) -> mx.array:
    # In two dimensions whatever the shape: each number of dimensions would be another loop to compile.
    return _exp_below_2d(x.reshape(-1, x.shape[-1]), top.reshape(-1, 1)).reshape(x.shape)


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


def _gelu_by_exp(x: mx.array) -> tuple[mx.array, Saved]:
    y, sigmoid = _gelu_forward(x.astype(mx.float32))
    return y.astype(x.dtype), sigmoid


def _gelu_by_exp_gradient(x: mx.array, sigmoid: Saved, grad: mx.array) -> mx.array:
    return _gelu_gradient(x.astype(mx.float32), sigmoid, grad)


def _score_gradient(weights: mx.array, grad: mx.array, row: mx.array) -> mx.array:
    return weights * (grad - row)


_score_gradient_2d = mx.compile(_score_gradient)


def _fused_score_gradient(weights: mx.array, grad: mx.array, row: mx.array) -> mx.array:
    columns = (-1, weights.shape[-1])
    return _score_gradient_2d(weights.reshape(columns), grad.reshape(columns), row.reshape(-1, 1)).reshape(weights.shape)


def _attention_by_blocks(
    exp_below: Callable[[mx.array, mx.array], mx.array], score_gradient: Callable[[mx.array, mx.array, mx.array], mx.array]
) -> tuple[Callable[..., tuple[mx.array, Saved]], Callable[..., tuple[mx.array, mx.array, mx.array]]]:
    """Attention in float32, one block of queries at a time, and its gradient."""

    def attention(q: mx.array, k: mx.array, v: mx.array, allowed: mx.array | None) -> tuple[mx.array, Saved]:
        dtype, length = q.dtype, q.shape[2]
        q, k, v = (x.astype(mx.float32) for x in (q * q.shape[-1] ** -0.5, k, v))
        if allowed is None:
            allowed = mx.tri(length, dtype=mx.bool_)[None, None]
        bias = mx.where(allowed, 0.0, _MASKED)
        blocks, kept = [], []
        for start in range(0, length, _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, length)
            scores = q[:, :, start:stop] @ k[:, :, :stop].swapaxes(-1, -2) + bias[:, :, start:stop, :stop]
            weights = exp_below(scores, scores.max(axis=-1, keepdims=True))
            inverse = 1 / weights.sum(axis=-1, keepdims=True)
            blocks.append((weights @ v[:, :, :stop]) * inverse)
            kept.append((slice(start, stop), weights, inverse, blocks[-1]))
        return mx.concatenate(blocks, axis=2).astype(dtype), (q, k, v, kept)

    def attention_gradient(saved: Saved, grad: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v, kept = saved
        grad = grad.astype(mx.float32)
        grads_q: list[mx.array] = []
        grad_k, grad_v = mx.zeros_like(k), mx.zeros_like(v)
        for rows, weights, inverse, mixed in kept:
            past = slice(0, rows.stop)
            part = grad[:, :, rows] * inverse
            row = (part * mixed).sum(axis=-1, keepdims=True)
            grad_scores = score_gradient(weights, part @ v[:, :, past].swapaxes(-1, -2), row)
            grads_q.append(grad_scores @ k[:, :, past])
            grad_k[:, :, past] = grad_k[:, :, past] + grad_scores.swapaxes(-1, -2) @ q[:, :, rows]
            grad_v[:, :, past] = grad_v[:, :, past] + weights.swapaxes(-1, -2) @ part
        return mx.concatenate(grads_q, axis=2) * q.shape[-1] ** -0.5, grad_k, grad_v

    return attention, attention_gradient
