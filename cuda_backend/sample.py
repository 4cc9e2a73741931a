"""Ancestral sampling with a key-value cache, driven by uniforms that the core makes."""

import torch
from torch import Tensor

from cuda_backend.architectures import functions_of
from cuda_backend.gpt2 import Weights
from mlx_forget.ladder import ModelSpec, head_name


@torch.no_grad()
def sample(
    weights: Weights, spec: ModelSpec, prompts_BP: Tensor, u_BT: Tensor, temperature: float, num_ids: int | None = None
) -> Tensor:
    """Continue int64[B, P] prompts by inverse-CDF sampling; returns int64[B, T] for uniforms float64[B, T].

    The token is the first of `num_ids` (None: of all) whose cumulative probability, summed in float64, exceeds u.
    """
    B, P = prompts_BP.shape
    length = P + u_BT.shape[1]
    functions = functions_of(spec)
    dtype = weights[head_name(spec)].dtype
    cache = torch.empty(spec.num_layers, 2, B, spec.num_heads, length, spec.head_dim, dtype=dtype, device=u_BT.device)
    out = torch.empty(B, u_BT.shape[1], dtype=torch.int64, device=u_BT.device)
    token = prompts_BP[:, 0]
    for position in range(length - 1):
        logits = functions.next_logits(weights, spec, token, position, cache)
        if position + 1 < P:
            token = prompts_BP[:, position + 1]
            continue
        token = draw(logits[:, :num_ids], u_BT[:, position + 1 - P], temperature)
        out[:, position + 1 - P] = token
    return out


def draw(logits_BV: Tensor, u_B: Tensor, temperature: float) -> Tensor:
    """The next token of each row, int64[B], from float32 logits and uniforms float64[B]."""
    scaled = logits_BV / temperature
    # Sums of probabilities but for a factor, which the uniforms take up.
    cumulative = scaled.sub_(scaled.amax(-1, keepdim=True)).exp_().cumsum(-1, dtype=torch.float64)
    u = u_B[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, u, right=True)[:, 0].clamp_(max=logits_BV.shape[-1] - 1)
