"""Two models on the same tokens, in one pass over their logits, a chunk at a time.

Shapes: B rows, T tokens, D width, V vocabulary, N = B * T.
"""

import mlx.core as mx

from mlx_forget.comparison import Portions
from mlx_forget.mlx_backend import cross_entropy
from mlx_forget.mlx_backend.operators import Operators

# Tokens of a forward pass on a CPU and a GPU; logits are chunked as in training.
_TOKENS_CPU, _TOKENS_GPU = 1 << 13, 1 << 16


def most(vocab_size: int, *, on_cpu: bool) -> Portions:
    """The portions that are fastest where memory is no matter."""
    return Portions(_TOKENS_CPU if on_cpu else _TOKENS_GPU, cross_entropy.chunk_rows(vocab_size, on_cpu=on_cpu))


def measures(
    x: mx.array, head: mx.array, ref_x: mx.array, ref_head: mx.array, labels: mx.array, *, chunk: int, operators: Operators
) -> mx.array:
    """The measures of `Comparison`, float32[10, N], from hidden states [N, D] and heads [V, D] of the model and its reference."""
    x, ref_x, head, ref_head = (array.astype(operators.dtype) for array in (x, ref_x, head, ref_head))
    chunks: list[mx.array] = []
    for start in range(0, len(labels), chunk):
        rows = slice(start, start + chunk)
        # Without the dependency, nothing would stop the evaluation from computing the logits of every chunk at once.
        inputs = [x[rows], ref_x[rows]]
        now, ref_now = mx.depends(inputs, [chunks[-1]]) if chunks else inputs
        logits, ref_logits = (operators.matmul(a, b.T).astype(mx.float32) for a, b in ((now, head), (ref_now, ref_head)))
        chunks.append(of_logits(logits, ref_logits, labels[rows, None], operators))
    return mx.concatenate(chunks, axis=1)


def of_logits(logits: mx.array, ref_logits: mx.array, label: mx.array, operators: Operators) -> mx.array:
    """The measures of one chunk of logits float32[n, V] and labels int32[n, 1]."""
    ref_best = mx.argmax(ref_logits, axis=1, keepdims=True)
    ref_top, top = mx.take_along_axis(ref_logits, ref_best, axis=1), logits.max(axis=1, keepdims=True)
    at_label, ref_at_label, at_best = (
        mx.take_along_axis(values, index, axis=1) for values, index in ((logits, label), (ref_logits, label), (logits, ref_best))
    )
    exponentials = operators.exp_below(ref_logits, ref_top)
    ref_total = exponentials.sum(axis=1, keepdims=True)
    # Means over the reference's distribution of both models' logits.
    own, cross = _dot(exponentials, ref_logits) / ref_total, _dot(exponentials, logits) / ref_total
    total = operators.exp_below(logits, top).sum(axis=1, keepdims=True)
    log_sum, ref_log_sum = mx.log(total) + top, mx.log(ref_total) + ref_top
    soft_ce = log_sum - cross
    rows = (
        log_sum - at_label,
        ref_log_sum - ref_at_label,
        mx.maximum(soft_ce - (ref_log_sum - own), 0.0),
        soft_ce,
        log_sum - at_best,
        at_best == top,
        at_label == top,
        ref_at_label == ref_top,
        1 / total,
        1 / ref_total,
    )
    return mx.stack([row[:, 0].astype(mx.float32) for row in rows])


def _dot(a: mx.array, b: mx.array) -> mx.array:
    """Row by row, [n, 1]."""
    return (a[:, None, :] @ b[:, :, None])[:, 0]
