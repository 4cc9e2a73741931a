"""Two models on the same tokens, in one pass over their logits, a chunk at a time.

Shapes: B rows, T tokens, D width, V vocabulary, N = B * T.
"""

import torch
from torch import Tensor

from cuda_backend import cross_entropy
from mlx_forget.comparison import MEASURES, Portions

# Tokens of a forward pass on a CPU and a GPU; logits are chunked as in training.
_TOKENS_CPU, _TOKENS_GPU = 1 << 13, 1 << 16


def most(vocab_size: int, device: torch.device) -> Portions:
    """The portions that are fastest where memory is no matter."""
    return Portions(_TOKENS_CPU if device.type == "cpu" else _TOKENS_GPU, cross_entropy.chunk_rows(vocab_size, device))


@torch.no_grad()
def measures(x: Tensor, head: Tensor, ref_x: Tensor, ref_head: Tensor, labels: Tensor, *, chunk: int) -> Tensor:
    """The measures of `Comparison`, float32[10, N], from hidden states [N, D] and heads [V, D] of the model and its reference."""
    head, ref_head = head.to(x.dtype), ref_head.to(x.dtype)
    out = torch.empty(len(MEASURES), len(labels), device=x.device)
    for start in range(0, len(labels), chunk):
        rows = slice(start, start + chunk)
        out[:, rows] = of_logits((x[rows] @ head.T).float(), (ref_x[rows] @ ref_head.T).float(), labels[rows, None])
    return out


def of_logits(logits: Tensor, ref_logits: Tensor, label: Tensor) -> Tensor:
    """The measures of one chunk of logits float32[n, V] and labels int64[n, 1]; the logits of the model are overwritten."""
    ref_best = ref_logits.argmax(1, keepdim=True)
    ref_top, top = ref_logits.gather(1, ref_best), logits.amax(1, keepdim=True)
    at_label, ref_at_label, at_best = logits.gather(1, label), ref_logits.gather(1, label), logits.gather(1, ref_best)
    exponentials = (ref_logits - ref_top).exp_()
    ref_total = exponentials.sum(1, keepdim=True)
    # Means over the reference's distribution of both models' logits.
    own, cross = _dot(exponentials, ref_logits) / ref_total, _dot(exponentials, logits) / ref_total
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    log_sum, ref_log_sum = total.log() + top, ref_total.log() + ref_top
    soft_ce = log_sum - cross
    rows = (
        log_sum - at_label,
        ref_log_sum - ref_at_label,
        (soft_ce - (ref_log_sum - own)).clamp_(min=0),
        soft_ce,
        log_sum - at_best,
        at_best == top,
        at_label == top,
        ref_at_label == ref_top,
        total.reciprocal(),
        ref_total.reciprocal(),
    )
    return torch.stack([row[:, 0].float() for row in rows])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, [n, 1]."""
    return (a[:, None, :] @ b[:, :, None])[:, 0]
