"""Rows that are functions of (weights, seed, row) alone, and their distribution."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.ladder import model_spec
from mlx_forget.pipeline.tokenizer import BOS
from mlx_forget.replay.sampling import SampleSpec, sample_rows, uniforms
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from tests.fakes import BigramTrainer

NETWORKS = available_backends()
SMALL = model_spec("2x32", vocab_size=20, context_length=12)


@pytest.fixture(params=["fake", *NETWORKS])
def backend(request):
    return BigramTrainer if request.param == "fake" else load_backend(request.param)


def trainer_of(backend, spec=SMALL, seed=0):
    return backend(TrainerSpec(model=spec, runtime=RuntimeSpec(precision="fp32"), seed=seed))


def test_uniforms_depend_on_seed_row_and_position_alone():
    whole = uniforms(3, 0, 50, 40)
    assert ((whole >= 0) & (whole < 1)).all()
    np.testing.assert_array_equal(uniforms(3, 7, 5, 40), whole[7:12])
    np.testing.assert_array_equal(uniforms(3, 0, 50, 11), whole[:, :11])
    assert not (uniforms(4, 0, 50, 40) == whole).any()
    assert len(np.unique(whole)) == whole.size


def test_a_row_is_the_same_whatever_the_batch(backend):
    trainer = trainer_of(backend)
    whole = sample_rows(trainer, SampleSpec(num_tokens=1, length=12, seed=5, batch_size=64), 0, 23)
    for batch_size, first in ((1, 0), (5, 0), (4, 9)):
        spec = SampleSpec(num_tokens=1, length=12, seed=5, batch_size=batch_size)
        np.testing.assert_array_equal(sample_rows(trainer, spec, first, 23 - first), whole[first:])


@pytest.mark.skipif(len(NETWORKS) < 2, reason="one backend has nothing to agree with")
def test_backends_sample_the_same_tokens():
    spec = SampleSpec(num_tokens=1, length=12, seed=2, prompt=(7, 8))
    left, right = (sample_rows(trainer_of(load_backend(name)), spec, 0, 200) for name in NETWORKS)
    np.testing.assert_array_equal(left, right)
    assert (left[:, :2] == [7, 8]).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_models_probabilities(backend, temperature):
    """Chi-square of first and second tokens against exact probabilities, and of a wrong distribution, which must be seen."""
    trainer, num_rows, vocabulary = trainer_of(backend), 6000, np.arange(20, dtype=np.int32)
    if backend is BigramTrainer:
        trainer.weight *= 25

    def conditional(context):
        rows = np.array([[*context, token] for token in vocabulary], np.int32)
        probability = np.exp(-trainer.token_losses(rows)[:, -1].astype(np.float64) / temperature)
        return probability / probability.sum()

    first = conditional([BOS])
    second = sum(share * conditional([BOS, token]) for token, share in zip(vocabulary, first, strict=True))
    spec = SampleSpec(num_tokens=1, length=2, seed=1, temperature=temperature, batch_size=2000)
    rows = sample_rows(trainer, spec, 0, num_rows)
    for column, exact in ((0, first), (1, second)):
        counts = np.bincount(rows[:, column], minlength=20)
        assert stats.chisquare(counts, exact * num_rows).pvalue > 1e-4
        assert stats.chisquare(counts, np.full(20, num_rows / 20)).pvalue < 1e-6


def test_whole_rows_after_a_prompt_have_their_joint_probability(backend):
    """Chi-square over every continuation of three tokens: what is cached of earlier tokens is what the model would have seen."""
    spec, temperature, num_rows, V = model_spec("2x32", vocab_size=6, context_length=8), 0.5, 8000, 6
    trainer = trainer_of(backend, spec, seed=3)
    if backend is BigramTrainer:
        trainer.weight *= 25
    sampling = SampleSpec(num_tokens=1, length=5, seed=4, temperature=temperature, prompt=(4, 2), batch_size=997)
    rows = sample_rows(trainer, sampling, 0, num_rows)
    assert (rows[:, :2] == [4, 2]).all()
    tokens = np.stack(np.meshgrid(*[np.arange(V)] * 3, indexing="ij"), -1).reshape(-1, 3)
    prompts = np.tile(np.array([BOS, 4, 2]), (len(tokens), 1))
    nll = trainer.token_losses(np.concatenate([prompts, tokens], axis=1).astype(np.int32))[:, -3:].astype(np.float64)
    joint = np.ones((V, V, V))
    for place in range(3):
        conditional = np.exp(-nll[:, place].reshape(V, V, V) / temperature)
        own = conditional[(..., *[slice(1)] * (2 - place))]
        assert np.allclose(conditional, own, rtol=1e-4), "the loss of a token does not depend on those after it"
        joint *= own / own.sum(axis=place, keepdims=True)
    counts = np.bincount(rows[:, 2:] @ [V * V, V, 1], minlength=V**3)
    marginals = [joint.sum(axis=tuple({0, 1, 2} - {place})) for place in range(3)]
    independent = np.einsum("a,b,c->abc", *marginals)
    assert stats.chisquare(counts, joint.ravel() * num_rows).pvalue > 1e-4
    assert stats.chisquare(counts, independent.ravel() * num_rows).pvalue < 1e-6, (
        "tokens that did not depend on one another would be seen"
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_another_process_samples_the_same_rows(name):
    script = (
        "import hashlib\n"
        "from mlx_forget.replay.sampling import SampleSpec, sample_rows\n"
        "from tests.replay.test_replay import SMALL, load_backend, trainer_of\n"
        f"trainer = trainer_of(load_backend({name!r}), seed=6)\n"
        "rows = sample_rows(trainer, SampleSpec(num_tokens=1, length=12, seed=9, batch_size=BATCH), 5, 60)\n"
        "print(hashlib.sha256(rows.tobytes()).hexdigest())\n"
    )
    there = subprocess.run(
        [sys.executable, "-c", script.replace("BATCH", "7")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout.split()[-1]
    rows = sample_rows(trainer_of(load_backend(name), seed=6), SampleSpec(num_tokens=1, length=12, seed=9), 0, 65)[5:]
    assert there == hashlib.sha256(rows.tobytes()).hexdigest()
