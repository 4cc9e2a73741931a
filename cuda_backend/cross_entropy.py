"""The cross-entropy of hidden states and an output matrix, which never holds all logits.

Shapes: N tokens, D width, V vocabulary, K models of a stack.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SoftmaxGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Elements of one chunk of logits: on a CPU a chunk should stay in cache, on a GPU it should fill the device.
_CHUNK_ELEMENTS_CPU = 1 << 21
_CHUNK_ELEMENTS_GPU = 1 << 27


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """How many tokens' logits are held at once."""
    elements = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    return max(64, elements // vocab_size)


class FusedCrossEntropy(torch.autograd.Function):
    """Tied head and weighted cross-entropy in chunks of rows, with the gradients made while the logits are at hand.

    `apply(x [N, D], head [V, D], labels int64[N], weight float32[N], chunk)` returns (objective, nll): the sum of weight * nll,
    and the nll in nats, float32[N], which carries no gradient. The logits of a chunk are float32 whatever the type of x.
    All of them may have a leading dimension K. A sixth argument is `softmax_gradient` or a compiled one, for what is between the products.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, labels: Tensor, weight: Tensor, chunk: int, softmax: SoftmaxGradient | None = None
    ) -> tuple[Tensor, Tensor]:
        nll = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
        grad_x, compute_head, grad_head = torch.empty_like(x), head.to(x.dtype), None
        if ctx.needs_input_grad[1]:
            # Zeros laid out as a whole: the head of a stack has gaps between its members.
            grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for start in range(0, labels.shape[-1], chunk):
            stop = start + chunk
            part, label, share = x[..., start:stop, :], labels[..., start:stop, None], weight[..., start:stop, None]
            if softmax is not None:
                grad_logits, nll[..., start:stop] = softmax(part @ compute_head.mT, label, share)
            else:
                exponentials, total, nll[..., start:stop] = _exponentials(part, compute_head, label)
                # weight * (softmax - one-hot), in one pass over the chunk.
                grad_logits = exponentials.mul_(share / total).scatter_add_(-1, label, -share).to(x.dtype)
            torch.matmul(grad_logits, compute_head, out=grad_x[..., start:stop, :])
            if grad_head is None:
                continue
            if x.dtype == torch.float32:
                (grad_head.addmm_ if head.dim() == 2 else grad_head.baddbmm_)(grad_logits.mT, part)
            else:
                grad_head += grad_logits.mT @ part
        ctx.save_for_backward(grad_x, grad_head)
        ctx.mark_non_differentiable(nll)
        ctx.head_dtype = head.dtype
        return (nll * weight).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_head = ctx.saved_tensors
        grad_head = None if grad_head is None else (grad_head * grads[0]).to(ctx.head_dtype)
        return grad_x * grads[0], grad_head, None, None, None, None


def softmax_gradient(logits: Tensor, label: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """share * (softmax - one-hot) [N, V] in the type of the logits [N, V], and the nll float32[N], of int64[N, 1] labels.

    Written without a scatter, so that a compiler makes it a few passes over the logits in their own type.
    """
    wide = logits.float()
    top = wide.amax(-1, keepdim=True)
    exponentials = (wide - top).exp()
    total = exponentials.sum(-1, keepdim=True)
    hit = torch.arange(logits.shape[-1], device=logits.device) == label
    nll = (total.log() + top - wide.gather(-1, label))[..., 0]
    return (share * (exponentials / total - hit.float())).to(logits.dtype), nll


def token_nll(x: Tensor, head: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Next-token losses in nats, float32[N], in chunks, without gradients."""
    head = head.to(x.dtype)
    return torch.cat([_exponentials(x[s : s + chunk], head, labels[s : s + chunk, None])[2] for s in range(0, len(x), chunk)])


def _exponentials(x: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - max) [N, V], its row sums [N, 1] and the nll [N], float32, of int64[N, 1] labels."""
    logits = (x @ head.mT).float()
    top = logits.amax(-1, keepdim=True)
    label_logit = logits.gather(-1, labels)
    exponentials = logits.sub_(top).exp_()
    total = exponentials.sum(-1, keepdim=True)
    return exponentials, total, (total.log() + top - label_logit)[..., 0]
