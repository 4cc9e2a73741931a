"""Attention by PyTorch against its definition in double precision: both ways of computing it, with and without segments."""

import math

import pytest

torch = pytest.importorskip("torch")

from cuda_backend import attention as module  # noqa: E402
from cuda_backend.attention import attention  # noqa: E402
from cuda_backend.segments import segment_mask  # noqa: E402

# Of the largest entry: a bf16 number is within 2^-9 of what it stands for, and these are sums of products of such.
BANDS = {"float32": 2e-6, "bfloat16": 2e-2}


def inputs(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 24, 16, generator=generator).to(getattr(torch, dtype)) for _ in range(4)]


def two_segments():
    return segment_mask(torch.cat([torch.zeros(3, 10), torch.ones(3, 14)], dim=1))


def as_defined(q, k, v, mask):
    allowed = torch.ones(q.shape[2], q.shape[2]).tril().bool() if mask is None else mask
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("long", [False, True], ids=["short-rows", "long-rows"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "segments"])
@pytest.mark.parametrize("dtype", BANDS)
def test_attention_and_its_gradient_are_as_defined(dtype, masked, long, monkeypatch):
    if long:
        monkeypatch.setattr(module, "_LONG", 0)
    *parts, grad = inputs(dtype)
    mask = two_segments() if masked else None
    leaves = [part.requires_grad_() for part in parts]
    found = attention(*leaves, mask)
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = as_defined(*exact, mask)
    pairs = [(found, expected)]
    pairs += zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == getattr(torch, dtype)
        assert (ours.double() - theirs).abs().max() <= BANDS[dtype] * theirs.abs().max()


def test_short_rows_in_bf16_that_want_a_gradient_are_computed_in_fp32():
    *parts, _ = inputs("bfloat16")
    plain = torch.nn.functional.scaled_dot_product_attention
    in_fp32 = plain(*(part.float() for part in parts), is_causal=True).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*(part.requires_grad_() for part in parts), None), in_fp32)
    with torch.no_grad():
        assert torch.equal(attention(*(part.detach() for part in parts), None), plain(*parts, is_causal=True))
