import json

import numpy as np
import pytest

from mlx_forget.errors import UserError
from mlx_forget.laws.files import check_target, read_fit
from mlx_forget.laws.fit import fit_law
from mlx_forget.laws.forms import Parameter, get_law, law_from_function, register
from mlx_forget.laws.predictor import Predictor
from mlx_forget.laws.uncertainty import BootstrapOptions, assess
from mlx_forget.tables import read_table

from .conftest import TRUTH
from .surfaces import SIZES, paper_grid


def test_fit_prints_one_json_object_and_nothing_else_on_stdout(forget, runs, one, tmp_path):
    ran = forget("fit", runs, *one, "-o", tmp_path / "fit.json", "--json")
    assert ran.code == 0
    content = ran.json
    for key in [
        "schema_version",
        "law",
        "objective",
        "loss",
        "link",
        "delta",
        "num_rows",
        "status",
        "reason",
        "params",
        "groups",
        "columns",
        "data_range",
        "mre",
        "bootstrap",
        "extrapolation",
    ]:
        assert key in content, key
    assert content["status"] == "converged"
    assert set(content["params"]) == {"A", "alpha", "beta", "B"}
    assert content["params"]["B"]["low"] < 700
    assert "95% intervals" in ran.stderr
    assert json.loads((tmp_path / "fit.json").read_text())["params"] == content["params"]


def test_a_saved_fit_predicts_what_the_fit_in_memory_predicts(forget, runs, one, tmp_path):
    forget("fit", runs, *one, "-o", tmp_path / "fit.json")
    saved = read_fit(tmp_path / "fit.json").pick(None)
    table = read_table(runs, mapping={"loss": "final_loss"})
    fit = fit_law(table.select(table.labels["domain"] == "code"), "bethune-forgetting")
    live = Predictor.from_uncertainty(assess(fit, BootstrapOptions(num_resamples=60)))
    point = {"N": 1.27e9, "D": 3e7, "p": 0.01, "L0": 2.1}
    assert saved.predict(point) == pytest.approx(live.predict(point), rel=1e-12)
    assert np.array(saved.interval(point)) == pytest.approx(np.array(live.interval(point)), rel=1e-9)


def test_predict_gives_a_loss_with_l0_and_forgetting_without(forget, runs, one, tmp_path):
    forget("fit", runs, *one, "-o", tmp_path / "fit.json")
    question = ("predict", tmp_path / "fit.json", "--n", "1.27e9", "--d", "3e7", "--p", "1%", "--json")
    forgetting, loss = forget(*question).json, forget(*question, "--l0", "2.1").json
    assert forgetting["quantity"] == "forgetting_nats"
    assert loss["value"] == pytest.approx(forgetting["value"] + 2.1)
    exact = 3.0 * 3e7**0.4 / (7 * 1.27e9) ** 0.45
    assert forgetting["low"] < forgetting["value"] < forgetting["high"]
    assert forgetting["value"] == pytest.approx(exact, rel=0.1)


def test_groups_are_fitted_apart_and_asked_by_name(forget, runs, tmp_path):
    ran = forget(
        "fit",
        runs,
        "--by",
        "domain",
        "--map",
        "loss=final_loss",
        "--bootstrap",
        "40",
        "-o",
        tmp_path / "fit.json",
        "--json",
    )
    assert set(ran.json["groups"]) == {"code", "math"}
    question = ("predict", tmp_path / "fit.json", "--n", "1e9", "--d", "3e6", "--p", "0.01", "--json")
    assert forget(*question, "--group", "math").json["value"] < forget(*question, "--group", "code").json["value"]
    refused = forget(*question)
    assert refused.code == 2
    assert "code, math" in refused.stderr


def test_a_joint_fit_shares_a_parameter_and_its_file_predicts_per_group(forget, runs, tmp_path):
    ran = forget(
        "fit",
        runs,
        "--by",
        "domain",
        "--shared",
        "alpha",
        "--map",
        "loss=final_loss",
        "--bootstrap",
        "20",
        "-o",
        tmp_path / "fit.json",
        "--json",
    )
    assert set(ran.json["params"]) == {"alpha"}
    alphas = {entry["params"]["alpha"]["value"] for entry in ran.json["groups"].values()}
    assert len(alphas) == 1
    assert (
        forget(
            "predict",
            tmp_path / "fit.json",
            "--n",
            "1e9",
            "--d",
            "3e6",
            "--p",
            "0",
            "--group",
            "math",
            "--json",
        ).code
        == 0
    )


def test_train_on_reports_the_error_of_every_held_out_point(forget, runs, one):
    found = forget("fit", runs, *one, "--train-on", "N<=3.4e8 and D<=3e6", "--json").json["extrapolation"]
    assert found["num_test"] == len(found["points"]) == 80
    assert found["mre"] <= 0.01
    assert found["max"] == pytest.approx(max(abs(point["error"]) for point in found["points"]))


def test_selection_and_hold_outs_are_reported(forget, runs, one):
    content = forget("fit", runs, *one, "--select", "--leave-out", "--json").json
    assert content["selection"]["chosen"] == "p on N"
    assert any(entry["left_out"].startswith("largest N") for entry in content["hold_outs"])


def test_hold_outs_are_held_against_intervals_of_the_level_that_was_asked_for(forget, runs, one):
    narrow = forget("fit", runs, *one, "--leave-out", "--bootstrap", "20", "--level", "0.1")
    assert "inside 10% intervals" in narrow.stdout
    covered = [
        sum(
            entry["covered"]
            for entry in forget("fit", runs, *one, "--leave-out", "--bootstrap", "20", "--level", level, "--json").json["hold_outs"]
        )
        for level in ("0.1", "0.9")
    ]
    assert covered[0] < covered[1]


@pytest.fixture(scope="module")
def spoiled(runs, tmp_path_factory):
    """The runs of one domain with two losses 20% too high: rows 3 and 77."""
    lines = [line for line in runs.read_text().splitlines() if not line.endswith("math")]
    for row in (3, 77):
        cells = lines[row].split(",")
        cells[4] = str(1.2 * float(cells[4]))
        lines[row] = ",".join(cells)
    path = tmp_path_factory.mktemp("spoiled") / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_outliers_are_named_and_the_fit_without_them_is_shown(forget, spoiled):
    ran = forget("fit", spoiled, "--map", "loss=final_loss", "--bootstrap", "0", "--json")
    found = ran.json["outliers"][""]
    assert found["rows"] == [3, 77]
    assert found["params_with"]["B"] == ran.json["params"]["B"]["value"] != found["params_without"]["B"]
    assert "2 rows (row 3, row 77)" in ran.stderr
    assert "with / without them" in ran.stderr


def test_dropped_rows_leave_the_fit_and_are_shown_beside_it(forget, spoiled):
    ran = forget("fit", spoiled, "--map", "loss=final_loss", "--bootstrap", "0", "--drop", "N < 5e7 and p > 0.01", "--json")
    found = ran.json["outliers"][""]
    assert len(found["rows"]) == 5
    assert ran.json["num_rows"] == 120
    assert found["params_without"]["B"] == ran.json["params"]["B"]["value"] != found["params_with"]["B"]
    assert "left out by --drop" in ran.stderr


def test_a_group_with_too_few_rows_is_left_out_and_named(forget, runs):
    where = 'domain == "code" or (N < 5e7 and p > 0.01 and D < 2e6)'
    ran = forget("fit", runs, "--map", "loss=final_loss", "--by", "domain", "--where", where, "--bootstrap", "0", "--json")
    assert set(ran.json["groups"]) == {"code"}
    assert "left out: 2 rows of math, too few for 4 free parameters" in ran.stderr


def test_pooled_domains_and_a_single_size_are_pointed_out(forget, runs):
    pooled = forget("fit", runs, "--map", "loss=final_loss", "--bootstrap", "0")
    assert "2 domains (code, math) are fitted as one" in pooled.stderr
    single = forget("fit", runs, "--map", "loss=final_loss", "--by", "domain", "--where", "N < 5e7", "--bootstrap", "0")
    assert "--law forgetting-fixed-n" in single.stderr
    assert "fitted as one" not in single.stderr


def test_clean_runs_have_no_outliers(forget, runs, one):
    assert forget("fit", runs, *one, "--json").json["outliers"] == {}


def test_a_folder_of_runs_says_what_it_left_out(forget, tmp_path):
    law = get_law("bethune-forgetting")
    columns = paper_grid(sizes=SIZES[:2])
    loss = law.predict(TRUTH, columns)
    for i, (n, d, p, start, value) in enumerate(zip(*(columns[name] for name in ("N", "D", "p", "L0")), loss, strict=True)):
        content = {
            "schema_version": 1,
            "run_id": f"r{i}",
            "init": f"base{n:g}",
            "status": "diverged" if i % 10 == 9 else "finished",
            "num_params": int(n),
            "data": {
                "code": {"role": "target", "unique_tokens": d, "tokens_seen": 1e6 * (1 - p)},
                "prose": {"role": "pretrain", "unique_tokens": 1e9, "tokens_seen": 1e6 * p},
            },
            "losses": {"start": {"pretrain_val": start}, "best": {"step": 5, "target_val": 3.0, "pretrain_val": value}},
        }
        (tmp_path / f"r{i}").mkdir()
        (tmp_path / f"r{i}" / "record.json").write_text(json.dumps(content))
    (tmp_path / "r0" / "record.json").write_text("{}")
    ran = forget("fit", tmp_path, "--bootstrap", "20", "--json")
    assert ran.json["left_out"] == {"damaged or not of this tool": 1, "diverged": 5}
    assert "left out: 5 diverged" in ran.stderr
    assert ran.json["num_rows"] == 44
    assert ran.json["clusters"] == {"level": "row", "num": 44}
    assert "2 base models" in ran.stderr
    assert forget("fit", tmp_path, "--cluster", "base", "--bootstrap", "20", "--json").json["clusters"] == {
        "level": "base",
        "num": 2,
    }


def test_laws_lists_every_law_with_its_formula(forget):
    content = forget("laws", "--json").json
    assert {"chinchilla", "d-cpt", "overfitting-gap"} <= {law["name"] for law in content["laws"]}
    one = forget("laws", "bethune-forgetting").stdout
    assert "(1 + B p) N" in one
    assert "rivals" in one


def test_a_plan_is_told_what_it_would_not_determine_before_any_run(forget, tmp_path):
    plan = tmp_path / "planned.csv"
    sizes = [(n, d) for n in ("1e7", "3e7", "1e8") for d in ("1e6", "3e6", "1e7")]
    plan.write_text("N,D,p\n" + "".join(f"{n},{d},0\n" for n, d in sizes))
    lacking = ("laws", "bethune-forgetting", "--design", plan)
    assert "--map L0=" in forget(*lacking).stderr
    said = forget(*lacking, "--map", "L0=3.2", "--json").json
    assert [flag["parameters"] for flag in said["flags"]] == [["B"]]
    assert "one run with p = 1%" in forget(*lacking, "--map", "L0=3.2").stdout
    plan.write_text("N,D,p\n" + "".join(f"{n},{d},{p}\n" for n, d in sizes for p in (0, 0.01, 0.05)))
    assert "leave nothing undetermined" in forget(*lacking, "--map", "L0=3.2").stdout
    assert forget("laws", "--design", plan).code == 2
    assert "give that too" in forget("laws", "bethune-forgetting", "--map", "L0=3.2").stderr


def test_a_users_own_law_is_fitted_asked_and_advises(forget, tmp_path):
    register(
        law_from_function(
            "test-own-forgetting",
            lambda columns, q: (
                columns["L0"] + q["size"] * np.exp(q["power"] * np.log(columns["D"] / 1e6)) / (1 + q["gain"] * columns["p"])
            ),
            parameters=(
                Parameter("size", "forgetting at a million tokens", "nats", log=True, low=1e-9, high=1e9, linear=True),
                Parameter("power", "how it grows", low=0.0, high=5.0, grid=(0.2, 0.5)),
                Parameter("gain", "what replay does", log=True, low=1e-3, high=1e6, grid=(10.0, 100.0)),
            ),
            columns=("D", "p", "L0"),
            formula="loss = L0 + size (D / 1e6)^power / (1 + gain p)",
            response="pretraining",
        )
    )
    truth = {"size": 0.3, "power": 0.4, "gain": 80.0}
    columns = {name: values for name, values in paper_grid(sizes=SIZES[:1]).items() if name != "N"}
    exact = get_law("test-own-forgetting").predict(truth, columns)
    loss = exact * np.exp(0.001 * np.random.default_rng(0).standard_normal(len(exact)))
    path = tmp_path / "runs.jsonl"
    rows = [dict(zip((*columns, "loss"), map(float, row), strict=True)) for row in zip(*columns.values(), loss, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitted = forget("fit", path, "--law", "test-own-forgetting", "-o", tmp_path / "fit.json", "--json")
    assert fitted.json["params"]["gain"]["low"] < 80 < fitted.json["params"]["gain"]["high"]
    asked = forget("predict", tmp_path / "fit.json", "--d", "1e7", "--p", "2%", "--json").json
    wanted = 0.3 * 10**0.4 / (1 + 80 * 0.02)
    assert asked["low"] < wanted < asked["high"]
    advised = forget("advise", tmp_path / "fit.json", "--max-forgetting", "0.3", "--d", "1e7", "--json").json
    assert advised["answer"] == pytest.approx((10**0.4 - 1) / 80, rel=0.1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("fit", "{runs}"), "--map loss=final_loss"),
        (("fit", "{runs}", "--law", "chinchila"), "Did you mean 'chinchilla'"),
        (("fit", "{runs}", "--map", "loss"), "NAME=VALUE"),
        (("fit", "{runs}", "--map", "loss=final_loss", "--fix", "alpha=x"), "not a number"),
        (("fit", "{runs}", "--map", "loss=final_loss", "--intervals", "magic"), "Unknown interval method"),
        (("fit", "{runs}", "--map", "loss=final_loss", "--delta", "0"), "delta must be positive"),
        (("fit", "{runs}", "--map", "loss=final_loss", "--where", "N > 1e12"), "No row meets"),
        (("fit", "{runs}", "--map", "loss=final_loss", "--shared", "alpha"), "--by"),
        (("fit", "{runs}", "--map", "loss=final_loss", "--by", "colour"), "colour"),
        (("fit", "{runs}", "--map", "loss=final_loss", "--drop", "p > 2"), "names 0 of 250 rows"),
        (
            ("fit", "{runs}", "--map", "loss=final_loss", "--where", "domain == code"),
            "write text in quotes, as in 'domain == \"code\"'",
        ),
        (("fit", "{runs}", "--map", "loss=final_loss", "--cluster", "seed"), "Known: auto, base, repeat"),
        (("fit", "{runs}", "--map", "loss=final_loss", "--by", "domain", "--shared", "alpha", "--select"), "separate fits"),
        (("fit", "{runs}", "--map", "loss=final_loss", "-o", "{runs}/fit.json"), "is no folder"),
        (("advise", "{runs}", "--map", "loss=final_loss", "--max-forgetting", "0.02"), "--group (code, math)"),
        (("predict", "nowhere.json", "--n", "1e9"), "No fit at"),
        (("advise", "--max-forgetting", "0.02"), "--probe"),
        (("advise", "--probe", "x.jsonl"), "--d"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(forget, runs, arguments, words):
    ran = forget(*(argument.format(runs=runs) for argument in arguments))
    assert ran.code == 2
    assert words in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_untrustworthy_numbers_are_printed_with_the_reason(forget, runs):
    ran = forget(
        "fit",
        runs,
        "--map",
        "loss=final_loss",
        "--where",
        'domain == "code" and p == 0',
        "--bootstrap",
        "20",
        "--json",
    )
    assert ran.json["params"]["B"]["low"] is None
    assert "NOT TO BE TRUSTED: every p is 0" in ran.stderr
    assert "one run with p = 1%" in ran.stderr


def test_figures_of_a_fit_are_written(forget, runs, one, tmp_path):
    forget("fit", runs, *one, "--plot", tmp_path)
    for name in ("predicted-measured", "residuals", "curves", "profiles"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_fit_is_written_to_a_file_and_read_from_one(tmp_path):
    with pytest.raises(UserError, match=r"is a folder: name a file to write, such as .*fit\.json"):
        check_target(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        check_target(tmp_path / "file" / "new" / "fit.json")
    check_target(tmp_path / "new" / "below" / "fit.json")
    (tmp_path / "other.json").write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match=r"other\.json is not a fit: give a fit\.json"):
        read_fit(tmp_path / "other.json")


def test_hold_outs_without_resamples_are_lines_too(forget, runs, one):
    ran = forget("fit", runs, *one[:-2], "--bootstrap", "0", "--leave-out")
    assert ran.code == 0, ran.stderr
    assert len([line for line in ran.stdout.splitlines() if "without largest" in line and "mean error" in line]) == 2
    assert "inside" not in ran.stdout


def test_a_held_out_row_without_its_number_is_named(forget, runs, one, tmp_path):
    lines = runs.read_text().splitlines()
    last = next(i for i in reversed(range(len(lines))) if lines[i].endswith("code"))
    cells = lines[last].split(",")
    cells[2] = ""
    (tmp_path / "holes.csv").write_text("\n".join([*lines[:last], ",".join(cells), *lines[last + 1 :]]) + "\n")
    ran = forget("fit", tmp_path / "holes.csv", *one, "--train-on", "N < 5e8")
    assert ran.code == 2
    assert "is not a finite number" in ran.stderr


def test_rivals_are_not_judged_under_constraints_of_the_law(forget, runs, one):
    ran = forget("fit", runs, *one, "--select", "--fix", "alpha=0.4")
    assert (ran.code, "without --fix and --tie" in ran.stderr) == (2, True)
