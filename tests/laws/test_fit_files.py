"""fit.json and its draws: what they keep, and that damaged ones are refused."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from mlx_forget.errors import UserError
from mlx_forget.laws.files import fit_json, read_fit, write_fit
from mlx_forget.laws.fit import fit_law
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.model import Constraints
from mlx_forget.laws.predictor import Predictor
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, assess

from .conftest import TRUTH
from .surfaces import SIZES, paper_grid


def test_a_file_keeps_what_was_not_determined_what_was_held_and_how_the_fit_ended(tmp_path):
    columns = paper_grid(sizes=SIZES[2:3], shares=np.array([0.0, 0.01]))
    loss = get_law("bethune-forgetting").predict(TRUTH, columns) * np.exp(0.004 * np.random.default_rng(0).standard_normal(10))
    fit = fit_law(Table.of(**columns, loss=loss), "bethune-forgetting", constraints=Constraints(fixed={"beta": 0.4}))
    found = assess(fit, BootstrapOptions(num_resamples=20, method="residual"))
    content = fit_json({"": found}, extrapolation={"train_on": "p < 1", "num_test": 1, "mre": 0.01, "max": 0.02})
    read = read_fit(write_fit(tmp_path / "new" / "fit.json", content, {"": found}))
    saved, live = read.pick(None), Predictor.from_uncertainty(found)
    assert set(saved.unidentified) == {"alpha", "B"}
    for name in ("params", "data_range", "widening", "unidentified", "group"):
        assert getattr(saved, name) == getattr(live, name), name
    assert np.array_equal(saved.draws, live.draws)
    assert saved.columns.keys() == live.columns.keys()
    sha256 = hashlib.sha256((tmp_path / "new" / "fit.draws.npz").read_bytes()).hexdigest()
    of_draws = {"draws": "fit.draws.npz", "draws_sha256": sha256, "draws_groups": [""]}
    assert read.content == json.loads(json.dumps({**content, **of_draws}))
    (flag,) = read.content["flags"]
    assert {**flag, "parameters": tuple(flag["parameters"])} == vars(fit.flags[0])
    for name, value in {
        "schema_version": 1, "law": "bethune-forgetting", "loss": "huber", "link": "log", "delta": 0.001, "reduction": "sum",
        "fixed": {"beta": 0.4}, "tied": {}, "shared": [], "by": None, "groups": {}, "columns": ["N", "D", "p", "L0"], "num_rows": 10,
        "objective": fit.value, "mre": pytest.approx(fit.mre), "status": "converged", "reason": fit.certificate.reason,
        "clusters": {"level": "row", "num": 10}, "warnings": list(found.warnings),
        "extrapolation": {"train_on": "p < 1", "num_test": 1, "mre": 0.01, "max": 0.02},
        "intervals": {"method": "residual bootstrap", "level": 0.95, "widen": live.widening.at(0.95), "inflation": 1.0, "degrees_of_freedom": live.widening.degrees},
        "bootstrap": {"num_resamples": 20, "mre": None, "share_converged": found.draws.share_converged},
    }.items():  # fmt: skip
        assert read.content[name] == value, name
    for name in ("num_starts", "num_agree", "excess", "gradient_norm"):
        assert read.content["certificate"][name] == getattr(fit.certificate, name)
    assert read.content["params"]["beta"] == {"value": 0.4, "low": 0.4, "high": 0.4, "reason": "fixed by the user, not estimated"}
    (tmp_path / "new" / "fit.draws.npz").unlink()
    assert len(read_fit(tmp_path / "new" / "fit.json").pick(None).draws) == 0
    (tmp_path / "new" / "fit.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a fit: give a fit\.json"):
        read_fit(tmp_path / "new" / "fit.json")


def test_groups_add_up_in_the_file_of_their_fits(tmp_path):
    found, columns = {}, paper_grid(sizes=SIZES[:2], tokens=[1e6, 3e6, 1e7])
    for i, name in enumerate(("code", "math")):
        loss = get_law("bethune-forgetting").predict(TRUTH, columns) * np.exp(0.004 * np.random.default_rng(i).standard_normal(30))
        rows = np.arange(30) >= 5 * i
        found[name] = assess(
            fit_law(Table.of(**columns, loss=loss).select(rows), "bethune-forgetting"), BootstrapOptions(num_resamples=5)
        )
    content = fit_json(found, by="domain")
    code, math = content["groups"]["code"], content["groups"]["math"]
    assert (content["num_rows"], code["num_rows"], math["num_rows"], content["by"]) == (55, 30, 25, "domain")
    assert content["objective"] == pytest.approx(code["objective"] + math["objective"])
    assert content["mre"] == pytest.approx((30 * code["mre"] + 25 * math["mre"]) / 55)
    assert (content["params"], content["status"], content["bootstrap"]["num_resamples"]) == ({}, "converged", 5)
    assert content["data_range"]["p"] == [0.0, 0.05]
    assert content["data_range"]["loss"] == [min(code["data_range"]["loss"][0], math["data_range"]["loss"][0]), max(code["data_range"]["loss"][1], math["data_range"]["loss"][1])]  # fmt: skip
    assert content["reason"] == f"code: {code['reason']}; math: {math['reason']}"
    saved = read_fit(write_fit(tmp_path / "fit.json", content, found))
    assert list(saved.predictors) == ["code", "math"]
    assert saved.pick("math").params == Predictor.from_uncertainty(found["math"]).params
    assert saved.pick("math").group == "math"
    with pytest.raises(UserError, match="groups code, math: name one with --group, none was named"):
        saved.pick(None)
    with pytest.raises(UserError, match="not 'prose'"):
        saved.pick("prose")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ("[]", "not a fit"),
        ('{"law": "chinchilla", "params": {}, "schema_version": 99}', "schema version 99"),
    ],
)
def test_a_file_that_is_no_fit_is_refused(forget, tmp_path, text, words):
    path = tmp_path / "fit.json"
    path.write_text(text)
    ran = forget("predict", path, "--n", "1e9", "--d", "1e9")
    assert ran.code == 2
    assert words in ran.stderr


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content["params"].pop("B"), "is damaged"),
        (lambda content: content["params"]["B"].update(value="x"), "is damaged"),
        (lambda content: content.pop("data_range"), "is damaged"),
        (lambda content: content.update(law="zzz"), "Unknown law 'zzz'"),
    ],
)
def test_a_damaged_fit_is_refused_in_a_line(forget, runs, one, tmp_path, change, words):
    path = tmp_path / "fit.json"
    forget("fit", runs, *one, "-o", path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    ran = forget("predict", path, "--n", "1e9", "--d", "1e6", "--p", "1%")
    assert (ran.code, ran.stderr.count("\n")) == (2, 1)
    assert words in ran.stderr


def test_damaged_draws_are_refused_and_missing_ones_announced(forget, runs, one, tmp_path):
    forget("fit", runs, *one, "-o", tmp_path / "fit.json")
    ask = ("predict", tmp_path / "fit.json", "--n", "1e9", "--d", "1e6", "--p", "1%")
    (tmp_path / "fit.draws.npz").write_bytes(b"PK junk")
    assert "fit.draws.npz is damaged" in forget(*ask).stderr
    (tmp_path / "fit.draws.npz").unlink()
    assert "no interval: the fit has no draws" in forget(*ask).stdout


def test_draws_of_another_fit_are_not_taken_for_its_own(forget, runs, one, tmp_path):
    forget("fit", runs, *one, "-o", tmp_path / "fit.json")
    shutil.copy(tmp_path / "fit.json", tmp_path / "old.json")
    forget("fit", runs, *one, "--law", "bethune-forgetting", "--fix", "beta=0.3", "-o", tmp_path / "fit.json")
    ran = forget("predict", tmp_path / "old.json", "--n", "1e9", "--d", "1e6", "--p", "1%")
    assert ran.code == 2
    assert "is damaged, or of another fit" in ran.stderr


def test_a_group_that_is_taken_out_of_a_file_leaves_the_others_their_draws(forget, runs, tmp_path):
    path = tmp_path / "fit.json"
    forget("fit", runs, "--map", "loss=final_loss", "--by", "domain", "--bootstrap", "30", "-o", path)
    ask = ("predict", path, "--group", "math", "--n", "1e9", "--d", "1e6", "--p", "1%", "--json")
    before = forget(*ask).json
    content = json.loads(path.read_text())
    del content["groups"]["code"]
    path.write_text(json.dumps(content))
    assert forget(*ask).json == before
