"""Advice from a fit, from a table and from a probe of one model."""

import json

import numpy as np
import pytest

from mlx_forget.laws.forms import get_law

from .surfaces import paper_grid


def test_advise_names_the_smallest_share_and_the_next_runs(forget, runs, one, tmp_path):
    forget("fit", runs, *one, "-o", tmp_path / "fit.json")
    ran = forget(
        "advise",
        tmp_path / "fit.json",
        "--max-forgetting",
        "0.08",
        "--n",
        "3.34e8",
        "--d",
        "1e7",
        "--next-runs",
        "3",
        "--plot",
        tmp_path,
        "--json",
    )
    assert ran.json["unknown"] == "p"
    assert 0.01 < ran.json["answer"] < 0.06
    assert ran.json["upper_forgetting_nats"] <= 0.0801
    assert len(ran.json["next_runs"]) == 3
    assert (tmp_path / "advice.png").stat().st_size > 5000


def test_a_budget_out_of_reach_comes_without_numbers(forget, runs, one, tmp_path):
    forget("fit", runs, *one, "-o", tmp_path / "fit.json")
    ran = forget("advise", tmp_path / "fit.json", "--max-forgetting", "1e-5", "--n", "4.1e7", "--d", "3e7", "--json")
    assert ran.code == 0
    assert "expected" not in ran.stderr
    assert {ran.json[key] for key in ("answer", "columns", "expected_forgetting_nats", "cost")} == {None}


def test_runs_of_one_d_answer_at_that_d_only(forget, runs, tmp_path):
    lines = [line for line in runs.read_text().splitlines() if line.startswith("N") or ("code" in line and ",3000000.0," in line)]
    path = tmp_path / "one.csv"
    path.write_text("\n".join(line for line in lines if line.startswith(("N", "334"))) + "\n")
    ask = ("advise", path, "--map", "loss=final_loss", "--max-forgetting", "0.1", "--json")
    assert 0.0 < forget(*ask, "--d", "3e6").json["answer"] < 0.05
    for other in (("--d", "1e7"), ("--p", "1%")):
        refused = forget(*ask, *other)
        assert refused.code == 2
        assert "nothing says what other D do" in refused.stderr


def test_a_probe_becomes_advice_for_one_model(forget, tmp_path):
    plan = tmp_path / "probe.jsonl"
    assert forget("advise", "--probe", plan, "--d", "3e7").code == 0
    runs = [json.loads(line) for line in plan.read_text().splitlines()]
    law = get_law("forgetting-fixed-n")
    truth = {"A": 0.002, "beta": 0.35, "B": 600.0, "alpha": 0.5}
    columns = {name: np.array([run[name] for run in runs]) for name in ("D", "p")} | {"L0": np.full(len(runs), 3.2)}
    loss = law.predict(truth, columns) * np.exp(0.0005 * np.random.default_rng(0).standard_normal(len(runs)))
    done = tmp_path / "done.jsonl"
    done.write_text(
        "".join(json.dumps({**run, "L0": 3.2, "loss": value}) + "\n" for run, value in zip(runs, loss.tolist(), strict=True))
    )
    ran = forget("advise", done, "--max-forgetting", "0.3", "--d", "3e7", "--json")
    assert ran.code == 0
    exact = ((0.002 * 3e7**0.35 / 0.3) ** 2 - 1) / 600
    assert ran.json["answer"] is None or 0.5 * exact < ran.json["answer"] < 4 * exact


def test_the_pareto_front_holds_no_run_that_another_beats(forget, runs, one, tmp_path):
    forget("fit", runs, *one, "-o", tmp_path / "fit.json")
    law = get_law("bethune-finetuning")
    columns = {name: values for name, values in paper_grid().items() if name in law.columns}
    loss = law.predict({"A": 60.0, "alpha": 0.1, "beta": 0.05, "E": 1.0}, columns)
    loss *= np.exp(0.002 * np.random.default_rng(0).standard_normal(len(loss)))
    rows = zip(columns["N"].tolist(), columns["D"].tolist(), loss.tolist(), strict=True)
    (tmp_path / "target.csv").write_text("N,D,loss\n" + "".join(f"{n},{d},{value}\n" for n, d, value in rows))
    made = forget(
        "fit", tmp_path / "target.csv", "--law", law.name, "--allow-duplicates", "--bootstrap", "0", "-o", tmp_path / "target.json"
    )
    assert made.code == 0, made.stderr
    ask = ("advise", tmp_path / "fit.json", "--max-forgetting", "0.08", "--n", "3.34e8", "--d", "1e7")
    ran = forget(*ask, "--finetuning", tmp_path / "target.json", "--epochs", "2", "--json")
    assert ran.code == 0, ran.stderr
    front = [(one["target_loss"], one["forgetting_nats"], one["train_flops"]) for one in ran.json["pareto"]]
    assert len(front) > 3
    assert not any(all(a <= b for a, b in zip(other, own, strict=True)) for own in front for other in front if other is not own)
    refused = forget(*ask, "--finetuning", tmp_path / "fit.json")
    assert refused.code == 2
    assert "takes a fit of a law of the target loss" in refused.stderr


def test_a_table_answers_for_one_group_at_its_largest_model_and_data(forget, runs):
    ran = forget("advise", runs, "--map", "loss=final_loss", "--group", "code", "--max-forgetting", "0.08", "--json")
    assert ran.code == 0, ran.stderr
    assert "no --n given: answering at the largest N of the data" in ran.stderr
    assert "no --d given" in ran.stderr
    assert 0 < ran.json["answer"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Give a fit.json or a table of runs"),
        (("--probe", "probe.jsonl"), "needs the planned number of finetuning tokens"),
        (("RUNS",), "Give the budget"),
        (
            ("RUNS", "--max-forgetting", "0.1"),
            "runs of several domains, each with a law of its own: name one with --group (code, math)",
        ),
        (("RUNS", "--max-forgetting", "0.1", "--group", "law"), "No row of"),
        (("RUNS", "--max-forgetting", "0.1", "--group", "code", "--law", "forgetting-fixed-n"), "is the law of one model"),
        (("FIT", "--max-forgetting", "0.1", "--confidence", "1.5"), "--confidence must lie between 0 and 1"),
        (("FIT", "--max-forgetting", "0.1", "--epochs", "0"), "--epochs must be a positive number"),
        (("FIT", "--max-forgetting", "0.1", "--n", "1e8", "--d", "1e7", "--p", "1%"), "Leave exactly one of"),
        (("FIT", "--max-forgetting", "0.1", "--p", "1%"), "Leave exactly one of"),
    ],
)
def test_questions_that_cannot_be_answered_say_what_is_lacking(forget, runs, one, tmp_path, arguments, sentence):
    if "FIT" in arguments:
        forget("fit", runs, *one[:-1], "0", "-o", tmp_path / "fit.json")
    places = {"RUNS": (runs, "--map", "loss=final_loss"), "FIT": (tmp_path / "fit.json",)}
    ran = forget("advise", *(part for word in arguments for part in places.get(word, (word,))))
    assert ran.code == 2
    assert sentence in " ".join(ran.stderr.split())
