"""KL(reference || model) of both backends against a naive float64 calculation: chunk edges, masks, impossible tokens, exact tails."""

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.ladder import initial_weights, model_spec
from mlx_forget.methods import MethodSpec
from mlx_forget.pipeline.reference_rows import ReferenceRows
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, TrainerSpec
from tests.reference import GPT2

NETWORKS = available_backends()
NUM_TOKENS, WIDTH, VOCAB = 7, 5, 11
CHUNKS = (1, 3, 7)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def naive_kl(own, reference):
    """Of log-probabilities [..., V]; a token that the reference gives no probability adds nothing."""
    share = np.exp(reference)
    return np.where(share > 0, share * (reference - own), 0.0).sum(axis=-1)


def naive_tail_kl(own, reference, top):
    """Between the distributions in which all tokens but those of `top` are one."""
    kept = np.zeros(own.shape, bool)
    np.put_along_axis(kept, top, True, axis=-1)

    def merged(log_p):
        p = np.exp(log_p)
        return np.concatenate([np.take_along_axis(p, top, -1), np.where(kept, 0.0, p).sum(-1, keepdims=True)], axis=-1)

    with np.errstate(divide="ignore"):
        return naive_kl(np.log(merged(own)), np.log(merged(reference)))


def arrays(seed, *, scale=1.0, gap=0.0):
    """States and heads of a model and a reference, float32; with a gap, the reference thinks the last tokens impossible."""
    rng = np.random.default_rng(seed)
    x, ref_x = rng.standard_normal((2, NUM_TOKENS, WIDTH)).astype(np.float32)
    head, ref_head = (scale * rng.standard_normal((2, VOCAB, WIDTH))).astype(np.float32)
    ref_x[:, -1] = 1.0
    ref_head[-3:, -1] -= np.float32(gap)
    weight = rng.uniform(0.1, 2.0, NUM_TOKENS).astype(np.float32)
    # Masked tokens, at an edge of a chunk and within one.
    weight[[2, 5]] = 0
    return x, head, ref_x, ref_head, weight


def run(backend, x, head, weight, chunk, *, ref_x=None, ref_head=None, stored=None):
    """(kl, gradient of x, gradient of the head) of the objective sum(weight * kl)."""
    if backend == "cuda":
        import torch

        from cuda_backend.reference import FusedKL
        from cuda_backend.stored_reference import FusedStoredKL

        own, own_head = (torch.from_numpy(value.copy()).requires_grad_() for value in (x, head))
        if stored is None:
            others = (torch.from_numpy(ref_x), torch.from_numpy(ref_head), torch.from_numpy(weight), chunk)
            objective, kl = FusedKL.apply(own, own_head, *others)
        else:
            parts = [None if part is None else torch.from_numpy(part) for part in (stored.log_probs, stored.top, stored.tail)]
            parts[1] = None if parts[1] is None else parts[1].long()
            objective, kl = FusedStoredKL.apply(own, own_head, *parts, torch.from_numpy(weight), chunk)
        objective.backward()
        return kl.numpy(), own.grad.numpy(), own_head.grad.numpy()
    import mlx.core as mx

    from mlx_forget.mlx_backend.operators import operators
    from mlx_forget.mlx_backend.reference import kl_divergence
    from mlx_forget.mlx_backend.stored_reference import stored_kl_divergence

    how = {"chunk": chunk, "operators": operators(dtype=mx.float32, on_cpu=True, fused=False)}
    with mx.stream(mx.cpu):
        own, own_head, own_weight = map(mx.array, (x, head, weight))
        if stored is None:
            found = kl_divergence(own, own_head, mx.array(ref_x), mx.array(ref_head), own_weight, **how)
        else:
            parts = {"log_probs": stored.log_probs, "top": stored.top, "tail": stored.tail}
            held = {name: mx.array(value) for name, value in parts.items() if value is not None}
            found = stored_kl_divergence(own, own_head, held, own_weight, **how)
        return tuple(np.array(value) for value in found)


def slopes(objective, value, step=1e-6):
    """Central differences of a float64 function of an array, entry by entry."""
    out = np.empty_like(value)
    for place in np.ndindex(value.shape):
        ends = []
        for sign in (1, -1):
            moved = value.copy()
            moved[place] += sign * step
            ends.append(objective(moved))
        out[place] = (ends[0] - ends[1]) / (2 * step)
    return out


def assert_exact(found, kl_of, x, head, weight):
    """A backend's KL and gradients, against the float64 definition and its finite differences."""
    wide_x, wide_head = x.astype(np.float64), head.astype(np.float64)
    kl, grad_x, grad_head = found
    np.testing.assert_allclose(kl, kl_of(wide_x @ wide_head.T), rtol=2e-5, atol=2e-5)
    of_x = slopes(lambda value: (weight * kl_of(value @ wide_head.T)).sum(), wide_x)
    of_head = slopes(lambda value: (weight * kl_of(wide_x @ value.T)).sum(), wide_head)
    np.testing.assert_allclose(grad_x, of_x, rtol=1e-4, atol=5e-5)
    np.testing.assert_allclose(grad_head, of_head, rtol=1e-4, atol=5e-5)
    assert not grad_x[weight == 0].any(), "masked tokens pull nowhere"


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("shape", [{}, {"scale": 8.0}, {"gap": 1e4}], ids=["plain", "peaked", "impossible"])
@pytest.mark.parametrize("backend", NETWORKS)
def test_the_divergence_and_its_gradient_are_exact_whatever_the_chunk(backend, shape, chunk):
    x, head, ref_x, ref_head, weight = arrays(1, **shape)
    reference = log_softmax(ref_x.astype(np.float64) @ ref_head.astype(np.float64).T)
    assert (np.exp(reference) == 0).any() == ("gap" in shape)
    found = run(backend, x, head, weight, chunk, ref_x=ref_x, ref_head=ref_head)
    assert_exact(found, lambda logits: naive_kl(log_softmax(logits), reference), x, head, weight)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("top", [None, 1, 4, VOCAB - 1])
@pytest.mark.parametrize("backend", NETWORKS)
def test_a_kept_reference_and_its_tail_are_exact_whatever_the_chunk(backend, top, chunk):
    """Of what float16 has kept: its own distribution in float64, all other tokens as one."""
    x, head, ref_x, ref_head, weight = arrays(2)
    exact = log_softmax(ref_x.astype(np.float64) @ ref_head.astype(np.float64).T)
    rows = ReferenceRows.of(exact.astype(np.float32)[None], top)
    kept = ReferenceRows(rows.log_probs[0], *(None if part is None else part[0] for part in (rows.top, rows.tail)))
    if top is None:
        reference = log_softmax(kept.log_probs.astype(np.float64))

        def kl_of(logits):
            return naive_kl(log_softmax(logits), reference)

        np.testing.assert_allclose(np.exp(reference), np.exp(exact), rtol=3e-3)
    else:
        parts = log_softmax(np.concatenate([kept.log_probs.astype(np.float64), kept.tail.astype(np.float64)[:, None]], axis=1))
        # The tail's tokens in any proportion: only their sum is known.
        full = np.full(exact.shape, -np.inf)
        np.put_along_axis(full, kept.top.astype(np.int64), parts[:, :-1], axis=1)
        rest = np.isinf(full)
        full[rest] = np.repeat(parts[:, -1] - np.log(VOCAB - top), VOCAB - top)

        def kl_of(logits):
            return naive_tail_kl(log_softmax(logits), full, kept.top.astype(np.int64))

        likeliest = np.sort(np.exp(exact), axis=1)[:, -top:].sum(axis=1)
        np.testing.assert_allclose(1 - np.exp(parts[:, -1]), likeliest, rtol=1e-3)
    assert_exact(run(backend, x, head, weight, chunk, stored=kept), kl_of, x, head, weight)


@pytest.mark.parametrize("backend", NETWORKS)
def test_a_step_of_many_chunks_sums_masked_padded_and_segmented_rows(backend, tmp_path):
    """The whole way: more tokens than one chunk of logits, rows without a label, and documents kept apart."""
    from safetensors.numpy import save_file

    spec = model_spec("1x16", vocab_size=8192, context_length=16)
    reference = dict(initial_weights(spec, 1))
    save_file(reference, tmp_path / "reference.safetensors")
    rng, num = np.random.default_rng(3), 22
    term = np.where(np.arange(num) % 11 == 0, 0, 2).astype(np.uint8)
    mask = np.ones((num, 16), np.uint8)
    mask[3], mask[7, 5:], mask[0, 9:] = 0, 0, 0
    segment = np.sort(rng.integers(0, 3, (num, 16)), axis=1).astype(np.int32)
    tokens = rng.integers(0, spec.vocab_size, (num, 17)).astype(np.int32)
    tokens[7, 6:] = 0
    batch = Batch(tokens, mask, segment, term, (term > 0).astype(np.uint8))
    kl = term == 2
    weights = (reference if seed else dict(initial_weights(spec, 0)) for seed in (0, 1))
    own, ref = (log_softmax(GPT2(w, spec).forward(tokens[kl, :-1], segment[kl])[0]) for w in weights)
    expected = (naive_kl(own, ref) * mask[kl]).sum()
    assert (1 << 21) // spec.vocab_size < 16 * (kl.sum() - 1), "more than one chunk"
    for runtime in ({}, {"micro_batch_size": 19}):
        method = MethodSpec(name="kl-replay", coefficients=(1.0, 0.0, 0.7), reference="start")
        trainer = load_backend(backend)(
            TrainerSpec(
                model=spec, method=method, optim=OptimSpec(), runtime=RuntimeSpec(precision="fp32", num_threads=1, **runtime)
            )
        )
        trainer.set_reference(tmp_path / "reference.safetensors")
        reading = trainer.train_step(batch, 1e-3).read()
        assert reading.counts[2, 1] == mask[kl].sum()
        assert reading.loss_sums[2, 1] == pytest.approx(expected, rel=2e-5)
