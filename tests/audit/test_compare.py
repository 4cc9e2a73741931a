"""`compare` against a float64 computation, on every backend: measures, chunks, shared blocks, memory."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.comparison import Portions, portions
from mlx_forget.errors import UserError
from mlx_forget.ladder import initial_weights, model_spec, num_params
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from tests.reference import GPT2, softmax

SPEC = model_spec("3x48", vocab_size=211, context_length=24)


def weights(seed, *, scale=1.0):
    return {name: value * np.float32(scale) for name, value in initial_weights(SPEC, seed)}


def perturbed(start, seed, size, *, keep=()):
    random = np.random.default_rng(seed)
    return {
        name: value if any(part in name for part in keep) else value + random.normal(0, size, value.shape).astype(np.float32)
        for name, value in start.items()
    }


def exact_of(tuned, base, spec, tokens):
    """The measures of `Comparison` in float64."""
    label = tokens[:, 1:, None].astype(int)
    p, q = (softmax(GPT2(w, spec).forward(tokens[:, :-1])[0]) for w in (tuned, base))
    logp, logq = np.log(p), np.log(q)
    best = q.argmax(-1)[..., None]

    def at(values, index):
        return np.take_along_axis(values, index, -1)[..., 0]

    return {
        "nll": -at(logp, label),
        "ref_nll": -at(logq, label),
        "kl": (q * (logq - logp)).sum(-1),
        "soft_ce": -(q * logp).sum(-1),
        "hard_ce": -at(logp, best),
        "agreement": p.argmax(-1) == best[..., 0],
        "hit": p.argmax(-1) == label[..., 0],
        "ref_hit": q.argmax(-1) == label[..., 0],
        "confidence": p.max(-1),
        "ref_confidence": q.max(-1),
    }


@pytest.fixture(params=available_backends())
def comparing(request, tmp_path):
    """A function from two sets of weights, tokens and a mask to a comparison."""

    def compare(tuned, base, tokens, mask, **runtime):
        trainer = load_backend(request.param)(TrainerSpec(model=SPEC, runtime=RuntimeSpec(reads_only=True, **runtime)))
        for name, values in (("tuned", tuned), ("base", base)):
            save_file(values, tmp_path / f"{name}.safetensors")
        trainer.load(tmp_path / "tuned.safetensors")
        trainer.set_reference(tmp_path / "base.safetensors")
        return trainer.compare(tokens, mask)

    return compare


def tokens_of(rows=7, seed=0):
    tokens = np.random.default_rng(seed).integers(0, SPEC.vocab_size, (rows, SPEC.context_length + 1)).astype(np.int32)
    mask = np.ones((rows, SPEC.context_length), np.uint8)
    mask[0, 9:] = 0
    return tokens, mask


# Frozen embeddings and blocks are computed once for both models: what is shared must not change what is found.
@pytest.mark.parametrize("keep", [(), ("wte", "wpe", ".h.0."), ("wte", "wpe", ".h."), ("wte",)], ids=str)
def test_every_measure_equals_a_float64_computation(comparing, keep):
    base = weights(0, scale=2.0)
    tuned = perturbed(base, 1, 0.05, keep=keep)
    tokens, mask = tokens_of()
    for rows, own in ((slice(1, 4), tuned), (slice(4, 6), base)):
        # Random labels are never hits: some last ones are what a model expects.
        tokens[rows, -1] = GPT2(own, SPEC).forward(tokens[rows, :-1])[0][:, -1].argmax(-1)
    found, wanted = comparing(tuned, base, tokens, mask), exact_of(tuned, base, SPEC, tokens)
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(found, name), values * mask, atol=1e-4, err_msg=name)
    assert found.kl[mask == 1].max() > 1e-3
    assert 3 <= found.hit.sum() < mask.sum()
    assert 2 <= found.ref_hit.sum() < mask.sum()
    assert found.agreement[mask == 1].mean() < 1


def test_a_model_against_itself_is_zero_to_the_last_bit(comparing):
    base = weights(3, scale=3.0)
    tokens, mask = tokens_of()
    found = comparing(base, base, tokens, mask)
    np.testing.assert_array_equal(found.nll, found.ref_nll)
    np.testing.assert_array_equal(found.kl, 0)
    np.testing.assert_array_equal(found.confidence, found.ref_confidence)
    np.testing.assert_array_equal(found.agreement, mask)


def test_how_much_is_held_at_once_changes_nothing(comparing, monkeypatch):
    base = weights(0)
    tuned = perturbed(base, 1, 0.05)
    tokens, mask = tokens_of()
    whole = comparing(tuned, base, tokens, mask)
    for module in ("cuda_backend.trainer", "mlx_forget.mlx_backend.trainer"):
        if module in sys.modules:
            monkeypatch.setattr(f"{module}.portions", lambda *_, **__: Portions(num_tokens=50, num_logits=7))
    small = comparing(tuned, base, tokens, mask)
    for field in dataclasses.fields(whole):
        np.testing.assert_allclose(getattr(small, field.name), getattr(whole, field.name), atol=2e-5, err_msg=field.name)


def test_portions_shrink_to_fit_and_refuse_what_cannot():
    most = Portions(1 << 16, 1 << 14)
    spec = model_spec("12x768", vocab_size=32_000, context_length=1024)
    assert portions(spec, most, limit_gb=None, used_bytes=0) == most
    roomy = portions(spec, most, limit_gb=64, used_bytes=0)
    tight = portions(spec, most, limit_gb=2, used_bytes=10**8)
    assert roomy == most
    assert tight.num_tokens < most.num_tokens
    assert tight.num_logits < most.num_logits
    need = 8 * num_params(spec) / 1e9
    with pytest.raises(UserError, match="is below what two models of 110,418,432 parameters need"):
        portions(spec, most, limit_gb=need, used_bytes=0)


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from mlx_forget.ladder import initial_weights, model_spec
from mlx_forget.backends import load_backend
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from safetensors.numpy import save_file
spec = model_spec("2x64", vocab_size=40_000, context_length=128)
save_file(dict(initial_weights(spec, 0)), sys.argv[2])
limit = float(sys.argv[3])
backend = load_backend(sys.argv[1])
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
trainer = backend(TrainerSpec(model=spec, runtime=RuntimeSpec(reads_only=True, memory_limit_gb=used + limit, num_threads=2)))
trainer.load(Path(sys.argv[2])); trainer.set_reference(Path(sys.argv[2]))
tokens = np.random.default_rng(0).integers(0, 40_000, (64, 129)).astype(np.int32)
trainer.compare(tokens, np.ones((64, 128), np.uint8))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 - used)
"""


@pytest.mark.parametrize("backend", available_backends())
def test_a_comparison_stays_within_its_memory_limit(backend, tmp_path):
    # All logits of these 8,192 tokens would take 1.3 GB for each model.
    command = [sys.executable, "-c", MEMORY, backend, str(tmp_path / "w.safetensors"), "0.35"]
    grown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert grown.returncode == 0, grown.stderr
    assert float(grown.stdout) < 0.35
