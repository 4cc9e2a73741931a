"""A whole audit against a slow computation in float64, on every backend, and what it says of a model against itself."""

import dataclasses
import json
import math

import numpy as np
import pytest

from mlx_forget.audit.config import AuditConfig
from mlx_forget.audit.groups import KINDS, kind_of_piece
from mlx_forget.audit.measures import transitions
from mlx_forget.audit.reading import Reading
from mlx_forget.audit.run import execute_audit, plan_audit
from mlx_forget.audit.statistics import jackknife, ratio
from mlx_forget.audit.texts import Text, parse_texts
from mlx_forget.backends import available_backends
from mlx_forget.errors import UserError
from mlx_forget.pipeline.tokenizer import BOS, EOS
from tests.audit.test_compare import exact_of


@pytest.fixture(params=available_backends())
def audit(request):
    def run(base, tuned, texts, **keys):
        return execute_audit(plan_audit(str(base), str(tuned), texts, AuditConfig(backend=request.param, **keys)))

    return run


def by_document(notes, tokenizer, spec, tuned, base):
    """Every measure of every document in float64, one document and window at a time."""
    found = []
    for line in notes.read_text().splitlines():
        text = json.loads(line)["text"]
        labels = [*tokenizer.encode(text).tolist(), EOS]
        parts = []
        for start in range(0, len(labels), spec.context_length):
            tokens = np.array([[BOS, *labels[start : start + spec.context_length]]])
            parts.append({name: values[0] for name, values in exact_of(tuned, base, spec, tokens).items()})
        found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        found[-1]["label"], found[-1]["bytes"] = np.array(labels), len(text.encode())
        found[-1]["position"] = np.arange(len(labels)) % spec.context_length
    return found


def test_an_audit_equals_a_slow_computation_in_float64(audit, make_checkpoint, notes, tokenizer, spec, tmp_path):
    base, tuned = make_checkpoint(tmp_path / "base"), make_checkpoint(tmp_path / "tuned", moved=0.08)
    found = audit(tmp_path / "base", tmp_path / "tuned", {"notes": str(notes)})
    (text,) = found.texts
    wanted = by_document(notes, tokenizer, spec, tuned, base)
    whole = {name: np.concatenate([document[name] for document in wanted]) for name in wanted[0] if name != "bytes"}
    num_bytes = sum(document["bytes"] for document in wanted)
    losses = text.losses
    assert (text.num_documents, text.num_tokens, text.num_bytes) == (40, len(whole["nll"]), num_bytes)

    change = whole["nll"] - whole["ref_nll"]
    for estimate, value in [
        (losses.loss_before, whole["ref_nll"].mean()),
        (losses.loss_after, whole["nll"].mean()),
        (losses.forgetting, change.mean()),
        (losses.kl, whole["kl"].mean()),
        (losses.soft_ce, whole["soft_ce"].mean()),
        (losses.hard_ce, whole["hard_ce"].mean()),
        (losses.agreement, whole["agreement"].mean()),
        (losses.entropy_before, (whole["soft_ce"] - whole["kl"]).mean()),
        (losses.bits_per_byte_before, whole["ref_nll"].sum() / math.log(2) / num_bytes),
        (losses.bits_per_byte_after, whole["nll"].sum() / math.log(2) / num_bytes),
        (losses.bits_per_byte_change, change.sum() / math.log(2) / num_bytes),
        (text.transitions.hits_before, whole["ref_hit"].mean()),
        (text.transitions.lost, (whole["ref_hit"] & ~whole["hit"]).mean()),
        (text.transitions.gained, (~whole["ref_hit"] & whole["hit"]).mean()),
        (text.calibration_before.overconfidence, (whole["ref_confidence"] - whole["ref_hit"]).mean()),
        (text.calibration_after.overconfidence, (whole["confidence"] - whole["hit"]).mean()),
    ]:
        assert estimate.value == pytest.approx(value, abs=1e-4)
    assert abs(losses.forgetting.value) > 0.01

    # The jackknife, one document left out at a time, by hand.
    left_out = []
    for i in range(40):
        rest = [d["nll"] - d["ref_nll"] for j, d in enumerate(wanted) if j != i]
        left_out.append(np.concatenate(rest).mean())
    stderr = math.sqrt(39 / 40 * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    assert losses.forgetting.stderr == pytest.approx(stderr, rel=1e-3)

    error = 0.0
    for low in range(15):
        inside = np.minimum((whole["confidence"] * 15).astype(int), 14) == low
        if inside.any():
            error += inside.mean() * abs(whole["confidence"][inside].mean() - whole["hit"][inside].mean())
    assert text.calibration_after.expected_error.value == pytest.approx(error, abs=1e-4)

    kinds = {group.name: group for group in text.divisions[0].groups}
    kind_of = np.array([KINDS.index(kind_of_piece(piece)) for piece in tokenizer.piece_bytes])[whole["label"]]
    assert {KINDS[i] for i in set(kind_of.tolist())} == set(kinds)
    assert sum(group.num_tokens for group in kinds.values()) == text.num_tokens
    assert kinds["number"].change.value == pytest.approx(change[kind_of == KINDS.index("number")].mean(), abs=1e-4)
    for division in (text.positions, *text.divisions):
        assert sum(group.share for group in division.groups) == pytest.approx(1)
    first = text.positions.groups[0]
    assert (first.name, first.num_tokens) == ("0", (whole["position"] == 0).sum())
    assert first.change.value == pytest.approx(change[whole["position"] == 0].mean(), abs=1e-4)
    assert text.positions.groups[-1].name == "16 to 31"

    means = sorted((d["nll"] - d["ref_nll"]).mean() for d in wanted if len(d["nll"]) >= 16)
    for rows, most in ((text.documents_forgotten, means[::-1]), (text.documents_gained, means)):
        expected = [mean for mean in most[:10] if (mean > 0) == (rows is text.documents_forgotten)]
        assert [row.change for row in rows] == pytest.approx(expected, abs=1e-4)
        assert all(row.passage and (row.change > 0) == (sum(c for _, c in row.passage) > 0) for row in rows)
    for row in text.tokens_forgotten:
        here = whole["label"] == row.id
        assert row.num_tokens == here.sum()
        assert row.change == pytest.approx(change[here].mean(), abs=1e-4)
        assert row.change > 2 * row.stderr > 0
    json.dumps(found.as_json(), allow_nan=False)


def test_a_model_against_itself_forgot_nothing(audit, make_checkpoint, notes, tmp_path):
    make_checkpoint(tmp_path / "base")
    found = audit(tmp_path / "base", tmp_path / "base", {"notes": str(notes)}, fail_above=0.0)
    (text,) = found.texts
    assert found.passed is True
    for estimate in (text.losses.forgetting, text.losses.kl, text.losses.bits_per_byte_change, text.transitions.lost):
        assert (estimate.value, estimate.stderr, estimate.low, estimate.high) == (0, 0, 0, 0)
    assert text.transitions.adjusted_lost.value == text.transitions.adjusted_gained.value == 0
    assert text.losses.agreement.value == 1
    assert text.calibration_before == text.calibration_after
    assert text.tokens_forgotten == text.tokens_gained == text.documents_forgotten == text.documents_gained == ()
    assert (found.weights.distance, found.weights.relative) == (0, 0)
    assert {tensor.rank for tensor in found.weights.tensors} == {0, None}


def test_windows_may_be_shorter_than_the_context(audit, make_checkpoint, notes, tmp_path):
    make_checkpoint(tmp_path / "base")
    make_checkpoint(tmp_path / "tuned", moved=0.05)
    (text,) = audit(tmp_path / "base", tmp_path / "tuned", {"notes": str(notes)}, max_seq_length=10).texts
    assert text.positions.groups[-1].name == "8 to 9"
    with pytest.raises(UserError, match="exceeds the models' context of 32"):
        audit(tmp_path / "base", tmp_path / "tuned", {"notes": str(notes)}, max_seq_length=33)


def test_texts_are_named_by_the_user_or_after_themselves():
    assert parse_texts(["general=a/b.txt", "prose", "c/law.jsonl"]) == {
        "general": "a/b.txt",
        "prose": "prose",
        "law": "c/law.jsonl",
    }
    for wrong in (["=x"], ["a="], ["a=x", "a=y"], ["law.txt", "x/law.txt"]):
        with pytest.raises(UserError, match="--data"):
            parse_texts(wrong)


def test_intervals_of_resampled_evaluation_sets_hold_the_difference_on_all_the_data(make_checkpoint, tmp_path):
    """Over 200 evaluation sets drawn from documents of very uneven length, 92% to 98% of the 95% intervals hold."""
    random = np.random.default_rng(3)
    words = ["harbour", "the", "of", "letters", "seven", "and", "quietly", "rain", "12", "until", "(see)", "Anna"]
    texts = [" ".join(random.choice(words, int(np.ceil(random.lognormal(2.5, 0.8))))) for _ in range(400)]
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    make_checkpoint(tmp_path / "base")
    make_checkpoint(tmp_path / "tuned", moved=0.08)
    config = AuditConfig(backend=available_backends()[0])
    found = execute_audit(
        plan_audit(str(tmp_path / "base"), str(tmp_path / "tuned"), {"many": str(tmp_path / "many.jsonl")}, config)
    )
    (text,) = found.texts
    tokens, before, after = (np.array(column) for column in dataclasses.astuple(text.per_document))
    sums = np.stack([tokens, tokens * (after - before)], axis=1)
    truth = text.losses.forgetting.value
    assert sums[:, 1].sum() / sums[:, 0].sum() == pytest.approx(truth, abs=1e-6)
    held = 0
    for _ in range(200):
        estimate = jackknife(sums[random.integers(0, 400, 100)], ratio(1, 0))
        held += estimate.low <= truth <= estimate.high
    assert 184 <= held <= 196


@pytest.mark.parametrize("known_before, known_after", [(0.6, 0.6), (0.6, 0.35), (0.3, 0.5)])
def test_lucky_guesses_are_taken_out_of_flips(known_before, known_after):
    """Answers that are known or guessed: the adjusted shares find how much knowledge was lost and gained."""
    random = np.random.default_rng(0)
    num, chance = 60_000, 0.2
    label = np.where(random.random(num) < chance, 0, random.integers(1, 400, num))
    knowing = random.random(num)
    before = knowing < known_before
    after = (knowing < min(known_before, known_after)) | ((knowing >= known_before) & (knowing < known_after))
    hits = [known | (random.random(num) < chance) for known in (before, after)]
    document = np.repeat(np.arange(60), num // 60)
    text = Text("t", "t", "f", "all", 1, tuple(np.zeros(num // 60, np.int32) for _ in range(60)), np.ones(60, np.int64), 0)
    measures = {"ref_hit": hits[0].astype(float), "hit": hits[1].astype(float)}
    found = transitions(Reading(text, label, document, document, label > 0, measures))
    assert found.chance == pytest.approx(chance, abs=0.01)
    assert found.adjusted_lost.value == pytest.approx((before & ~after).mean(), abs=0.015)
    assert found.adjusted_gained.value == pytest.approx((after & ~before).mean(), abs=0.015)
    # Guesses alone make flips in both directions.
    assert found.lost.value + found.gained.value > found.adjusted_lost.value + found.adjusted_gained.value + 0.03
