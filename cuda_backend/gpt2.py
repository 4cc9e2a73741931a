"""GPT-2 in PyTorch as functions of a dict of weights in Hugging Face names, and the cross-entropy that never holds all logits.

Shapes: B rows, T tokens, D width, H heads, V vocabulary, N = B * T. A stack of K models is one dict whose weights all have a leading
dimension K; tokens are then [K, B, T], the rows of all members go through the blocks as [K * B, T, D], and products are batched.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cuda_backend import lora
from mlx_forget.adapters import A
from mlx_forget.ladder import LAYER_NORM_EPSILON, ModelSpec

Weights = Mapping[str, Tensor]
SoftmaxGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Tied: the head is the token embedding.
HEAD = "transformer.wte.weight"
BLOCK = "transformer.h.{}."

# Elements of one chunk of logits: on a CPU a chunk should stay in cache, on a GPU it should fill the device.
_CHUNK_ELEMENTS_CPU = 1 << 21
_CHUNK_ELEMENTS_GPU = 1 << 27


def hidden_states(
    weights: Weights,
    spec: ModelSpec,
    tokens_BT: Tensor,
    segment_BT: Tensor | None = None,
    *,
    grad_checkpoint: bool = False,
) -> Tensor:
    """Final hidden states [B, T, D] of int64[B, T] tokens; segments, where given, are as if each were alone.

    Of a stack: [K * B, T, D] of int64[K, B, T].
    """
    x_BTD, context = begin(weights, spec, tokens_BT, segment_BT)
    for i in range(spec.num_layers):
        if grad_checkpoint and torch.is_grad_enabled():
            x_BTD = checkpoint(block, weights, BLOCK.format(i), spec, x_BTD, *context, use_reentrant=False)
        else:
            x_BTD = block(weights, BLOCK.format(i), spec, x_BTD, *context)
    return finish(weights, x_BTD)


def begin(weights: Weights, spec: ModelSpec, tokens_BT: Tensor, segment_BT: Tensor | None) -> tuple[Tensor, tuple[Tensor | None]]:
    """What enters the first block, and what every block is given besides."""
    return _embed(weights, tokens_BT, segment_BT), (None if segment_BT is None else segment_mask(segment_BT),)


def finish(weights: Weights, x_BTD: Tensor) -> Tensor:
    """Final hidden states from what leaves the last block."""
    return _norm(x_BTD, weights, "transformer.ln_f")


def hidden_states_of_two(
    weights: Weights, reference: Weights, spec: ModelSpec, tokens_BT: Tensor, *, shared: int
) -> tuple[Tensor, Tensor]:
    """Final hidden states [B, T, D] of two models; the first `shared` blocks are those of both and computed once."""
    states = []
    start = None if shared < 0 else _through_blocks(_embed(weights, tokens_BT), weights, spec, range(shared))
    for own in (weights, reference):
        x_BTD = _embed(own, tokens_BT) if start is None else start
        x_BTD = _through_blocks(x_BTD, own, spec, range(max(0, shared), spec.num_layers))
        states.append(_norm(x_BTD, own, "transformer.ln_f"))
    return states[0], states[1]


def num_shared_blocks(weights: Weights, reference: Weights, spec: ModelSpec) -> int:
    """How many of the first blocks are the same in two models; -1 where the embeddings already differ."""

    def same(prefix: str) -> bool:
        own = [(value, reference.get(name)) for name, value in weights.items() if name.startswith(prefix)]
        return all(other is not None and (other is value or torch.equal(value, other)) for value, other in own)

    if not (same("transformer.wpe.") and same("transformer.wte.")):
        return -1
    return next((i for i in range(spec.num_layers) if not same(f"transformer.h.{i}.")), spec.num_layers)


def _through_blocks(x_BTD: Tensor, weights: Weights, spec: ModelSpec, blocks: range) -> Tensor:
    for i in blocks:
        x_BTD = block(weights, f"transformer.h.{i}.", spec, x_BTD, None)
    return x_BTD


def block(weights: Weights, prefix: str, spec: ModelSpec, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
    """One pre-norm block."""
    B, T, D = x_BTD.shape
    normed = _norm(x_BTD, weights, prefix + "ln_1")
    qkv = _linear(normed, weights, prefix + "attn.c_attn", bias=_without_key_gradient(weights[prefix + "attn.c_attn.bias"]))
    q, k, v = (part.view(B, T, spec.num_heads, spec.head_dim).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    x_BTD = x_BTD + _linear(mixed.transpose(1, 2).reshape(B, T, D), weights, prefix + "attn.c_proj")
    expanded = F.gelu(_linear(_norm(x_BTD, weights, prefix + "ln_2"), weights, prefix + "mlp.c_fc"), approximate="tanh")
    return x_BTD + _linear(expanded, weights, prefix + "mlp.c_proj")


def next_logits(weights: Weights, spec: ModelSpec, token_B: Tensor, position: int, cache: Tensor) -> Tensor:
    """Logits [B, V] after one more token; `cache` [L, 2, B, H, T, head_dim] holds keys and values and is written at `position`."""
    B = len(token_B)
    x_BD = F.embedding(token_B, weights["transformer.wte.weight"]) + weights["transformer.wpe.weight"][position]
    for i in range(spec.num_layers):
        prefix = f"transformer.h.{i}."
        qkv = _linear(_norm(x_BD, weights, prefix + "ln_1"), weights, prefix + "attn.c_attn")
        q, k, v = qkv.view(B, 3, spec.num_heads, spec.head_dim).unbind(1)
        cache[i, 0, :, :, position] = k
        cache[i, 1, :, :, position] = v
        past = cache[i, :, :, :, : position + 1]
        mixed = F.scaled_dot_product_attention(q[:, :, None], past[0], past[1])
        x_BD = x_BD + _linear(mixed.reshape(B, -1), weights, prefix + "attn.c_proj")
        expanded = F.gelu(_linear(_norm(x_BD, weights, prefix + "ln_2"), weights, prefix + "mlp.c_fc"), approximate="tanh")
        x_BD = x_BD + _linear(expanded, weights, prefix + "mlp.c_proj")
    return (_norm(x_BD, weights, "transformer.ln_f") @ weights["transformer.wte.weight"].T).float()


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


def _embed(weights: Weights, tokens: Tensor, segment: Tensor | None = None) -> Tensor:
    """Token and position embeddings [B, T, D], or [K * B, T, D] of a stack; places are counted within segments where they are given."""
    positions = weights["transformer.wpe.weight"]
    if segment is None:
        placed = positions[..., None, : tokens.shape[-1], :]
    else:
        placed = _rows_of(positions, segment_positions(segment).view(tokens.shape))
    return (_rows_of(weights["transformer.wte.weight"], tokens) + placed).flatten(0, -3)


def _rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a [V, D] table at int64[B, T]; of a stack's [K, V, D], at int64[K, B, T] within each member's own."""
    if table.dim() == 2:
        return F.embedding(index, table)
    first_row = torch.arange(0, table.shape[0] * table.shape[1], table.shape[1], device=index.device)[:, None, None]
    return F.embedding(index + first_row, table.flatten(0, 1))


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    weight, bias = weights[name + ".weight"], weights[name + ".bias"]
    if weight.dim() == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPSILON)
    normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON).view(len(weight), -1, x.shape[-1])
    return torch.addcmul(bias[:, None], normed, weight[:, None]).view(x.shape)


def _without_key_gradient(bias: Tensor) -> Tensor:
    """The bias of queries, keys and values, with no gradient for that of the keys.

    Attention does not change when one vector is added to all keys: that gradient is zero, and AdamW would turn its rounding error into
    full steps.
    """
    query, key, value = bias.chunk(3, dim=-1)
    return torch.cat([query, key.detach(), value], dim=-1)


def _linear(x: Tensor, weights: Weights, name: str, bias: Tensor | None = None) -> Tensor:
    weight, bias = weights[name + ".weight"], weights[name + ".bias"] if bias is None else bias
    if name + A in weights:
        product = lora.linear(x.reshape(-1, x.shape[-1]), weights, name, bias)
    elif weight.dim() == 2:
        product = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    else:
        product = torch.baddbmm(bias[:, None], x.reshape(len(weight), -1, x.shape[-1]), weight)
    return product.view(*x.shape[:-1], weight.shape[-1])


def segment_positions(segment_BT: Tensor) -> Tensor:
    """Places int64[B, T] counted from the start of each segment."""
    place = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    begins = F.pad(segment_BT[:, 1:] != segment_BT[:, :-1], (1, 0))
    return place - torch.where(begins, place, 0).cummax(1).values


def segment_mask(segment_BT: Tensor) -> Tensor:
    """Which key each query may see, bool[B, 1, T, T]: earlier ones of its segment."""
    same = segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
    return same & torch.ones(segment_BT.shape[1], segment_BT.shape[1], dtype=torch.bool, device=same.device).tril()
