"""The ladder's second architecture in PyTorch: norms without parameters, normalised queries and keys, rotary positions, untied head.

As Marek et al. (2026) train it. Its functions are named as those of `gpt2`, so that either can stand in a trainer.

Shapes: B rows, T tokens, D width, H heads, E head size, V vocabulary.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cuda_backend import lora
from cuda_backend.gpt2 import segment_mask, segment_positions
from mlx_forget.adapters import A
from mlx_forget.ladder import QKNORM_HEAD, RMS_NORM_EPSILON, ROPE_BASE, ModelSpec

Weights = Mapping[str, Tensor]

HEAD = QKNORM_HEAD
BLOCK = "decoder.h.{}."
_EMBEDDING = "decoder.embed_in.weight"


def hidden_states(
    weights: Weights,
    spec: ModelSpec,
    tokens_BT: Tensor,
    segment_BT: Tensor | None = None,
    *,
    grad_checkpoint: bool = False,
) -> Tensor:
    """Final hidden states [B, T, D] of int64[B, T] tokens; segments, where given, are as if each were alone."""
    x_BTD, context = begin(weights, spec, tokens_BT, segment_BT)
    for i in range(spec.num_layers):
        if grad_checkpoint and torch.is_grad_enabled():
            x_BTD = checkpoint(block, weights, BLOCK.format(i), spec, x_BTD, *context, use_reentrant=False)
        else:
            x_BTD = block(weights, BLOCK.format(i), spec, x_BTD, *context)
    return finish(weights, x_BTD)


def begin(
    weights: Weights, spec: ModelSpec, tokens_BT: Tensor, segment_BT: Tensor | None
) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], Tensor | None]]:
    """What enters the first block, and what every block is given besides."""
    mask = None if segment_BT is None else segment_mask(segment_BT)
    return F.embedding(tokens_BT, weights[_EMBEDDING]), (_angles(spec, tokens_BT, segment_BT), mask)


def finish(weights: Weights, x_BTD: Tensor) -> Tensor:
    """Final hidden states from what leaves the last block; the norm has no weights."""
    return _norm(x_BTD)


def hidden_states_of_two(
    weights: Weights, reference: Weights, spec: ModelSpec, tokens_BT: Tensor, *, shared: int
) -> tuple[Tensor, Tensor]:
    """Final hidden states [B, T, D] of two models; the first `shared` blocks are those of both and computed once."""
    angles = _angles(spec, tokens_BT, None)
    both = range(max(0, shared))
    start = None if shared < 0 else _through_blocks(F.embedding(tokens_BT, weights[_EMBEDDING]), weights, spec, both, angles)
    states = []
    for own in (weights, reference):
        x_BTD = F.embedding(tokens_BT, own[_EMBEDDING]) if start is None else start
        states.append(_norm(_through_blocks(x_BTD, own, spec, range(len(both), spec.num_layers), angles)))
    return states[0], states[1]


def num_shared_blocks(weights: Weights, reference: Weights, spec: ModelSpec) -> int:
    """How many of the first blocks are the same in two models; -1 where the embeddings already differ."""

    def same(prefix: str) -> bool:
        own = [(value, reference.get(name)) for name, value in weights.items() if name.startswith(prefix)]
        return all(other is not None and (other is value or torch.equal(value, other)) for value, other in own)

    if not same(_EMBEDDING):
        return -1
    return next((i for i in range(spec.num_layers) if not same(f"decoder.h.{i}.")), spec.num_layers)


def _through_blocks(x_BTD: Tensor, weights: Weights, spec: ModelSpec, blocks: range, angles: tuple[Tensor, Tensor]) -> Tensor:
    for i in blocks:
        x_BTD = block(weights, f"decoder.h.{i}.", spec, x_BTD, angles, None)
    return x_BTD


def block(
    weights: Weights, prefix: str, spec: ModelSpec, x_BTD: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """One pre-norm block."""
    B, T, D = x_BTD.shape
    qkv = _linear(_norm(x_BTD), weights, prefix + "attn.qkv")
    q, k, v = (part.view(B, T, spec.num_heads, spec.head_dim).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    q, k = (_rotate(_norm(part), angles).to(v.dtype) for part in (q, k))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    x_BTD = x_BTD + _linear(mixed.transpose(1, 2).reshape(B, T, D), weights, prefix + "attn.out")
    return x_BTD + _mlp(_norm(x_BTD), weights, prefix)


def next_logits(weights: Weights, spec: ModelSpec, token_B: Tensor, position: int, cache: Tensor) -> Tensor:
    """Logits [B, V] after one more token; `cache` [L, 2, B, H, T, E] holds rotated keys, and values, and is written at `position`."""
    x_BD = F.embedding(token_B, weights[_EMBEDDING])
    dtype = x_BD.dtype
    place = torch.full((1, 1), position, device=token_B.device)
    angles = _cos_and_sin(spec, place)
    for i in range(spec.num_layers):
        prefix = f"decoder.h.{i}."
        qkv = _linear(_norm(x_BD).to(dtype), weights, prefix + "attn.qkv")
        q, k, v = (part.view(len(token_B), spec.num_heads, 1, spec.head_dim) for part in qkv.chunk(3, dim=1))
        q, k = (_rotate(_norm(part), angles).to(dtype) for part in (q, k))
        cache[i, 0, :, :, position] = k[:, :, 0]
        cache[i, 1, :, :, position] = v[:, :, 0]
        past = cache[i, :, :, :, : position + 1]
        mixed = F.scaled_dot_product_attention(q, past[0], past[1])
        x_BD = x_BD + _linear(mixed.reshape(len(token_B), -1), weights, prefix + "attn.out")
        x_BD = x_BD + _mlp(_norm(x_BD).to(dtype), weights, prefix)
    return (_norm(x_BD).to(dtype) @ weights[HEAD].T).float()


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
