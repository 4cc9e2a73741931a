"""The blocks of GPT-2 in PyTorch as functions of a dict of weights in Hugging Face names; `architectures` makes a model of them.

Shapes: B rows, T tokens, D width, H heads, V vocabulary. A stack of K models is one dict whose weights all have a leading
dimension K; tokens are then [K, B, T], the rows of all members go through the blocks as [K * B, T, D], and products are batched.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_backend import lora
from cuda_backend.attention import attention
from cuda_backend.segments import segment_mask, segment_positions
from mlx_forget.adapters import A
from mlx_forget.ladder import LAYER_NORM_EPSILON, ModelSpec, block_prefix

Weights = Mapping[str, Tensor]


def begin(weights: Weights, spec: ModelSpec, tokens_BT: Tensor, segment_BT: Tensor | None) -> tuple[Tensor, tuple[Tensor | None]]:
    """What enters the first block, and what every block is given besides."""
    return _embed(weights, tokens_BT, segment_BT), (None if segment_BT is None else segment_mask(segment_BT),)


def finish(weights: Weights, x_BTD: Tensor) -> Tensor:
    """Final hidden states from what leaves the last block."""
    return _norm(x_BTD, weights, "transformer.ln_f")


def block(weights: Weights, prefix: str, spec: ModelSpec, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
    """One pre-norm block."""
    B, T, D = x_BTD.shape
    normed = _norm(x_BTD, weights, prefix + "ln_1")
    qkv = _linear(normed, weights, prefix + "attn.c_attn", bias=_without_key_gradient(weights[prefix + "attn.c_attn.bias"]))
    q, k, v = (part.view(B, T, spec.num_heads, spec.head_dim).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    mixed = attention(q, k, v, mask)
    x_BTD = x_BTD + _linear(mixed.transpose(1, 2).reshape(B, T, D), weights, prefix + "attn.c_proj")
    expanded = F.gelu(_linear(_norm(x_BTD, weights, prefix + "ln_2"), weights, prefix + "mlp.c_fc"), approximate="tanh")
    return x_BTD + _linear(expanded, weights, prefix + "mlp.c_proj")


def next_logits(weights: Weights, spec: ModelSpec, token_B: Tensor, position: int, cache: Tensor) -> Tensor:
    """Logits [B, V] after one more token; `cache` [L, 2, B, H, T, head_dim] holds keys and values and is written at `position`."""
    B = len(token_B)
    x_BD = F.embedding(token_B, weights["transformer.wte.weight"]) + weights["transformer.wpe.weight"][position]
    for i in range(spec.num_layers):
        prefix = block_prefix(spec, i)
        qkv = _linear(_norm(x_BD, weights, prefix + "ln_1"), weights, prefix + "attn.c_attn")
        q, k, v = qkv.view(B, 3, spec.num_heads, spec.head_dim).unbind(1)
        cache[i, 0, :, :, position] = k
        cache[i, 1, :, :, position] = v
        past = cache[i, :, :, :, : position + 1]
        mixed = F.scaled_dot_product_attention(q[:, :, None], past[0], past[1])
        x_BD = x_BD + _linear(mixed.reshape(B, -1), weights, prefix + "attn.c_proj")
        expanded = F.gelu(_linear(_norm(x_BD, weights, prefix + "ln_2"), weights, prefix + "mlp.c_fc"), approximate="tanh")
        x_BD = x_BD + _linear(expanded, weights, prefix + "mlp.c_proj")
    return (_norm(x_BD, weights, "transformer.ln_f") @ weights["transformer.wte.weight"].T).float()


def _embed(weights: Weights, tokens: Tensor, segment: Tensor | None = None) -> Tensor:
    """Token and position embeddings [B, T, D], or [K * B, T, D] of a stack; places are counted within segments where they are given."""
    positions = weights["transformer.wpe.weight"]
    if segment is None:
        placed = positions[..., None, : tokens.shape[-1], :]
    else:
        placed = _rows_of(positions, segment_positions(segment).view(tokens.shape))
    return (_rows_of(weights["transformer.wte.weight"], tokens) + placed).flatten(0, -3)


def _rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a [V, D] table at int64[B, T]; of a stack's [K, V, D], at int64[K, B, T] within each member's own."""
    if table.dim() == 2:
        return F.embedding(index, table)
    first_row = torch.arange(0, table.shape[0] * table.shape[1], table.shape[1], device=index.device)[:, None, None]
    return F.embedding(index + first_row, table.flatten(0, 1))


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    weight, bias = weights[name + ".weight"], weights[name + ".bias"]
    if weight.dim() == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPSILON)
    normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON).view(len(weight), -1, x.shape[-1])
    return torch.addcmul(bias[:, None], normed, weight[:, None]).view(x.shape)


def _without_key_gradient(bias: Tensor) -> Tensor:
    """The bias of queries, keys and values, with no gradient for that of the keys.

    Attention does not change when one vector is added to all keys: that gradient is zero, and AdamW would turn its rounding error into
    full steps.
    """
    query, key, value = bias.chunk(3, dim=-1)
    return torch.cat([query, key.detach(), value], dim=-1)


def _linear(x: Tensor, weights: Weights, name: str, bias: Tensor | None = None) -> Tensor:
    weight, bias = weights[name + ".weight"], weights[name + ".bias"] if bias is None else bias
    if name + A in weights:
        product = lora.linear(x.reshape(-1, x.shape[-1]), weights, name, bias)
    elif weight.dim() == 2:
        product = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    else:
        product = torch.baddbmm(bias[:, None], x.reshape(len(weight), -1, x.shape[-1]), weight)
    return product.view(*x.shape[:-1], weight.shape[-1])
