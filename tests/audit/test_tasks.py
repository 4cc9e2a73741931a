"""lm-eval before and after, with a task and data of our own: nothing is fetched. Needs lm-eval (extra `eval`)."""

import json

import numpy as np
import pytest

from mlx_forget.audit.config import AuditConfig
from mlx_forget.audit.run import execute_audit, plan_audit
from mlx_forget.backends import available_backends
from mlx_forget.pipeline.tokenizer import BOS
from tests.reference import GPT2

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")

TASK = """
task: nouns
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task of 24 questions with three answers of different lengths."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    nouns = ["apple", "river", "mountain", "door", "letter", "house", "winter"]
    rows = [
        {"question": f"Number {i} of the list is a", "choices": [nouns[(i + k) % 7] + "s" * k for k in range(3)], "answer": i % 3}
        for i in range(24)
    ]
    data = tmp_path / "nouns.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "nouns.yaml").write_text(TASK.format(data=data))
    return tmp_path / "nouns.yaml", rows


def answer(weights, spec, tokenizer, row):
    """The choice with the highest log-likelihood, in float64."""
    scores = []
    for choice in row["choices"]:
        ids = tokenizer.encode(f"{row['question']} {choice}").tolist()
        num_context = len(tokenizer.encode(row["question"]))
        nll = GPT2(weights, spec).losses(np.array([[BOS, *ids][-spec.context_length - 1 :]]))[0]
        scores.append(-nll[num_context - len(ids) :].sum())
    return int(np.argmax(scores))


def test_accuracies_flips_and_agreement_are_those_of_a_float64_computation(task, make_checkpoint, notes, tokenizer, spec, tmp_path):
    file, rows = task
    weights = [make_checkpoint(tmp_path / name, moved=moved) for name, moved in (("base", 0.0), ("tuned", 0.1))]
    config = AuditConfig(backend=available_backends()[0], tasks=str(file))
    (found,) = execute_audit(plan_audit(str(tmp_path / "base"), str(tmp_path / "tuned"), {"notes": str(notes)}, config)).tasks
    before, after = ([answer(own, spec, tokenizer, row) for row in rows] for own in weights)
    hits = [[int(a == row["answer"]) for a, row in zip(answers, rows, strict=True)] for answers in (before, after)]
    assert (found.name, found.metric, found.rates.num) == ("nouns", "acc", 24)
    assert found.rates.before == pytest.approx(np.mean(hits[0]))
    assert found.rates.after == pytest.approx(np.mean(hits[1]))
    assert found.rates.lost == sum(a > b for a, b in zip(*hits, strict=True))
    assert found.agreement == pytest.approx(np.mean(np.array(before) == np.array(after)))
    assert 0 < found.agreement < 1
