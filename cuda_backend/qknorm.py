"""The ladder's second architecture in PyTorch: norms without parameters, normalised queries and keys, rotary positions, untied head.

As Marek et al. (2026) train it. Its functions are named as those of `gpt2`, so that `architectures` makes a model of either.

Shapes: B rows, T tokens, D width, H heads, E head size, V vocabulary.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_backend import lora
from cuda_backend.attention import attention
from cuda_backend.segments import segment_mask, segment_positions
from mlx_forget.adapters import A
from mlx_forget.ladder import QKNORM_HEAD, RMS_NORM_EPSILON, ROPE_BASE, ModelSpec, block_prefix

Weights = Mapping[str, Tensor]

_EMBEDDING = "decoder.embed_in.weight"


def begin(
    weights: Weights, spec: ModelSpec, tokens_BT: Tensor, segment_BT: Tensor | None
) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], Tensor | None]]:
    """What enters the first block, and what every block is given besides."""
    mask = None if segment_BT is None else segment_mask(segment_BT)
    return F.embedding(tokens_BT, weights[_EMBEDDING]), (_angles(spec, tokens_BT, segment_BT), mask)


def finish(weights: Weights, x_BTD: Tensor) -> Tensor:
    """Final hidden states from what leaves the last block; the norm has no weights."""
    return _norm(x_BTD)


def block(
    weights: Weights, prefix: str, spec: ModelSpec, x_BTD: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """One pre-norm block."""
    B, T, D = x_BTD.shape
    qkv = _linear(_norm(x_BTD), weights, prefix + "attn.qkv")
    q, k, v = (part.view(B, T, spec.num_heads, spec.head_dim).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    q, k = (_rotate(_norm(part), angles).to(v.dtype) for part in (q, k))
    mixed = attention(q, k, v, mask)
    x_BTD = x_BTD + _linear(mixed.transpose(1, 2).reshape(B, T, D), weights, prefix + "attn.out")
    return x_BTD + _mlp(_norm(x_BTD), weights, prefix)


def next_logits(weights: Weights, spec: ModelSpec, token_B: Tensor, position: int, cache: Tensor) -> Tensor:
    """Logits [B, V] after one more token; `cache` [L, 2, B, H, T, E] holds rotated keys, and values, and is written at `position`."""
    x_BD = F.embedding(token_B, weights[_EMBEDDING])
    dtype = x_BD.dtype
    place = torch.full((1, 1), position, device=token_B.device)
    angles = _cos_and_sin(spec, place)
    for i in range(spec.num_layers):
        prefix = block_prefix(spec, i)
        qkv = _linear(_norm(x_BD).to(dtype), weights, prefix + "attn.qkv")
        q, k, v = (part.view(len(token_B), spec.num_heads, 1, spec.head_dim) for part in qkv.chunk(3, dim=1))
        q, k = (_rotate(_norm(part), angles).to(dtype) for part in (q, k))
        cache[i, 0, :, :, position] = k[:, :, 0]
        cache[i, 1, :, :, position] = v[:, :, 0]
        past = cache[i, :, :, :, : position + 1]
        mixed = F.scaled_dot_product_attention(q, past[0], past[1])
        x_BD = x_BD + _linear(mixed.reshape(len(token_B), -1), weights, prefix + "attn.out")
        x_BD = x_BD + _mlp(_norm(x_BD).to(dtype), weights, prefix)
    return (_norm(x_BD).to(dtype) @ weights[QKNORM_HEAD].T).float()


def _mlp(x: Tensor, weights: Weights, prefix: str) -> Tensor:
    return _linear(F.gelu(_linear(x, weights, prefix + "mlp.up"), approximate="tanh"), weights, prefix + "mlp.down")


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    if name + A not in weights:
        return x @ weights[name + ".weight"]
    return lora.linear(x.reshape(-1, x.shape[-1]), weights, name).view(*x.shape[:-1], -1)


def _norm(x: Tensor) -> Tensor:
    """Root-mean-square norm without parameters, float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=RMS_NORM_EPSILON)


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: the pairs are an entry of the first half and its fellow of the second."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _angles(spec: ModelSpec, tokens_BT: Tensor, segment_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    if segment_BT is None:
        return _cos_and_sin(spec, torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None])
    return _cos_and_sin(spec, segment_positions(segment_BT))


def _cos_and_sin(spec: ModelSpec, place_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32[B or 1, 1, T, E / 2] of the angles at int64 places."""
    half = spec.head_dim // 2
    frequency = ROPE_BASE ** (-torch.arange(half, device=place_BT.device, dtype=torch.float32) / half)
    angle = place_BT[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()
