"""The report: what it says is what the runs say, and the page is whole and safe."""

import json
import re

import numpy as np
import pytest

from mlx_forget.errors import UserError
from mlx_forget.laws.forms import get_law
from mlx_forget.pages.chart import Axis, Point, Series, chart, log_ticks, short_count
from mlx_forget.report.contents import make_report
from mlx_forget.report.page import headline, render, warnings
from tests.html_page import ATTACK, assert_escaped, assert_inside_frames, assert_self_contained

LAW = {"A": 3.0, "alpha": 0.45, "beta": 0.4, "B": 600.0}
FINETUNING = {"A": 30.0, "alpha": 0.12, "beta": 0.07, "E": 0.6}


@pytest.fixture
def study(make_run, tmp_path):
    """A grid of sizes, tokens and shares whose losses lie near known laws."""
    root = tmp_path / "study"
    number = 0
    noise = 1 + 0.002 * np.random.default_rng(3).standard_normal((36, 2))
    for n in (10_000_000, 30_000_000, 90_000_000, 270_000_000):
        for d in (3e5, 1e6, 3e6):
            for p in ("0", "1%", "5%"):
                share = float(p.rstrip("%")) / (100 if "%" in p else 1)
                columns = {"N": n, "D": d, "p": share, "L0": 3.0}
                forgotten = float(get_law("bethune-forgetting").predict(LAW, columns)[0]) * noise[number, 0]
                learnt = float(get_law("bethune-finetuning").predict(FINETUNING, columns)[0]) * noise[number, 1]
                make_run(root, f"run{number:09d}", n=n, d=d, p=p, forgotten=forgotten, learnt=learnt)
                number += 1
    return root


@pytest.fixture
def figure(make_run, tmp_path):
    """Runs that differ in p and seed alone, as Figure 1's do."""
    root = tmp_path / "figure"
    for seed in (0, 1):
        for number, (p, forgotten) in enumerate((("0", 3.8), ("1%", 3.6), ("5%", 3.3))):
            make_run(root, f"fig{seed}{number}", p=p, forgotten=forgotten + 0.02 * seed, learnt=2.9 + 0.01 * number, seed=seed)
    return root


def test_the_laws_of_a_grid_are_fitted_with_intervals_and_hold_outs(study):
    report = make_report(study, budgets=[0.05])
    forgetting, target = report.fits
    assert (forgetting.response, target.response) == ("pretraining", "target")
    assert forgetting.uncertainty.fit.law.name == "bethune-forgetting"
    for name in ("alpha", "beta"):
        interval = forgetting.uncertainty.params[name]
        assert interval.low < interval.value < interval.high
        assert interval.value == pytest.approx(LAW[name], abs=0.03)
    assert target.uncertainty.params["E"].value == pytest.approx(0.6, abs=0.3)
    assert {held.name for held in forgetting.hold_outs} == {
        "largest N (2.7e+08)",
        "largest D (3e+06)",
        "p = 0%",
        "p = 1%",
        "p = 5%",
    }
    assert all(held.mre < 0.05 for held in forgetting.hold_outs)
    by_cell = {(one.size, one.tokens): one for one in report.recommendations}
    # The law's smallest p keeps the law itself under the budget.
    one = by_cell[(10_000_000, 3e5)]
    columns = {"N": one.size, "D": one.tokens, "p": one.advice.columns["p"], "L0": 0.0}
    assert one.advice.answer is None or float(get_law("bethune-forgetting").predict(LAW, columns)[0]) == pytest.approx(
        0.05, rel=0.2
    )
    big = by_cell[(270_000_000, 3e6)]
    assert big.measured.share in (0.0, 0.01, 0.05)
    assert big.measured.forgetting <= 0.05


def test_the_recipe_is_read_off_the_runs(study, figure):
    recipe = make_report(study).recipe
    assert recipe.axes == {"p": ["0", "1%", "5%"], "target_tokens": [300_000, 1_000_000, 3_000_000]}
    assert not recipe.is_grid, "sizes are not in these configurations, so every combination is there four times"
    recipe = make_report(figure).recipe
    assert recipe.is_grid
    assert recipe.axes == {"p": ["0", "1%", "5%"], "seed": [0, 1]}
    assert recipe.config["base.iters"] == 2500
    assert "grid:\n  p: ['0', 1%, 5%]" in recipe.as_yaml("f")


def test_what_a_report_of_one_model_says_is_what_its_runs_say(figure):
    report = make_report(figure, budgets=[0.65, 0.1])
    (panel,) = report.panels
    assert panel.names == ["p = 0%", "p = 1%", "p = 5%"]
    assert [reading.curve.record["run_id"] for reading in panel.readings] == ["fig00", "fig01", "fig02"]
    assert [reading.forgetting.mean for reading in panel.readings] == pytest.approx([0.8, 0.6, 0.3])
    assert "rises by 0.800 nats" in headline(panel)
    assert "63% less" in headline(panel)
    fit = report.fits[0]
    assert fit.uncertainty.fit.law.name == "forgetting-fixed-n"
    assert fit.uncertainty.fit.params["beta"] == 0
    assert "one model size" in fit.choice.why
    assert "one size and one number of target tokens" in report.fits[1].reason
    loose, tight = report.recommendations
    assert loose.measured.share == pytest.approx(0.01)
    assert loose.measured.forgetting == pytest.approx(0.61)
    assert loose.measured.run_ids == ["fig01", "fig11"]
    assert 0 < loose.advice.answer < 0.05
    assert tight.measured is None
    content = json.loads(json.dumps(report.as_json()))
    assert content["curves"][0]["runs"][2]["forgetting_nats"] == pytest.approx(0.3)
    assert content["recommendations"][1]["measured"] is None


def test_the_page_names_every_run_and_its_numbers(figure):
    page = render(make_report(figure, budgets=[0.65]))
    for seed in (0, 1):
        for number in range(3):
            assert f"fig{seed}{number}" in page
    text = re.sub(r"<[^>]+>", " ", page)
    for words in ("+0.8000", "0.6100", "forgetting-fixed-n", "target_tokens", "torch 2.13.0", "4e85" * 16, "name: figure"):
        assert words in text, words
    assert assert_inside_frames(page) == 3 + 1 + 1
    read = assert_self_contained(page)
    ids = {attributes["id"] for _, attributes in read.elements if "id" in attributes}
    assert {attributes["href"][1:] for _, attributes in read.elements if "href" in attributes} <= ids
    assert all(attributes["aria-label"] for tag, attributes in read.elements if tag == "svg")


def test_a_grid_of_sizes_is_drawn_against_each(study):
    page = render(make_report(study))
    assert assert_inside_frames(page) == 3 * 6 + 3 + 2
    assert "6 of 12 combinations" in page
    assert "dashed: the fitted law" in page


def test_every_text_that_comes_from_data_is_escaped(make_run, tmp_path):
    root = tmp_path / "<img src=x onerror=y>"
    for number, p in enumerate(("0", "5%")):
        folder = make_run(
            root, f"r{number}", p=p, forgotten=3.5 - 0.1 * number, device=ATTACK, versions={ATTACK: ATTACK}, init=ATTACK
        )
        path = folder / "record.json"
        record = json.loads(path.read_text())
        record["data"][ATTACK] = record["data"].pop("code")
        record["run_id"] = ATTACK + str(number)
        record["config"]["target"] = ATTACK + str(number)
        path.write_text(json.dumps(record))
    (root / ATTACK.replace("/", "")).mkdir()
    (root / ATTACK.replace("/", "") / "record.json").write_text("{")
    assert assert_escaped(render(make_report(root))) >= 10


def test_methods_are_compared_where_there_is_a_plain_run(make_run, tmp_path):
    make_run(tmp_path / "m", "aaa", method="plain", forgotten=3.8)
    make_run(tmp_path / "m", "bbb", method="kl-replay", forgotten=3.1)
    report = make_report(tmp_path / "m")
    assert [row.label for row in report.methods.rows] == ["plain finetuning", "KL replay, self-generated, c = 1"]
    assert report.methods.rows[1].removed == pytest.approx(1 - 0.1 / 0.8)
    assert "there is nothing to fit" in report.fits[0].reason
    page = render(report)
    assert "87.5%" in page
    assert_inside_frames(page)
    make_run(tmp_path / "n", "ccc", method="l2-sp")
    make_run(tmp_path / "n", "ddd", method="kl-replay")
    report = make_report(tmp_path / "n")
    assert "no run of method plain" in report.methods.reason
    assert "the runs are of kl-replay, l2-sp" in report.fits[0].reason
    assert "Not compared: Seed 0 has no run" in render(report)


def test_runs_that_no_law_describes_together_are_not_fitted(figure):
    for path in list(figure.glob("*/record.json"))[:2]:
        record = json.loads(path.read_text())
        record["config"]["batch_size"] = 64
        path.write_text(json.dumps(record))
    reason = make_report(figure).fits[0].reason
    assert "also differ in batch_size" in reason
    assert "--where 'batch_size == 16'" in reason
    assert make_report(figure, where="batch_size == 16").fits[0].uncertainty is not None


def test_keys_that_hold_lists_and_mappings_are_cells_like_others(figure):
    for number, path in enumerate(sorted(figure.glob("*/record.json"))):
        record = json.loads(path.read_text())
        record["config"] |= {"lora_target_modules": ["q", "v"], "base": {"iters": 2500, "replay_limits": {"a": number}}}
        path.write_text(json.dumps(record))
    report = make_report(figure)
    assert report.fits[0].uncertainty is not None
    assert '["q", "v"]' in render(report).replace("&#34;", '"')


def test_what_is_amiss_is_said_first(figure, make_run):
    make_run(figure, "div", status="diverged")
    make_run(figure.parent / "elsewhere", "fig00", p="0", forgotten=3.8)
    (figure.parent / "elsewhere" / "fig00-cuda").rename(figure / "copy")
    (figure / "half").mkdir()
    (figure / "half" / "history.arrows").write_text("")
    (figure / "newer").mkdir()
    (figure / "newer" / "record.json").write_text('{"schema_version": 99}')
    path = figure / "fig12-cuda" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "another"}))
    text = " ".join(warnings(make_report(figure)))
    for words in (
        "newer: of record schema 99",
        "1 run was begun and left no record: half",
        "1 run diverged",
        "of 2 devices: cpu (1 threads), another",
        "1 folder is copies of others",
    ):
        assert words in text, words


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_table_makes_the_report_of_its_folder_without_curves(run_forget, figure, tmp_path, name):
    assert run_forget("runs", "export", figure, "-o", tmp_path / name)[0] == 0
    report, whole = make_report(tmp_path / name), make_report(figure)
    assert report.panels == []
    assert report.recipe.axes["p"] == whole.recipe.axes["p"]
    assert report.fits[0].uncertainty.fit.params == whole.fits[0].uncertainty.fit.params
    page = render(report)
    assert "holds no histories" in page
    assert_self_contained(page)


def test_the_command_writes_the_page_and_one_json_object(run_forget, figure, tmp_path):
    code, out, err = run_forget("report", figure, "-o", tmp_path / "new" / "r.html", "--max-forgetting", "0.5", "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    assert json.loads(out)["recommendations"][0]["budget_nats"] == 0.5
    assert_self_contained((tmp_path / "new" / "r.html").read_text())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nothing",), "There is nothing at nothing"),
        (("empty",), "holds no run that has ended"),
        (("figure", "--where", "p > 2"), "no run of 6 that was asked for"),
        (("figure", "--where", "q > 2"), "no column of runs"),
        (("figure", "--max-forgetting", "-1"), "positive number of nats"),
        (("figure", "--confidence", "2"), "--confidence must lie between 0 and 1"),
        (("plain.csv",), "was not written by forget runs export"),
        (("fit.json",), "was not written by forget runs export"),
        (("figure", "-o", "plain.csv/r.html"), "Cannot write"),
        (("base",), "none is a finetune"),
    ],
)
def test_a_wrong_request_is_one_sentence(run_forget, figure, make_run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain.csv").write_text("N,D,loss\n1,2,3\n")
    (tmp_path / "fit.json").write_text('{"law": "cmr"}')
    make_run(tmp_path / "base", "b", init="scratch", forgetting_nats=None)
    code, out, err = run_forget("report", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


def test_a_run_without_a_history_is_named_and_the_rest_is_drawn(figure):
    (figure / "fig01-cuda" / "history.arrows").unlink()
    (figure / "fig02-cuda" / "history.arrows").write_bytes(b"torn")
    (panel,) = make_report(figure).panels
    assert panel.names == ["p = 0%"]
    assert panel.left_out == ["fig01", "fig02"]


@pytest.mark.parametrize("low, high", [(1, 1), (3e5, 3e7), (0.011, 4.8), (7, 8), (1e-9, 1e9), (2, 20)])
def test_log_ticks_are_round_and_enclose(low, high):
    ticks = log_ticks(low, high)
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 9
    assert ticks[0] <= low * (1 + 1e-9)
    assert all(f"{tick:.0e}"[0] in "125" for tick in ticks)


def test_points_stand_where_their_numbers_are():
    plot = chart(
        [Series("a", [Point(1, 10), Point(10, 20), Point(100, 40, ATTACK, True)])], x=Axis("x", log=True), y=Axis("y"), title="t"
    )
    circles = [(float(x), float(y)) for x, y in re.findall(r'<circle class="first" cx="([\d.]+)" cy="([\d.]+)"', plot)]
    assert circles[1][0] - circles[0][0] == pytest.approx(circles[2][0] - circles[1][0], abs=0.2)
    assert circles[1][1] - circles[2][1] == pytest.approx(2 * (circles[0][1] - circles[1][1]), abs=0.2)
    assert assert_escaped(f"<p>{plot}</p>") == 1
    assert plot.count('class="ring"') == 1


@pytest.mark.parametrize("value, text", [(656448, "656K"), (1.27e9, "1.27B"), (999_999, "1M"), (12, "12"), (1e12, "1T")])
def test_counts_are_short(value, text):
    assert short_count(value) == text


def test_a_report_needs_a_finetune(tmp_path):
    with pytest.raises(UserError, match="There is nothing"):
        make_report(tmp_path / "none")


def test_runs_with_adapters_are_called_in_words():
    from mlx_forget.report.curves import name_of

    lora = {"fine_tune_type": "lora", "lora_alpha": 1.0, "lora_scaling": "alpha/sqrt(r)", "lora_target_modules": "all-linear"}
    row = {
        "method": "plain",
        "coefficient": None,
        "replay_data": None,
        "p_asked": "0",
        "learning_rate": 0.01,
        "lora_rank": 4,
        **lora,
    }
    assert name_of(row, ("lora_rank", "learning_rate")) == "LoRA r = 4, all-linear, α/√r, α = 1, rate 0.01"
    assert name_of(row | {"fine_tune_type": "full"}, ("fine_tune_type",)) == "plain finetuning"
    assert name_of(row | {"fine_tune_type": "full", "p_asked": "1%"}, ("p",)) == "p = 1%"
