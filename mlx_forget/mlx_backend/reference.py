"""KL divergence to the frozen reference, and the penalties that hold the weights near it.

Shapes: N tokens, D width, V vocabulary.
"""

import mlx.core as mx

from mlx_forget.mlx_backend.operators import Operators

Arrays = dict[str, mx.array]


def kl_divergence(
    x: mx.array, head: mx.array, ref_x: mx.array, ref_head: mx.array, weight: mx.array, *, chunk: int, operators: Operators
) -> tuple[mx.array, mx.array, mx.array]:
    """Tied heads and weighted KL(reference || model) over the full vocabulary, in chunks of tokens, with the gradients.

    Args:
        x, ref_x: float32[N, D] hidden states of the model and of the reference; products run in the operators' type.
        head, ref_head: float32[V, D].
        weight: float32[N].

    Returns:
        The KL in nats, float32[N], and the gradients of the sum of weight * kl: float32[N, D] and float32[V, D]. The gradient of the
        logits is weight * (model - reference) in probabilities. Only a chunk of logits is held, of the model and of the reference.
    """
    narrow_head, narrow_ref_head = head.astype(operators.dtype), ref_head.astype(operators.dtype)
    grad_head = mx.zeros_like(head)
    divergences, grads = [], []
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        narrow = x[rows].astype(operators.dtype)
        logits, probability, total = _distribution(narrow, narrow_head, operators)
        ref_logits, reference, ref_total = _distribution(ref_x[rows].astype(operators.dtype), narrow_ref_head, operators)
        divergences.append(((reference * (ref_logits - logits)).sum(axis=-1, keepdims=True) - ref_total + total)[:, 0])
        grad_logits = (weight[rows, None] * (probability - reference)).astype(operators.dtype)
        grads.append(operators.matmul(grad_logits, narrow_head).astype(mx.float32))
        grad_head = grad_head + operators.matmul(grad_logits.T, narrow).astype(mx.float32)
    return mx.concatenate(divergences), mx.concatenate(grads), grad_head


def _distribution(x: mx.array, head: mx.array, operators: Operators) -> tuple[mx.array, mx.array, mx.array]:
    """Logits and probabilities float32[N, V], and the log of the logits' summed exponentials float32[N, 1]."""
    logits = operators.matmul(x, head.T).astype(mx.float32)
    top = logits.max(axis=-1, keepdims=True)
    exponentials = operators.exp_below(logits, top)
    total = exponentials.sum(axis=-1, keepdims=True)
    return logits, exponentials / total, mx.log(total) + top


def penalty_gradients(weights: Arrays, gradients: Arrays, reference: Arrays, fisher: Arrays | None, scalars: Arrays) -> Arrays:
    """The gradients of the losses plus those of L2-SP and EWC; `scalars` holds `l2_sp` and `ewc`, float32."""
    result = {}
    for name, gradient in gradients.items():
        strength = scalars["l2_sp"] if fisher is None else scalars["l2_sp"] + scalars["ewc"] * fisher[name]
        result[name] = gradient + strength * (weights[name] - reference[name])
    return result


def pull_to_reference(weights: Arrays, reference: Arrays, rate: mx.array, anchor_decay: mx.array, finite: mx.array) -> Arrays:
    """The decoupled decay of Anchored AdamW, before the Adam step; nothing where the step is not finite."""
    share = mx.minimum(1.0, rate * anchor_decay) * finite
    return {name: value + share * (reference[name] - value) for name, value in weights.items()}
