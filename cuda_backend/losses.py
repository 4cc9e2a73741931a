"""Losses of hidden states and an output matrix, or of logits where a model has no such matrix (`head` None, `x` the logits).

Shapes: N tokens, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from cuda_backend import compare
from cuda_backend import cross_entropy as fused
from cuda_backend.reference import FusedKL


def cross_entropy(
    x: Tensor, head: Tensor | None, labels: Tensor, weight: Tensor, chunk: int, softmax: fused.SoftmaxGradient | None = None
) -> tuple[Tensor, Tensor]:
    """(sum of weight * nll, nll float32[N]) of x [N, D] or [N, V], int64[N] labels and float32[N] weights; only the sum has a gradient.

    `softmax` is a compiled `cross_entropy.softmax_gradient`, for x with a head.
    """
    if head is None:
        objective, nll = _PlainCrossEntropy.apply(x, labels, weight, chunk)  # type: ignore[no-untyped-call]
    else:
        objective, nll = fused.FusedCrossEntropy.apply(x, head, labels, weight, chunk, softmax)  # type: ignore[no-untyped-call]
    return objective, nll


def kl_divergence(
    x: Tensor, head: Tensor | None, ref_x: Tensor, ref_head: Tensor | None, weight: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """(sum of weight * kl, KL(reference || model) float32[N]) of two models' states or logits; only the sum has a gradient."""
    if head is None or ref_head is None:
        objective, kl = _PlainKL.apply(x, ref_x, weight, chunk)  # type: ignore[no-untyped-call]
    else:
        objective, kl = FusedKL.apply(x, head, ref_x, ref_head, weight, chunk)  # type: ignore[no-untyped-call]
    return objective, kl


@torch.no_grad()
def token_nll(x: Tensor, head: Tensor | None, labels: Tensor, chunk: int) -> Tensor:
    """Next-token losses in nats, float32[N]."""
    if head is not None:
        return fused.token_nll(x, head, labels, chunk)
    return torch.cat([_nll(x[s : s + chunk].float(), labels[s : s + chunk])[0] for s in range(0, len(x), chunk)])


@torch.no_grad()
def measures(x: Tensor, head: Tensor | None, ref_x: Tensor, ref_head: Tensor | None, labels: Tensor, *, chunk: int) -> Tensor:
    """The measures of `Comparison`, float32[10, N], of the model and its reference."""
    if head is not None and ref_head is not None:
        return compare.measures(x, head, ref_x, ref_head, labels, chunk=chunk)
    parts = (slice(start, start + chunk) for start in range(0, len(labels), chunk))
    found = [compare.of_logits(x[rows].float().clone(), ref_x[rows].float(), labels[rows, None]) for rows in parts]
    return torch.cat(found, dim=1)


class _PlainCrossEntropy(torch.autograd.Function):
    """`cross_entropy` of logits, float32 a chunk at a time; the gradient has the type of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weight: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        nll, grad = torch.empty(len(labels), device=logits.device), torch.empty_like(logits)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            nll[rows], log_p = _nll(logits[rows].float(), labels[rows])
            probability = log_p.exp_().scatter_add_(1, labels[rows, None], torch.full_like(log_p[:, :1], -1.0))
            grad[rows] = probability.mul_(weight[rows, None]).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll)
        return (nll * weight).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None, None


class _PlainKL(torch.autograd.Function):
    """`kl_divergence` of logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, weight: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        kl, grad = torch.empty(len(weight), device=logits.device), torch.empty_like(logits)
        for start in range(0, len(weight), chunk):
            rows = slice(start, start + chunk)
            own, reference = (part[rows].float().log_softmax(1) for part in (logits, ref_logits))
            share = reference.exp()
            kl[rows] = (share * (reference - own)).sum(1)
            grad[rows] = ((own.exp() - share) * weight[rows, None]).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(kl)
        return (kl * weight).sum(), kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None, None


def _nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The nll [n] and the log-probabilities [n, V] of float32 logits."""
    log_p = logits.log_softmax(1)
    return -log_p.gather(1, labels[:, None])[:, 0], log_p
