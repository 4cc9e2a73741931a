"""Ancestral sampling with a key-value cache, driven by uniforms that the core makes."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_forget.ladder import ModelSpec
from mlx_forget.mlx_backend.architectures import functions_of
from mlx_forget.mlx_backend.gpt2 import Weights
from mlx_forget.mlx_backend.operators import Operators


def sample(
    weights: Weights,
    spec: ModelSpec,
    prompts_BP: npt.NDArray[np.int32],
    u_BT: npt.NDArray[np.float64],
    *,
    temperature: float,
    operators: Operators,
) -> npt.NDArray[np.int32]:
    """Continue int32[B, P] prompts by inverse-CDF sampling; returns int32[B, T] for uniforms float64[B, T].

    The token is the first whose cumulative probability, summed in float64, exceeds u. That choice is made on the host, because a GPU
    has no float64.
    """
    B, P = prompts_BP.shape
    length = P + u_BT.shape[1]
    shape = (2, B, spec.num_heads, length, spec.head_dim)
    cache = [mx.zeros(shape, operators.dtype) for _ in range(spec.num_layers)]
    out = np.empty(u_BT.shape, np.int32)
    token = prompts_BP[:, 0]
    for position in range(length - 1):
        logits = functions_of(spec).next_logits(weights, spec, mx.array(token), position, cache, operators)
        if position + 1 < P:
            mx.eval(cache)
            token = prompts_BP[:, position + 1]
            continue
        mx.eval(logits, cache)
        cumulative = _cumulative(np.array(logits), temperature)
        u = u_BT[:, position + 1 - P, None] * cumulative[:, -1:]
        token = np.minimum((cumulative <= u).sum(axis=1), spec.vocab_size - 1).astype(np.int32)
        out[:, position + 1 - P] = token
    return out


def _cumulative(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float64]:
    """Running sums of probabilities, but for a factor that the caller's uniforms take up."""
    scaled = logits / np.float32(temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    return np.cumsum(np.exp(scaled, out=scaled), axis=1, dtype=np.float64)
