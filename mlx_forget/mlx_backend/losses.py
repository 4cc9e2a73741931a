"""The losses of whole rows and the gradients of their weighted sum: cross-entropy of some rows, KL to a reference of others.

Shapes: B rows, T tokens, D width, V vocabulary, N = B * T.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_forget.errors import UserError
from mlx_forget.mlx_backend.cross_entropy import cross_entropy
from mlx_forget.mlx_backend.operators import Operators
from mlx_forget.mlx_backend.reference import kl_divergence
from mlx_forget.mlx_backend.stored_reference import stored_kl_divergence

Weights = Mapping[str, mx.array]
# What the KL term of some rows needs, as a tree of arrays that compiled functions take: `nll_rows` int32[n] and `kl_rows` int32[k],
# `kl_weight` float32[k, T], and `reference`, the weights of the frozen model, or `stored`, what is kept of it.
KLTerm = dict[str, Any]


def objective(
    final_BTD: mx.array,
    head: mx.array,
    head_name: str,
    tokens_BT: mx.array,
    labels_BT: mx.array,
    weight_BT: mx.array,
    segment_BT: mx.array | None,
    penalty: KLTerm | None,
    chunk: int,
    operators: Operators,
    states_of: Callable[[Weights, mx.array, mx.array | None], mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """The losses that `gradients` returns, and the gradients of their weighted sum for final hidden states and head.

    `states_of` gives the final hidden states of the frozen model on some rows of tokens and segments.
    """
    if penalty is None:
        return _cross_entropy_of_rows(final_BTD, head, labels_BT, weight_BT, chunk, operators)
    losses, grad_final, grad_head = [], mx.zeros_like(final_BTD), mx.zeros_like(head)
    rows = penalty["nll_rows"]
    if rows.size:
        nll, grad, part = _cross_entropy_of_rows(final_BTD[rows], head, labels_BT[rows], weight_BT[rows], chunk, operators)
        losses.append(nll)
        grad_final, grad_head = grad_final.at[rows].add(grad), grad_head + part
    rows = penalty["kl_rows"]
    if rows.size:
        x, weight = final_BTD[rows].reshape(-1, final_BTD.shape[-1]), penalty["kl_weight"].reshape(-1)
        if "stored" in penalty:
            stored = {name: value.reshape(len(x), *value.shape[2:]) for name, value in penalty["stored"].items()}
            kl, grad, part = stored_kl_divergence(x, head, stored, weight, chunk=chunk, operators=operators)
        else:
            reference = penalty["reference"]
            ref_final = states_of(reference, tokens_BT[rows], None if segment_BT is None else segment_BT[rows])
            ref_x, ref_head = ref_final.reshape(x.shape), reference[head_name]
            kl, grad, part = kl_divergence(x, head, ref_x, ref_head, weight, chunk=chunk, operators=operators)
        losses.append(kl.reshape(len(rows), -1))
        grad_final, grad_head = grad_final.at[rows].add(grad.reshape(len(rows), *final_BTD.shape[1:])), grad_head + part
    # Rows of the KL term whose labels are all masked are of neither kind.
    return mx.concatenate(losses) if losses else mx.zeros((0, labels_BT.shape[1])), grad_final, grad_head


def plain_objective(
    logits: mx.array, labels: mx.array, weight: mx.array, penalty: KLTerm | None, ref_logits: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The weighted sum of all losses, and the losses as `objective` orders them, of a model that has no output matrix."""
    total, losses = mx.array(0.0), []
    rows = mx.arange(len(labels)) if penalty is None else penalty["nll_rows"]
    if rows.size:
        own, flat = labels[rows], logits[rows]
        nll = plain_nll(flat.reshape(-1, flat.shape[-1]), own.reshape(-1)).reshape(own.shape)
        total, losses = total + (nll * weight[rows]).sum(), [mx.stop_gradient(nll)]
    if penalty is not None and penalty["kl_rows"].size:
        if ref_logits is None:
            raise UserError("Log-probabilities are not kept for a model that caps its logits: leave reference_log_probs live.")
        log_p, reference = _log_softmax(logits[penalty["kl_rows"]]), _log_softmax(ref_logits)
        kl = (mx.exp(reference) * (reference - log_p)).sum(axis=-1)
        total, losses = total + (kl * penalty["kl_weight"]).sum(), [*losses, mx.stop_gradient(kl)]
    return total, mx.concatenate(losses) if losses else mx.zeros((0, labels.shape[1]))


def plain_nll(logits: mx.array, labels_N: mx.array) -> mx.array:
    """Next-token losses in nats, float32[N], of logits [N, V]."""
    log_p = _log_softmax(logits)
    return -mx.take_along_axis(log_p, labels_N[:, None], axis=-1)[:, 0]


def _log_softmax(logits: mx.array) -> mx.array:
    wide = logits.astype(mx.float32)
    return wide - mx.logsumexp(wide, axis=-1, keepdims=True)


def _cross_entropy_of_rows(
    final_BTD: mx.array, head: mx.array, labels_BT: mx.array, weight_BT: mx.array, chunk: int, operators: Operators
) -> tuple[mx.array, mx.array, mx.array]:
    """`cross_entropy` of whole rows: float32[B, T], and the gradients float32[B, T, D] and float32[V, D]; of a stack, each by member."""
    flat = (*head.shape[:-2], -1)
    final = final_BTD.reshape(*flat, final_BTD.shape[-1])
    nll, grad, grad_head = cross_entropy(
        final, head, labels_BT.reshape(flat), weight_BT.reshape(flat), chunk=chunk, operators=operators
    )
    return nll.reshape(labels_BT.shape), grad.reshape(final_BTD.shape), grad_head
