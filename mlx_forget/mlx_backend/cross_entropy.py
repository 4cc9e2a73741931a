"""The cross-entropy of hidden states and an output matrix, which never holds all logits.

Shapes: N tokens, D width, V vocabulary, K models of a stack.
"""

import mlx.core as mx

from mlx_forget.mlx_backend.embeddings import add_rows, read_rows
from mlx_forget.mlx_backend.operators import Operators

# Elements of one chunk of logits: on a CPU a chunk should stay in cache, on a GPU it should fill the device.
_CHUNK_ELEMENTS_CPU = 1 << 21
_CHUNK_ELEMENTS_GPU = 1 << 27


def chunk_rows(vocab_size: int, *, on_cpu: bool) -> int:
    """How many tokens' logits are held at once."""
    return max(64, (_CHUNK_ELEMENTS_CPU if on_cpu else _CHUNK_ELEMENTS_GPU) // vocab_size)


def cross_entropy(
    x: mx.array, head: mx.array, labels: mx.array, weight: mx.array, *, chunk: int, operators: Operators
) -> tuple[mx.array, mx.array, mx.array]:
    """Tied head and weighted cross-entropy in chunks of rows, with the gradients made while the logits are at hand.

    All of them may have a leading dimension K.

    Args:
        x: float32[N, D] hidden states; products run in the operators' type.
        head: float32[V, D].
        labels: int32[N].
        weight: float32[N].

    Returns:
        The nll in nats, float32[N], and the gradients of the sum of weight * nll: float32[N, D] and float32[V, D].
    """
    narrow, narrow_head = x.astype(operators.dtype), head.astype(operators.dtype)
    # The label's part of the gradient, -weight * one_hot(label), never meets the logits: it is a gather and a scatter.
    grad_head = add_rows(mx.zeros_like(head), labels, -weight[..., None] * x)
    nlls, grads = [], []
    for start in range(0, x.shape[-2], chunk):
        stop = start + chunk
        part = narrow[..., start:stop, :]
        exponentials, total, nll = _exponentials(part, narrow_head, labels[..., start:stop], operators)
        share = weight[..., start:stop, None] / total
        exponentials = exponentials.astype(operators.dtype)
        grads.append(operators.matmul(exponentials, narrow_head).astype(mx.float32) * share)
        scaled = (x[..., start:stop, :] * share).astype(operators.dtype)
        grad_head = _add_product(grad_head, exponentials.swapaxes(-1, -2), scaled, operators)
        nlls.append(nll)
    grad_x = mx.concatenate(grads, axis=-2) - weight[..., None] * read_rows(head, labels)
    return mx.concatenate(nlls, axis=-1), grad_x, grad_head


def token_nll(x: mx.array, head: mx.array, labels: mx.array, *, chunk: int, operators: Operators) -> mx.array:
    """Next-token losses in nats, float32[N], in chunks, without gradients."""
    x, head = x.astype(operators.dtype), head.astype(operators.dtype)
    chunks = [slice(start, start + chunk) for start in range(0, len(x), chunk)]
    return mx.concatenate([_exponentials(x[rows], head, labels[rows], operators)[2] for rows in chunks])


def _exponentials(x: mx.array, head: mx.array, labels: mx.array, operators: Operators) -> tuple[mx.array, mx.array, mx.array]:
    """exp(logit - top) float32[N, V], its sum float32[N, 1], and the nll float32[N]; logits are float32 whatever the type of x."""
    logits = operators.matmul(x, head.swapaxes(-1, -2)).astype(mx.float32)
    top = logits.max(axis=-1, keepdims=True)
    exponentials = operators.exp_below(logits, top)
    total = exponentials.sum(axis=-1, keepdims=True)
    # Not gathered from the logits: nothing else then holds them, and the exponentials take their memory.
    label_logit = (x.astype(mx.float32) * read_rows(head, labels).astype(mx.float32)).sum(axis=-1, keepdims=True)
    return exponentials, total, (mx.log(total) + top - label_logit)[..., 0]


def _add_product(total: mx.array, a: mx.array, b: mx.array, operators: Operators) -> mx.array:
    if operators.dtype == mx.float32:
        return mx.addmm(total, a, b)
    return total + operators.matmul(a, b).astype(mx.float32)
