"""KL divergence to the frozen reference, and the penalties that hold the weights near it.

Shapes: N tokens, D width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlx_forget.methods import MethodSpec

Arrays = dict[str, Tensor]


class FusedKL(torch.autograd.Function):
    """Tied heads and weighted KL(reference || model) over the full vocabulary, in chunks of tokens.

    `apply(x [N, D], head [V, D], ref_x [N, D], ref_head [V, D], weight float32[N], chunk)` returns (objective, kl): the sum of
    weight * kl, and the kl in nats, float32[N], which carries no gradient. Logits are float32, and only a chunk of them is held, of the
    model and of the reference. The gradient of the logits is weight * (model - reference) in probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, ref_x: Tensor, ref_head: Tensor, weight: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        kl = torch.empty(len(x), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        compute_head, ref_head = head.to(x.dtype), ref_head.to(x.dtype)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            logits, ref_logits = (x[rows] @ compute_head.T).float(), (ref_x[rows] @ ref_head.T).float()
            total, ref_total = logits.logsumexp(1, keepdim=True), ref_logits.logsumexp(1, keepdim=True)
            reference = (ref_logits - ref_total).exp_()
            kl[rows] = (ref_logits.sub_(logits).mul_(reference).sum(1, keepdim=True) - ref_total + total)[:, 0]
            grad_logits = logits.sub_(total).exp_().sub_(reference).mul_(weight[rows, None]).to(x.dtype)
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
        return grad_x * grads[0], grad_head, None, None, None, None


@torch.no_grad()
def add_penalty_gradients(
    method: MethodSpec, weights: Mapping[str, Tensor], gradients: Arrays, reference: Arrays, fisher: Arrays | None
) -> None:
    """Add the gradients of L2-SP and EWC to those of the losses, in place."""
    names = list(gradients)
    distance = torch._foreach_sub([weights[name].detach() for name in names], [reference[name] for name in names])
    if method.l2_sp:
        torch._foreach_add_([gradients[name] for name in names], distance, alpha=method.l2_sp)
    if method.ewc and fisher is not None:
        torch._foreach_mul_(distance, [fisher[name] for name in names])
        torch._foreach_add_([gradients[name] for name in names], distance, alpha=method.ewc)


@torch.no_grad()
def pull_to_reference(
    weights: Mapping[str, Tensor], reference: Arrays, anchor_decay: float, learning_rate: float, skipped: Tensor
) -> None:
    """The decoupled decay of Anchored AdamW, in place, before the Adam step; nothing where `skipped` is 1."""
    values = [weights[name].detach() for name in reference]
    distance = torch._foreach_sub(list(reference.values()), values)
    torch._foreach_mul_(distance, min(1.0, learning_rate * anchor_decay) * (1 - skipped))
    torch._foreach_add_(values, distance)
