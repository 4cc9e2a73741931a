"""Ancestral sampling with a key-value cache, driven by uniforms that the core makes.

On a CPU the rows are shared among threads, each an MLX stream with a cache of its own: a stream is one thread, and at these sizes its
products and its reading of the cache are bound by what one core can do.
"""

from collections.abc import Sequence

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
    num_ids: int | None = None,
    operators: Operators,
    streams: Sequence[mx.Stream],
) -> npt.NDArray[np.int32]:
    """Continue int32[B, P] prompts by inverse-CDF sampling; returns int32[B, T] for uniforms float64[B, T].

    The token is the first of `num_ids` (None: of all) whose cumulative probability, summed in float64, exceeds u. That choice is made on the host, because a GPU
    has no float64.
    """
    B, P = prompts_BP.shape
    length = P + u_BT.shape[1]
    next_logits = functions_of(spec).next_logits
    shares = [rows for rows in np.array_split(np.arange(B), len(streams)) if len(rows)]
    caches = [
        [mx.zeros((2, len(rows), spec.num_heads, length, spec.head_dim), operators.dtype) for _ in range(spec.num_layers)]
        for rows in shares
    ]
    out = np.empty(u_BT.shape, np.int32)
    token = prompts_BP[:, 0]
    for position in range(length - 1):
        logits = []
        for stream, rows, cache in zip(streams, shares, caches, strict=False):
            with mx.stream(stream):
                logits.append(next_logits(weights, spec, mx.array(token[rows]), position, cache, operators))
        if position + 1 < P:
            mx.eval(caches)
            token = prompts_BP[:, position + 1]
            continue
        mx.eval(logits, caches)
        token = draw(np.concatenate([np.array(part)[:, :num_ids] for part in logits]), u_BT[:, position + 1 - P], temperature)
        out[:, position + 1 - P] = token
    return out


def draw(logits_BV: npt.NDArray[np.float32], u_B: npt.NDArray[np.float64], temperature: float) -> npt.NDArray[np.int32]:
    """The next token of each row, int32[B], from logits and uniforms."""
    cumulative = _cumulative(logits_BV, temperature)
    tokens = (cumulative <= u_B[:, None] * cumulative[:, -1:]).sum(axis=1)
    chosen: npt.NDArray[np.int32] = np.minimum(tokens, logits_BV.shape[1] - 1).astype(np.int32)
    return chosen


def _cumulative(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float64]:
    """Running sums of probabilities, but for a factor that the caller's uniforms take up."""
    scaled = logits / np.float32(temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    return np.cumsum(np.exp(scaled, out=scaled), axis=1, dtype=np.float64)
