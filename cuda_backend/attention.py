"""Attention of the ladder's blocks, by the kernel that is fastest where it runs.

PyTorch's CPU kernel for the gradient of attention in bf16 has a fixed cost for every head of every row. On a CPU with AMX, attention and
its gradient over short rows took 1.15 to 2.96 times as long by it as in fp32, casts included; a CPU without AMX was not measured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# From about this T x head_dim the bf16 kernel's products on AMX win back its fixed cost (`tests/benchmarks/bench_bf16_cpu.py`).
_LONG = 2**15


def attention(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention [B, H, T, E] in the dtype of `q_BHTE`; with `mask` [B, 1, T, T], each token sees what is True there."""
    is_causal = mask is None
    if not _fp32_is_faster(q_BHTE):
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=mask, is_causal=is_causal)
    with torch.autocast("cpu", enabled=False):
        q, k, v = (part.float() for part in (q_BHTE, k_BHTE, v_BHTE))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal).to(q_BHTE.dtype)


def is_short(num_tokens: int, head_dim: int) -> bool:
    """Whether the gradient of rows of this length, in bf16 on a CPU, is computed in fp32."""
    return num_tokens * head_dim < _LONG


def _fp32_is_faster(q_BHTE: Tensor) -> bool:
    on_cpu = q_BHTE.dtype == torch.bfloat16 and q_BHTE.device.type == "cpu"
    return on_cpu and q_BHTE.requires_grad and is_short(q_BHTE.shape[-2], q_BHTE.shape[-1])
