"""KL divergence to a reference whose log-probabilities are kept: all of them, or those of the likeliest tokens and the rest as one.

Shapes: N tokens, D width, V vocabulary, k tokens kept of each.
"""

import mlx.core as mx
import numpy as np

from mlx_forget.mlx_backend.operators import Operators

# The arrays of `ReferenceRows`, by name; `top` and `tail` are there together or not at all.
Stored = dict[str, mx.array]

_TINY = float(np.finfo(np.float32).tiny)


def stored_kl_divergence(
    x: mx.array, head: mx.array, stored: Stored, weight: mx.array, *, chunk: int, operators: Operators
) -> tuple[mx.array, mx.array, mx.array]:
    """Tied head and weighted KL(reference || model) in chunks of tokens, with the gradients; the reference is read, not computed.

    Args:
        x: float32[N, D] hidden states; products run in the operators' type.
        head: float32[V, D].
        stored: `log_probs` float16[N, V], or [N, k] with `top` int32[N, k] and `tail` float32[N].
        weight: float32[N].

    Returns:
        The KL in nats, float32[N], and the gradients of the sum of weight * kl: float32[N, D] and float32[V, D]. The gradient of the
        logits is weight * (model - reference) in probabilities; of tokens that are not kept, the reference has the model's own
        proportions.
    """
    narrow_head = head.astype(operators.dtype)
    grad_head = mx.zeros_like(head)
    divergences, grads = [], []
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        narrow = x[rows].astype(operators.dtype)
        logits = operators.matmul(narrow, narrow_head.T).astype(mx.float32)
        reference = stored["log_probs"][rows].astype(mx.float32)
        if "top" in stored:
            kl, grad_logits = _of_likeliest(logits, reference, stored["top"][rows], stored["tail"][rows, None], operators)
        else:
            kl, grad_logits = _of_all(logits, reference, operators)
        divergences.append(kl)
        grad_logits = (weight[rows, None] * grad_logits).astype(operators.dtype)
        grads.append(operators.matmul(grad_logits, narrow_head).astype(mx.float32))
        grad_head = grad_head + operators.matmul(grad_logits.T, narrow).astype(mx.float32)
    return mx.concatenate(divergences), mx.concatenate(grads), grad_head


def _of_all(logits: mx.array, reference: mx.array, operators: Operators) -> tuple[mx.array, mx.array]:
    """KL [n] and the gradient of the logits [n, V], of log-probabilities [n, V] that need not add up."""
    probability, norm = _normalised(logits, operators)
    wanted, ref_norm = _normalised(reference, operators)
    kl = (wanted * (reference - logits)).sum(axis=-1, keepdims=True) - ref_norm + norm
    return kl[:, 0], probability - wanted


def _of_likeliest(
    logits: mx.array, reference: mx.array, top: mx.array, tail: mx.array, operators: Operators
) -> tuple[mx.array, mx.array]:
    """The same of the log-probabilities [n, k] of the tokens `top`, and [n, 1] of all others together."""
    probability, norm = _normalised(logits, operators)
    both = mx.logaddexp(mx.logsumexp(reference, axis=-1, keepdims=True), tail)
    reference, tail = reference - both, tail - both
    wanted, mass = mx.exp(reference), mx.exp(tail)
    kept = mx.take_along_axis(logits, top, axis=-1) - norm
    # What the model leaves to the others is summed, not subtracted from 1: it may be tiny.
    others = mx.put_along_axis(probability, top, mx.array(0.0), axis=-1)
    left = mx.maximum(others.sum(axis=-1, keepdims=True), _TINY)
    of_tail = mx.where(mass > 0, mass * (tail - mx.log(left)), 0.0)
    kl = (wanted * (reference - kept)).sum(axis=-1) + of_tail[:, 0]
    return kl, mx.put_along_axis(others * (1 - mass / left), top, mx.exp(kept) - wanted, axis=-1)


def _normalised(logits: mx.array, operators: Operators) -> tuple[mx.array, mx.array]:
    """Probabilities float32[n, V], and the log of the logits' summed exponentials float32[n, 1]."""
    top = logits.max(axis=-1, keepdims=True)
    exponentials = operators.exp_below(logits, top)
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / total, mx.log(total) + top
