"""KL divergence to a reference whose log-probabilities are kept: all of them, or those of the likeliest tokens and the rest as one.

Shapes: N tokens, D width, V vocabulary, k tokens kept of each.
"""

from typing import Any

import torch
from torch import Tensor


class FusedStoredKL(torch.autograd.Function):
    """Tied head and weighted KL(reference || model) in chunks of tokens, the reference being read instead of computed.

    `apply(x [N, D], head [V, D], log_probs float16[N, V or k], top int64[N, k] or None, tail float32[N] or None, weight float32[N],
    chunk)` returns (objective, kl): the sum of weight * kl, and the kl in nats, float32[N], which carries no gradient. The gradient of
    the logits is weight * (model - reference) in probabilities; of tokens that are not kept, the reference has the model's own
    proportions.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, log_probs: Tensor, top: Tensor | None, tail: Tensor | None, weight: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        kl = torch.empty(len(x), dtype=torch.float32, device=x.device)
        grad_x, compute_head = torch.empty_like(x), head.to(x.dtype)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            logits = (x[rows] @ compute_head.T).float()
            own = logits.sub_(logits.logsumexp(1, keepdim=True))
            if top is None or tail is None:
                kl[rows], grad_logits = _of_all(own, log_probs[rows].float())
            else:
                kl[rows], grad_logits = _of_likeliest(own, log_probs[rows].float(), top[rows], tail[rows, None])
            grad_logits = grad_logits.mul_(weight[rows, None]).to(x.dtype)
            torch.mm(grad_logits, compute_head, out=grad_x[rows])
            if grad_head is None:
                continue
            if x.dtype == torch.float32:
                grad_head.addmm_(grad_logits.T, x[rows])
            else:
                grad_head += grad_logits.T @ x[rows]
        ctx.save_for_backward(grad_x, grad_head)
        ctx.mark_non_differentiable(kl)
        ctx.head_dtype = head.dtype
        return (kl * weight).sum(), kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_head = ctx.saved_tensors
        grad_head = None if grad_head is None else (grad_head * grads[0]).to(ctx.head_dtype)
        return grad_x * grads[0], grad_head, None, None, None, None, None


def _of_all(own: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """KL [n] and the gradient of the logits [n, V], of log-probabilities [n, V]; the arguments are spoilt."""
    reference.sub_(reference.logsumexp(1, keepdim=True))
    probability = reference.exp()
    kl = reference.sub_(own).mul_(probability).sum(1)
    return kl, own.exp_().sub_(probability)


def _of_likeliest(own: Tensor, reference: Tensor, top: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the log-probabilities [n, k] of the tokens `top`, and [n, 1] of all others together."""
    norm = torch.logaddexp(reference.logsumexp(1, keepdim=True), tail)
    reference, tail = reference - norm, tail - norm
    kept, mass = own.gather(1, top), tail.exp()
    # What the model leaves to the others is summed, not subtracted from 1: it may be tiny.
    others = own.exp_().scatter_(1, top, 0.0)
    left = others.sum(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    of_tail = torch.where(mass > 0, mass * (tail - left.log()), 0.0)
    kl = (reference.exp() * (reference - kept)).sum(1) + of_tail[:, 0]
    return kl, others.mul_(1 - mass / left).scatter_(1, top, kept.exp() - reference.exp())
