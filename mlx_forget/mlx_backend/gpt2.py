"""The blocks of GPT-2 in MLX as functions of a dict of weights in Hugging Face names, with their gradients written out; `architectures`
makes a model of them.

The gradients are by hand because compiled operators lose their fusion inside `mx.grad` (see `operators.py`).

Shapes: B rows, T tokens, D width, H heads, V vocabulary. A stack of K models is one dict whose weights all have a leading
dimension K; tokens are then [K, B, T], the rows of all members go through the blocks as [K * B, T, D], and products are batched.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_forget.adapters import A
from mlx_forget.ladder import LAYER_NORM_EPSILON, ModelSpec, block_prefix
from mlx_forget.mlx_backend import lora
from mlx_forget.mlx_backend.embeddings import add_rows, read_rows
from mlx_forget.mlx_backend.operators import Operators
from mlx_forget.mlx_backend.segments import segment_mask, segment_positions

Weights = Mapping[str, mx.array]
Arrays = dict[str, mx.array]


def begin(weights: Weights, spec: ModelSpec, tokens_BT: mx.array, segment_BT: mx.array | None) -> tuple[mx.array, tuple[Any, ...]]:
    """What enters the first block, [B, T, D], of a stack [K * B, T, D]; and what every block is given besides."""
    return _embed(weights, tokens_BT, segment_BT), (segment_mask(segment_BT),)


def begin_gradient(
    grad: mx.array, grad_head: mx.array, weights: Weights, tokens_BT: mx.array, segment_BT: mx.array | None, grads: Arrays
) -> None:
    """Put the gradients of the embeddings into `grads`, from those of `begin`'s result and of the head, which is the token embedding."""
    grads["transformer.wte.weight"] = add_rows(grad_head, tokens_BT, grad)
    *members, length, width = weights["transformer.wpe.weight"].shape
    if segment_BT is None:
        positions = grad.reshape(*tokens_BT.shape, width).sum(axis=-3)
        unused = mx.zeros((*members, length - positions.shape[-2], width))
        grads["transformer.wpe.weight"] = mx.concatenate([positions, unused], axis=-2)
    else:
        unused = mx.zeros((*members, length, width))
        grads["transformer.wpe.weight"] = add_rows(unused, segment_positions(segment_BT), grad)


def finish(weights: Weights, x_BTD: mx.array) -> mx.array:
    """Final hidden states from what leaves the last block."""
    return _norm(x_BTD, weights, "transformer.ln_f")


def finish_gradient(grad: mx.array, x_BTD: mx.array, weights: Weights, grads: Arrays) -> mx.array:
    """The gradient of what `finish` is given from that of its result; those of its weights go into `grads`."""
    return _norm_gradient(grad, x_BTD, weights, "transformer.ln_f", grads)


def block(
    weights: Weights, prefix: str, spec: ModelSpec, x_BTD: mx.array, allowed: mx.array | None, operators: Operators
) -> tuple[mx.array, Any]:
    """One pre-norm block, and what its gradient needs. The residual stream stays float32."""
    B, T, D = x_BTD.shape
    tape: lora.Tape = {}
    normed = _norm(x_BTD, weights, prefix + "ln_1")
    qkv = _linear(normed, weights, prefix + "attn.c_attn", operators, tape)
    q, k, v = qkv.reshape(B, T, 3, spec.num_heads, spec.head_dim).transpose(2, 0, 3, 1, 4)
    mixed_BHTE, saved = operators.attention(q, k, v, allowed)
    mixed = mixed_BHTE.transpose(0, 2, 1, 3).reshape(B, T, D)
    middle = x_BTD + _linear(mixed, weights, prefix + "attn.c_proj", operators, tape)
    normed_middle = _norm(middle, weights, prefix + "ln_2")
    expanded = _linear(normed_middle, weights, prefix + "mlp.c_fc", operators, tape)
    activated, gelu_saved = operators.gelu(expanded)
    out = middle + _linear(activated, weights, prefix + "mlp.c_proj", operators, tape)
    return out, (normed, saved, mixed, middle, normed_middle, expanded, gelu_saved, activated, tape)


def block_gradient(
    grad: mx.array, x: mx.array, kept: Any, weights: Weights, prefix: str, operators: Operators, grads: Arrays
) -> mx.array:
    """The gradient of a block's input from that of its output, both float32[B, T, D]; those of its weights go into `grads`."""
    normed, saved, mixed, middle, normed_middle, expanded, gelu_saved, activated, tape = kept
    B, T, D = x.shape
    inner = _linear_gradient(grad, activated, weights, prefix + "mlp.c_proj", operators, grads, tape)
    inner = operators.gelu_gradient(expanded, gelu_saved, inner)
    inner = _linear_gradient(inner, normed_middle, weights, prefix + "mlp.c_fc", operators, grads, tape)
    grad = grad + _norm_gradient(inner, middle, weights, prefix + "ln_2", grads)
    inner = _linear_gradient(grad, mixed, weights, prefix + "attn.c_proj", operators, grads, tape)
    heads = inner.astype(mixed.dtype).reshape(B, T, saved[0].shape[1], -1).transpose(0, 2, 1, 3)
    parts = mx.stack(list(operators.attention_gradient(saved, heads)))
    inner = parts.transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * D)
    inner = _linear_gradient(inner, normed, weights, prefix + "attn.c_attn", operators, grads, tape)
    # Attention does not change when one vector is added to all keys: their bias has no gradient, and AdamW would turn the rounding
    # error of that zero into steps.
    bias = prefix + "attn.c_attn.bias"
    if bias in grads:
        query, key, value = mx.split(grads[bias], 3, axis=-1)
        grads[bias] = mx.concatenate([query, mx.zeros_like(key), value], axis=-1)
    return grad + _norm_gradient(inner, x, weights, prefix + "ln_1", grads)


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
        prefix = block_prefix(spec, i)
        qkv = _linear(_norm(x_BD, weights, prefix + "ln_1"), weights, prefix + "attn.c_attn", operators)
        qkv = qkv.reshape(B, 3, spec.num_heads, 1, spec.head_dim).swapaxes(0, 1)
        cache[i][:, :, :, position : position + 1] = qkv[1:]
        k, v = cache[i][:, :, :, : position + 1]
        scores = (qkv[0].astype(mx.float32) * spec.head_dim**-0.5) @ k.astype(mx.float32).swapaxes(-1, -2)
        exponentials = operators.exp_below(scores, scores.max(axis=-1, keepdims=True))
        mixed = (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(v.dtype) @ v
        x_BD = x_BD + _linear(mixed.reshape(B, -1), weights, prefix + "attn.c_proj", operators)
        expanded, _ = operators.gelu(_linear(_norm(x_BD, weights, prefix + "ln_2"), weights, prefix + "mlp.c_fc", operators))
        x_BD = x_BD + _linear(expanded, weights, prefix + "mlp.c_proj", operators)
    head = weights["transformer.wte.weight"].astype(operators.dtype)
    return operators.matmul(_norm(x_BD, weights, "transformer.ln_f").astype(operators.dtype), head.T).astype(mx.float32)


def _embed(weights: Weights, tokens_BT: mx.array, segment_BT: mx.array | None = None) -> mx.array:
    """Token and position embeddings [B, T, D], of a stack [K * B, T, D]; places are counted within segments where they are given."""
    table, positions = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    if segment_BT is None:
        placed = positions[..., None, : tokens_BT.shape[-1], :]
    else:
        placed = read_rows(positions, segment_positions(segment_BT))
    return (read_rows(table, tokens_BT) + placed).reshape(-1, tokens_BT.shape[-1], table.shape[-1])


def _norm(x: mx.array, weights: Weights, name: str) -> mx.array:
    return _layer_norm(x, weights[name + ".weight"], weights[name + ".bias"])


def _layer_norm(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    if weight.ndim == 1:
        return mx.fast.layer_norm(x, weight, bias, LAYER_NORM_EPSILON)
    normed = mx.fast.layer_norm(x, None, None, LAYER_NORM_EPSILON).reshape(len(weight), -1, x.shape[-1])
    return (normed * weight[:, None] + bias[:, None]).reshape(x.shape)


def _linear(x: mx.array, weights: Weights, name: str, operators: Operators, tape: lora.Tape | None = None) -> mx.array:
    weight, bias = weights[name + ".weight"], weights[name + ".bias"]
    if name + A in weights:
        flat = x.reshape(-1, x.shape[-1]).astype(operators.dtype)
        return lora.linear(flat, weights, name, operators, tape).reshape(*x.shape[:-1], weight.shape[-1])
    flat = x.reshape(*weight.shape[:-2], -1, x.shape[-1]).astype(operators.dtype)
    bias = bias if bias.ndim == 1 else bias[:, None]
    if operators.dtype == mx.float32:
        product = mx.addmm(bias, flat, weight)
    else:
        product = operators.matmul(flat, weight.astype(operators.dtype)) + bias.astype(operators.dtype)
    return product.reshape(*x.shape[:-1], weight.shape[-1])


def _linear_gradient(
    grad: mx.array,
    x: mx.array,
    weights: Weights,
    name: str,
    operators: Operators,
    grads: Arrays,
    tape: lora.Tape,
) -> mx.array:
    """float32 gradient of a linear map's input; those of its weight and bias, or of its adapter, go into `grads`."""
    if name + A in weights:
        flat = grad.reshape(-1, grad.shape[-1]).astype(mx.float32)
        return lora.linear_gradient(flat, weights, name, operators, grads, tape).reshape(x.shape)
    weight = weights[name + ".weight"].astype(operators.dtype)
    members = weight.shape[:-2]
    flat_grad = grad.reshape(*members, -1, grad.shape[-1])
    narrow = flat_grad.astype(operators.dtype)
    flat_x = x.reshape(*members, -1, x.shape[-1]).astype(operators.dtype)
    grads[name + ".weight"] = operators.matmul(flat_x.swapaxes(-1, -2), narrow).astype(mx.float32)
    grads[name + ".bias"] = flat_grad.astype(mx.float32).sum(axis=-2)
    return operators.matmul(narrow, weight.swapaxes(-1, -2)).astype(mx.float32).reshape(x.shape)


def _norm_gradient(grad: mx.array, x: mx.array, weights: Weights, name: str, grads: Arrays) -> mx.array:
    """Gradient of a norm's input; those of its weight and bias go into `grads`."""
    names = (name + ".weight", name + ".bias")
    _, (grad_x, *own) = mx.vjp(_layer_norm, [x, *(weights[n] for n in names)], [grad])
    grads.update(zip(names, own, strict=True))
    return grad_x
