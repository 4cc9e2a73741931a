"""Advice from a fit, from a table and from a probe of one model."""

import json

import numpy as np

from mlx_forget.laws.forms import get_law


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
