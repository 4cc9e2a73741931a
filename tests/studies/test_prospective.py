"""Predictions that are written before the runs: once, with their fit and date, and held against the runs that come after."""

import json
from datetime import UTC, datetime

import pytest

from mlx_forget.errors import UserError
from mlx_forget.laws.files import fit_json, read_fit, write_fit
from mlx_forget.laws.fit import fit_groups
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.uncertainty import BootstrapOptions, assess
from mlx_forget.resources import recipe as find_recipe
from mlx_forget.studies.prospective import (
    compare,
    outcome_lines,
    predict_recipe,
    prediction_lines,
    predictions,
    summary,
    write_predictions,
)
from mlx_forget.sweeps.grid import read_recipe
from mlx_forget.table_files import table_from_rows
from tests.studies.test_law_study import SIZES, TRUTH, flat_row, synthetic

MADE = datetime(2026, 1, 1, 12, tzinfo=UTC)
RECIPE = """
config: {target: code, pretrain: prose}
list:
  - {model: 0.16m, target_tokens: 55000, p: 2%}
  - {model: 0.65m, target: math, target_tokens: 550000, p: 0}
  - {model: 1.3m, target_tokens: 2000000, p: 10%}
smoke: {}
"""


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "fit.json"
    fits = fit_groups(table_from_rows(synthetic(noise=0.004)), "bethune-forgetting", by="domain")
    assessed = {domain: assess(one, BootstrapOptions(num_resamples=100)) for domain, one in fits.items()}
    write_fit(path, fit_json(assessed, by="domain"), assessed)
    return path


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def runs_of(content, *, shift=0.0, ended="2026-01-02T00:00:00Z"):
    """What the true law measures at every prediction."""
    law = get_law("bethune-forgetting")
    rows = []
    for one in predictions(content):
        share = float(one.p.rstrip("%")) / 100
        before = 4.0
        loss = float(law.predict(TRUTH[one.domain], {"N": one.N, "D": one.D, "p": share, "L0": before})[0]) + shift
        row = flat_row(one.domain, next(iter(SIZES)), one.D - 64, "0", loss)
        numbers = {"N": one.N, "P": one.N, "L0": before, "p_asked": one.p, "p": share, "p_rows": share}
        rows.append({**row, **numbers, "run": str(len(rows)), "ended_at": ended})
    return rows


def test_predictions_cover_what_the_true_law_gives_and_say_what_lies_outside(fit, recipe):
    content = predict_recipe(fit, read_recipe(recipe), level=0.95, now=MADE)
    small, _, large = predictions(content)
    assert small.N == 161_088
    assert small.low < small.forgetting < small.high
    assert (set(small.outside), set(large.outside)) == ({"D"}, {"D"})
    outcomes = compare(content, runs_of(content))
    assert summary(outcomes)["num_covered"] == summary(outcomes)["num_measured"] == 3
    assert summary(outcomes)["mre"] < 0.01
    off = summary(compare(content, runs_of(content, shift=0.5)))
    assert off["num_covered"] == 0
    assert off["mean_error_nats"] == pytest.approx(0.5, abs=0.05)


def test_the_interval_of_a_run_is_wider_than_that_of_the_law(fit):
    predictor = read_fit(fit).pick("code")
    question = {"N": 4e5, "D": 2e5, "p": 0.02, "L0": 0.0}
    law, run = predictor.interval(question), predictor.run_interval(question)
    assert run[0][0] < law[0][0] < law[1][0] < run[1][0]
    assert 0.5 * 0.004 * 4.5 < predictor.noise_nats < 2 * 0.004 * 4.5


def test_runs_that_ended_before_or_measure_no_point_do_not_count(fit, recipe):
    content = predict_recipe(fit, read_recipe(recipe), level=0.95, now=MADE)
    for ended in ("2026-01-01T11:00:00Z", None):
        assert summary(compare(content, runs_of(content, ended=ended)))["num_measured"] == 0
    rows = runs_of(content)
    rows[0]["status"] = "finished"
    assert summary(compare(content, rows[:2]))["num_measured"] == 1
    assert [one.run for one in compare(content, [])] == [None] * 3


def test_the_comparison_shows_what_was_run_since_and_counts_the_others(fit, recipe):
    content = predict_recipe(fit, read_recipe(recipe), level=0.95, now=MADE)
    rows = runs_of(content)[:2]
    rows[0]["ended_at"] = "2026-01-01T11:00:00Z"
    lines = outcome_lines(content, compare(content, rows))
    assert len([line for line in lines if line.startswith("|")]) == 2 + 1
    assert "Of 3 predictions: 1 without a finished run, 1 run before they were predicted." in lines
    assert len([line for line in prediction_lines(content) if line.startswith("|")]) == 2 + 3


def test_predictions_are_written_once(fit, recipe, tmp_path):
    content = predict_recipe(fit, read_recipe(recipe), level=0.9, now=MADE)
    write_predictions(tmp_path / "predictions.json", content)
    with pytest.raises(UserError, match="made once"):
        write_predictions(tmp_path / "predictions.json", content)
    assert json.loads((tmp_path / "predictions.json").read_text())["made_at"] == "2026-01-01T12:00:00Z"


def test_the_command_predicts_a_recipe_and_holds_it_against_runs(run_forget, fit, recipe, tmp_path):
    made = tmp_path / "predictions.json"
    code, _, err = run_forget("predict", str(fit), "--recipe", str(recipe), "-o", str(made))
    assert code == 0, err
    assert run_forget("predict", str(fit), "--recipe", str(recipe), "-o", str(made))[0] == 2
    (tmp_path / "empty").mkdir()
    code, out, err = run_forget("predict", str(made), "--measured", str(tmp_path / "empty"), "--json")
    assert code == 0, err
    assert json.loads(out)["summary"]["num_predictions"] == 3
    for wrong in (
        (str(fit), "--measured", str(tmp_path)),
        (str(made), "--measured", str(tmp_path / "nowhere")),
        (str(made), "--measured", str(tmp_path), "-o", "x.json"),
        (str(fit), "--recipe", str(recipe), "--n", "1e6"),
    ):
        code, _, err = run_forget("predict", *wrong)
        assert code == 2, wrong
        assert "Traceback" not in err
    assert f"{fit} holds no predictions" in run_forget("predict", str(fit), "--measured", str(tmp_path))[2]
    assert "There is no file of predictions" in run_forget("predict", str(tmp_path / "none"), "--measured", str(tmp_path))[2]
    made.write_text(made.read_text().replace('"forgetting"', '"forgetful"'))
    code, _, err = run_forget("predict", str(made), "--measured", str(tmp_path / "empty"))
    assert (code, "is damaged" in err) == (2, True)


def test_what_cannot_be_predicted_is_refused(fit, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("config: {model: 0.16m, target: prose, target_tokens: 1000, p: 0}")
    with pytest.raises(UserError, match="has no fit of prose, which other trains on, but of code, math"):
        predict_recipe(fit, read_recipe(other), level=0.95)
    run = "config: {model: 0.16m, target: code, target_tokens: 60000, p: 0"
    for more, said in (
        ("}\nstages: [{target: code}, {target: math}]", "has stages"),
        (", method: l2-sp}", "runs of l2-sp"),
        (", fine_tune_type: lora}", "runs of lora"),
        (", init: scratch}", "runs of pretraining"),
    ):
        other.write_text(run + more)
        with pytest.raises(UserError, match=said):
            predict_recipe(fit, read_recipe(other), level=0.95)


def test_no_configuration_of_the_test_is_a_cell_of_the_grid(monkeypatch):
    monkeypatch.delenv("FORGET_SCALE", raising=False)
    cells = {(c.model, c.target, c.target_tokens, str(c.p)) for c in read_recipe(find_recipe("ladder-builtin")).configs({})}
    asked = [(c.model, c.target, c.target_tokens, str(c.p)) for c in read_recipe(find_recipe("ladder-prospective")).configs({})]
    assert len(set(asked)) >= 5
    assert not cells & set(asked)
