"""GPT-2 in MLX as functions of a dict of weights in Hugging Face names, with its gradient written out.

The gradient is by hand because compiled operators lose their fusion inside `mx.grad` (see `operators.py`), and because it lets the
cross-entropy hold a chunk of logits at a time.

Shapes: B rows, T tokens, D width, H heads, V vocabulary, N = B * T. A stack of K models is one dict whose weights all have a leading
dimension K; tokens are then [K, B, T], the rows of all members go through the blocks as [K * B, T, D], and products are batched.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_forget.adapters import A
from mlx_forget.ladder import LAYER_NORM_EPSILON, ModelSpec
from mlx_forget.mlx_backend import lora
from mlx_forget.mlx_backend.operators import Operators
from mlx_forget.mlx_backend.reference import kl_divergence
from mlx_forget.mlx_backend.stored_reference import stored_kl_divergence

Weights = Mapping[str, mx.array]
# What the KL term of some rows needs, as a tree of arrays that compiled functions take: `nll_rows` int32[n] and `kl_rows` int32[k],
# `kl_weight` float32[k, T], and `reference`, the weights of the frozen model, or `stored`, what is kept of it.
KLTerm = dict[str, Any]

# Tied: the head is the token embedding.
HEAD = "transformer.wte.weight"

# Elements of one chunk of logits: on a CPU a chunk should stay in cache, on a GPU it should fill the device.
_CHUNK_ELEMENTS_CPU = 1 << 21
_CHUNK_ELEMENTS_GPU = 1 << 27


def hidden_states(
    weights: Weights, spec: ModelSpec, tokens_BT: mx.array, segment_BT: mx.array | None = None, *, operators: Operators
) -> mx.array:
    """Final hidden states float32[B, T, D] of int32[B, T] tokens; segments, where given, are as if each were alone."""
    x_BTD, allowed = _embed(weights, tokens_BT, segment_BT), segment_mask(segment_BT)
    for i in range(spec.num_layers):
        x_BTD, _ = block(_of_block(weights, i), spec, x_BTD, allowed, operators)
    return _norm(x_BTD, weights, "transformer.ln_f")


def hidden_states_of_two(
    weights: Weights, reference: Weights, spec: ModelSpec, tokens_BT: mx.array, *, shared: int, operators: Operators
) -> tuple[mx.array, mx.array]:
    """Final hidden states float32[B, T, D] of two models; the first `shared` blocks are those of both and computed once."""
    states = []
    start = None if shared < 0 else _through_blocks(_embed(weights, tokens_BT), weights, spec, range(shared), operators)
    for own in (weights, reference):
        x_BTD = _embed(own, tokens_BT) if start is None else start
        x_BTD = _through_blocks(x_BTD, own, spec, range(max(0, shared), spec.num_layers), operators)
        states.append(_norm(x_BTD, own, "transformer.ln_f"))
    return states[0], states[1]


def num_shared_blocks(weights: Weights, reference: Weights, spec: ModelSpec) -> int:
    """How many of the first blocks are the same in two models; -1 where the embeddings already differ."""

    def same(prefix: str) -> bool:
        own = [(value, reference.get(name)) for name, value in weights.items() if name.startswith(prefix)]
        return all(other is not None and (other is value or mx.array_equal(value, other).item()) for value, other in own)

    if not (same("transformer.wpe.") and same("transformer.wte.")):
        return -1
    return next((i for i in range(spec.num_layers) if not same(f"transformer.h.{i}.")), spec.num_layers)


def _through_blocks(x_BTD: mx.array, weights: Weights, spec: ModelSpec, blocks: range, operators: Operators) -> mx.array:
    for i in blocks:
        x_BTD, _ = block(_of_block(weights, i), spec, x_BTD, None, operators)
    return x_BTD


def gradients(
    weights: Weights,
    spec: ModelSpec,
    tokens_BT: mx.array,
    labels_BT: mx.array,
    weight_BT: mx.array,
    segment_BT: mx.array | None = None,
    *,
    chunk: int,
    operators: Operators,
    grad_checkpoint: bool = False,
    penalty: KLTerm | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Next-token losses in nats, float32[B, T], and the float32 gradients of their sum weighted by float32[B, T].

    Of a stack, tokens, labels, weights, segments and losses are [K, B, T].
    `grad_checkpoint` keeps the inputs of each block only and computes the block again on the way back. With a `penalty`, which a stack
    does not have, the losses are those of its `nll_rows`, followed by the KL of its `kl_rows`, float32[n + k, T], and the gradients
    those of both terms. Of weights with folded adapters, the gradients are those of the adapters' entries alone.
    """
    allowed = segment_mask(segment_BT)
    x_BTD = _embed(weights, tokens_BT, segment_BT)
    inputs: list[mx.array] = []
    saved: list[Any] = []
    for i in range(spec.num_layers):
        inputs.append(x_BTD)
        x_BTD, kept = block(_of_block(weights, i), spec, x_BTD, allowed, operators)
        saved.append(None if grad_checkpoint else kept)
    head = weights["transformer.wte.weight"]
    members = head.shape[:-2]
    final = _norm(x_BTD, weights, "transformer.ln_f")

    def states_of(reference: Weights, tokens: mx.array, segment: mx.array | None) -> mx.array:
        return hidden_states(reference, spec, tokens, segment, operators=operators)

    losses, grad_final, grad_head = objective(
        final, head, HEAD, tokens_BT, labels_BT, weight_BT, segment_BT, penalty, chunk, operators, states_of
    )
    grads: dict[str, mx.array] = {}
    grad = _norm_gradient(grad_final.reshape(x_BTD.shape), x_BTD, weights, "transformer.ln_f", grads, "")
    for i in reversed(range(spec.num_layers)):
        own, prefix, kept = _of_block(weights, i), f"transformer.h.{i}.", saved.pop()
        if grad_checkpoint:
            # Without the dependency, nothing would stop the evaluation from computing every block again at once.
            _, kept = block(own, spec, mx.depends([inputs[i]], [grad])[0], allowed, operators)
        grad = _block_gradient(grad, inputs.pop(), kept, own, operators, grads, prefix)
    grads["transformer.wte.weight"] = add_rows(grad_head, tokens_BT, grad)
    if segment_BT is None:
        positions = grad.reshape(*tokens_BT.shape, spec.width).sum(axis=-3)
        unused = mx.zeros((*members, spec.context_length - positions.shape[-2], spec.width))
        grads["transformer.wpe.weight"] = mx.concatenate([positions, unused], axis=-2)
    else:
        unused = mx.zeros((*members, spec.context_length, spec.width))
        grads["transformer.wpe.weight"] = add_rows(unused, segment_positions(segment_BT), grad)
    return losses, {name: grads[name] for name in lora.trained_entries(weights) or weights}


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


def block(
    weights: Weights, spec: ModelSpec, x_BTD: mx.array, allowed: mx.array | None, operators: Operators
) -> tuple[mx.array, Any]:
    """One pre-norm block, and what its gradient needs; `weights` are its own. The residual stream stays float32."""
    B, T, D = x_BTD.shape
    tape: lora.Tape = {}
    normed = _norm(x_BTD, weights, "ln_1")
    qkv = _linear(normed, weights, "attn.c_attn", operators, tape)
    q, k, v = qkv.reshape(B, T, 3, spec.num_heads, spec.head_dim).transpose(2, 0, 3, 1, 4)
    mixed_BHTE, saved = operators.attention(q, k, v, allowed)
    mixed = mixed_BHTE.transpose(0, 2, 1, 3).reshape(B, T, D)
    middle = x_BTD + _linear(mixed, weights, "attn.c_proj", operators, tape)
    normed_middle = _norm(middle, weights, "ln_2")
    expanded = _linear(normed_middle, weights, "mlp.c_fc", operators, tape)
    activated, gelu_saved = operators.gelu(expanded)
    out = middle + _linear(activated, weights, "mlp.c_proj", operators, tape)
    return out, (normed, saved, mixed, middle, normed_middle, expanded, gelu_saved, activated, tape)


def _block_gradient(
    grad: mx.array, x: mx.array, kept: Any, weights: Weights, operators: Operators, grads: dict[str, mx.array], prefix: str
) -> mx.array:
    """The gradient of a block's input from that of its output, both float32[B, T, D]; those of its weights go into `grads`."""
    normed, saved, mixed, middle, normed_middle, expanded, gelu_saved, activated, tape = kept
    B, T, D = x.shape
    inner = _linear_gradient(grad, activated, weights, "mlp.c_proj", operators, grads, prefix, tape)
    inner = operators.gelu_gradient(expanded, gelu_saved, inner)
    inner = _linear_gradient(inner, normed_middle, weights, "mlp.c_fc", operators, grads, prefix, tape)
    grad = grad + _norm_gradient(inner, middle, weights, "ln_2", grads, prefix)
    inner = _linear_gradient(grad, mixed, weights, "attn.c_proj", operators, grads, prefix, tape)
    heads = inner.astype(mixed.dtype).reshape(B, T, saved[0].shape[1], -1).transpose(0, 2, 1, 3)
    parts = mx.stack(list(operators.attention_gradient(saved, heads)))
    inner = parts.transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * D)
    inner = _linear_gradient(inner, normed, weights, "attn.c_attn", operators, grads, prefix, tape)
    # Attention does not change when one vector is added to all keys: their bias has no gradient, and AdamW would turn the rounding
    # error of that zero into steps.
    bias = prefix + "attn.c_attn.bias"
    if bias in grads:
        query, key, value = mx.split(grads[bias], 3, axis=-1)
        grads[bias] = mx.concatenate([query, mx.zeros_like(key), value], axis=-1)
    return grad + _norm_gradient(inner, x, weights, "ln_1", grads, prefix)


def next_logits(
    weights: Weights,
    spec: ModelSpec,
    token_B: mx.array,
    position: int,
    cache: list[mx.array],
    operators: Operators,
) -> mx.array:
    """Logits float32[B, V] after one more token.

    `cache` holds keys and values of each layer, [2, B, H, T, head_dim], and is written at `position`.
    """
    B = len(token_B)
    x_BD = weights["transformer.wte.weight"][token_B] + weights["transformer.wpe.weight"][position]
    for i in range(spec.num_layers):
        own = _of_block(weights, i)
        qkv = _linear(_norm(x_BD, own, "ln_1"), own, "attn.c_attn", operators)
        qkv = qkv.reshape(B, 3, spec.num_heads, 1, spec.head_dim).swapaxes(0, 1)
        cache[i][:, :, :, position : position + 1] = qkv[1:]
        k, v = cache[i][:, :, :, : position + 1]
        scores = (qkv[0].astype(mx.float32) * spec.head_dim**-0.5) @ k.astype(mx.float32).swapaxes(-1, -2)
        exponentials = operators.exp_below(scores, scores.max(axis=-1, keepdims=True))
        mixed = (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(v.dtype) @ v
        x_BD = x_BD + _linear(mixed.reshape(B, -1), own, "attn.c_proj", operators)
        expanded, _ = operators.gelu(_linear(_norm(x_BD, own, "ln_2"), own, "mlp.c_fc", operators))
        x_BD = x_BD + _linear(expanded, own, "mlp.c_proj", operators)
    head = weights["transformer.wte.weight"].astype(operators.dtype)
    return operators.matmul(_norm(x_BD, weights, "transformer.ln_f").astype(operators.dtype), head.T).astype(mx.float32)


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
    grad_x = mx.concatenate(grads, axis=-2) - weight[..., None] * _rows(head, labels)
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
    label_logit = (x.astype(mx.float32) * _rows(head, labels).astype(mx.float32)).sum(axis=-1, keepdims=True)
    return exponentials, total, (mx.log(total) + top - label_logit)[..., 0]


def _add_product(total: mx.array, a: mx.array, b: mx.array, operators: Operators) -> mx.array:
    if operators.dtype == mx.float32:
        return mx.addmm(total, a, b)
    return total + operators.matmul(a, b).astype(mx.float32)


def _of_block(weights: Weights, index: int) -> dict[str, mx.array]:
    """A block's own weights, named without its prefix."""
    prefix = f"transformer.h.{index}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _rows(table: mx.array, index: mx.array) -> mx.array:
    """Rows of a [V, D] table at integers of any shape; of a stack's [K, V, D], at integers [K, ...] within each member's own."""
    return table[index] if table.ndim == 2 else table.reshape(-1, table.shape[-1])[_offset(table, index)]


def add_rows(table: mx.array, index: mx.array, values: mx.array) -> mx.array:
    """The table with values added at the rows that `_rows` reads; values are [..., D] in the order of the index."""
    flat = table.reshape(-1, table.shape[-1])
    index = index if table.ndim == 2 else _offset(table, index)
    return flat.at[index.reshape(-1)].add(values.reshape(-1, table.shape[-1])).reshape(table.shape)


def _offset(table: mx.array, index: mx.array) -> mx.array:
    """Rows within each member's table as rows of all tables one after the other."""
    first = mx.arange(len(table), dtype=mx.int32) * table.shape[1]
    return index + first.reshape(-1, *[1] * (index.ndim - 1))


def _embed(weights: Weights, tokens_BT: mx.array, segment_BT: mx.array | None = None) -> mx.array:
    """Token and position embeddings [B, T, D], of a stack [K * B, T, D]; places are counted within segments where they are given."""
    table, positions = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    if segment_BT is None:
        placed = positions[..., None, : tokens_BT.shape[-1], :]
    else:
        placed = _rows(positions, segment_positions(segment_BT))
    return (_rows(table, tokens_BT) + placed).reshape(-1, tokens_BT.shape[-1], table.shape[-1])


def _norm(x: mx.array, weights: Weights, name: str) -> mx.array:
    return _layer_norm(x, weights[name + ".weight"], weights[name + ".bias"])


def _layer_norm(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    if weight.ndim == 1:
        return mx.fast.layer_norm(x, weight, bias, LAYER_NORM_EPSILON)
    normed = mx.fast.layer_norm(x, None, None, LAYER_NORM_EPSILON).reshape(len(weight), -1, x.shape[-1])
    return (normed * weight[:, None] + bias[:, None]).reshape(x.shape)


def _linear(x: mx.array, weights: Weights, name: str, operators: Operators, tape: lora.Tape | None = None) -> mx.array:
    weight, bias = weights[name + ".weight"], weights[name + ".bias"]
    if name + A in weights:
        flat = x.reshape(-1, x.shape[-1]).astype(operators.dtype)
        return lora.linear(flat, weights, name, operators, tape).reshape(*x.shape[:-1], weight.shape[-1])
    flat = x.reshape(*weight.shape[:-2], -1, x.shape[-1]).astype(operators.dtype)
    bias = bias if bias.ndim == 1 else bias[:, None]
    if operators.dtype == mx.float32:
        product = mx.addmm(bias, flat, weight)
    else:
        product = operators.matmul(flat, weight.astype(operators.dtype)) + bias.astype(operators.dtype)
    return product.reshape(*x.shape[:-1], weight.shape[-1])


def _linear_gradient(
    grad: mx.array,
    x: mx.array,
    weights: Weights,
    name: str,
    operators: Operators,
    grads: dict[str, mx.array],
    prefix: str,
    tape: lora.Tape,
) -> mx.array:
    """float32 gradient of a linear map's input; those of its weight and bias, or of its adapter, go into `grads`."""
    if name + A in weights:
        flat = grad.reshape(-1, grad.shape[-1]).astype(mx.float32)
        return lora.linear_gradient(flat, weights, name, operators, grads, prefix, tape).reshape(x.shape)
    weight = weights[name + ".weight"].astype(operators.dtype)
    members = weight.shape[:-2]
    flat_grad = grad.reshape(*members, -1, grad.shape[-1])
    narrow = flat_grad.astype(operators.dtype)
    flat_x = x.reshape(*members, -1, x.shape[-1]).astype(operators.dtype)
    grads[prefix + name + ".weight"] = operators.matmul(flat_x.swapaxes(-1, -2), narrow).astype(mx.float32)
    grads[prefix + name + ".bias"] = flat_grad.astype(mx.float32).sum(axis=-2)
    return operators.matmul(narrow, weight.swapaxes(-1, -2)).astype(mx.float32).reshape(x.shape)


def _norm_gradient(grad: mx.array, x: mx.array, weights: Weights, name: str, grads: dict[str, mx.array], prefix: str) -> mx.array:
    """Gradient of a norm's input; those of its weight and bias go into `grads`."""
    names = (name + ".weight", name + ".bias")
    _, (grad_x, *own) = mx.vjp(_layer_norm, [x, *(weights[n] for n in names)], [grad])
    grads.update(zip((prefix + n for n in names), own, strict=True))
    return grad_x


def segment_positions(segment_BT: mx.array) -> mx.array:
    """Places int32[..., T] counted from the start of each segment."""
    place = mx.arange(segment_BT.shape[-1], dtype=mx.int32)
    begins = mx.pad(segment_BT[..., 1:] != segment_BT[..., :-1], [(0, 0)] * (segment_BT.ndim - 1) + [(1, 0)])
    return place - mx.cummax(mx.where(begins, place, 0), axis=-1)


def segment_mask(segment_BT: mx.array | None) -> mx.array | None:
    if segment_BT is None:
        return None
    segment_BT = segment_BT.reshape(-1, segment_BT.shape[-1])
    same = segment_BT[:, None, :, None] == segment_BT[:, None, None, :]
    return same & mx.tri(segment_BT.shape[1], dtype=mx.bool_)
