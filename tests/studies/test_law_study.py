"""The law study: known laws are found again, what cannot be read is left out and said, and its tables say what the fits say."""

import copy
import json
import shlex
import subprocess

import numpy as np
import pytest

from mlx_forget.backends import available_backends
from mlx_forget.errors import UserError
from mlx_forget.laws.fit import FitOptions, fit_law
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.model import Constraints
from mlx_forget.laws.table import Table
from mlx_forget.resources import path as resource_path
from mlx_forget.resources import recipe as find_recipe
from mlx_forget.runs.export import read_export
from mlx_forget.studies.evaluations import CSV_COLUMNS, read_evaluations
from mlx_forget.studies.law_study import analyse, find_fit, held_out, make_cells, rivals_of, smoothed_reading
from mlx_forget.studies.law_study_plot import draw_law_study
from mlx_forget.studies.law_study_text import domain_lines, most_common_tokens, study_lines
from mlx_forget.sweeps.grid import read_recipe

SIZES = {161_088: (56_640, 4.68), 291_000: (151_000, 4.2), 655_000: (446_000, 3.8), 1_270_000: (992_000, 3.5)}
TRUTH = {"code": {"alpha": 0.4, "beta": 0.3, "B": 80.0}, "math": {"alpha": 0.25, "beta": 0.45, "B": 900.0}}
# A is what makes 0.65M parameters forget 1 nat of 300,000 tokens.
for _one in TRUTH.values():
    _one["A"] = 655_000 ** _one["alpha"] / 300_000 ** _one["beta"]
SHARES = {"0": 0.0, "0.5%": 0.005, "1%": 0.01, "5%": 0.05, "20%": 0.2}


def flat_row(domain, size, tokens, asked, loss, *, target=2.5, **more):
    other, before = SIZES[size]
    run = f"{domain}-{size}-{tokens}-{asked}-{more.get('seed', 0)}"
    return {
        "N": size, "D": float(tokens), "p": SHARES[asked], "r": SHARES[asked], "R": 1 - SHARES[asked], "P": size, "steps": 800,
        "L0": before, "L_ft": target, "loss": loss, "run": run, "base": f"base-{size}", "method": "injection", "domain": domain,
        "backend": "cuda", "seed": 0, "status": "stopped", "p_asked": asked, "p_rows": SHARES[asked], "batch_size": 16,
        "stop_patience": 4, "num_steps": 1000, "num_non_embedding_params": other, "wall_seconds": 60.0, "target_val_start": 4.9,
        "loss_fraction_lost": 0.3, "token_equivalent_lost": 0.7, "fine_tune_type": "full", "pretrain": "prose",
        "tokens_seen": 1000 * 16 * 128, "base_tokens_per_param": 10,
    } | more  # fmt: skip


def synthetic(noise=0.0, sizes=SIZES, domains=TRUTH):
    rng = np.random.default_rng(0)
    law, finetuning = get_law("bethune-forgetting"), get_law("bethune-finetuning")
    rows = []
    for domain in domains:
        for size in sizes:
            for tokens in (100_000, 300_000, 1_000_000):
                for asked, share in SHARES.items():
                    question = {"N": size, "D": tokens, "p": share, "L0": SIZES[size][1]}
                    loss = float(law.predict(TRUTH[domain], question)[0]) * (1 + noise * rng.normal())
                    shape = {"A": 40.0, "alpha": 0.1, "beta": 0.2, "E": 1.5}
                    target = float(finetuning.predict(shape, {"N": size, "D": tokens})[0]) * (1 + noise * rng.normal())
                    rows.append(flat_row(domain, size, tokens, asked, loss, target=target))
    return rows


@pytest.fixture(scope="module")
def noisy():
    return analyse(make_cells(synthetic(noise=0.004))[0], num_resamples=200)


def test_shares_as_fractions_are_in_the_study_and_changing_ones_are_not():
    rows = synthetic(domains=("code",))
    rows[1]["p_asked"] = "1/200"
    lines = "\n".join(study_lines(analyse(make_cells(rows)[0], num_resamples=0).content))
    assert "0.005" in lines
    rows[2]["p_asked"] = "0..5%"
    cells = make_cells(rows)[0]
    assert len(cells) == len(rows) - 1
    assert "0..5%" not in {cell.row["p_asked"] for cell in cells}


def test_exact_runs_give_back_their_law():
    content = analyse(make_cells(synthetic())[0], num_resamples=0).content
    for domain, truth in TRUTH.items():
        fit = find_fit(content, domain, "pretraining", "total")
        assert {name: one["value"] for name, one in fit["params"].items()} == pytest.approx(truth, rel=1e-3)
        assert fit["explained"] == pytest.approx(1)
        target = find_fit(content, domain, "target", "total")
        assert target["params"]["E"]["value"] == pytest.approx(1.5, rel=1e-2)
        assert max(map(abs, target["error_by_p"].values())) < 1e-4
    assert max(abs(c["predicted_forgetting"] - c["forgetting"]) for c in content["cells"]) < 1e-4


# Reached only in a limit: of exponents that vanish, of a B that adds nothing to N.
LIMITS = {("log limit", "with E"), ("no p", "p added to N")}


@pytest.mark.parametrize("name", ["bethune-forgetting", "bethune-finetuning"])
def test_every_rival_that_is_called_a_special_case_of_another_is_one(name):
    axes = np.meshgrid([1.6e5, 6.5e5, 2.6e6], [3e4, 1e5, 3e5], [0, 0.005, 0.05, 0.2])
    columns = dict(zip("NDp", (axis.ravel() for axis in axes), strict=True))
    columns["L0"] = 4.7 - 0.3 * np.log10(columns["N"] / 1e5)
    rivals = {one.name: one for one in rivals_of(get_law(name))}
    pairs = {(small, large) for small, one in rivals.items() for large in one.inside} - LIMITS
    assert {large for _, large in pairs} | {small for small, _ in pairs} >= set(rivals) - {"log limit", "p added to N"}
    for small, large in pairs:
        law = get_law(rivals[small].law)
        params = {"A": 1.0, "alpha": 0.4, "beta": 0.3, "B": 60.0, "S": 0.2, "E": 0.3, "gamma": 0.25}
        params |= {follower: params[leader] for follower, leader in rivals[small].tied.items()} | dict(rivals[small].fixed)
        params = {key: params[key] for key in law.names}
        sizes, sign = (6.5e5 ** params["alpha"] if "N" in law.columns else 1), 1 if "L0" in law.columns else -1
        params["A"] = sizes / 1e5 ** (sign * params["beta"])
        loss = law.predict(params, {column: columns[column] for column in law.columns})
        larger = rivals[large]
        fit = fit_law(
            Table({**columns, "loss": np.asarray(loss)}),
            larger.law,
            constraints=Constraints(dict(larger.fixed), dict(larger.tied)),
            options=FitOptions(allow_units=True, allow_duplicates=True),
        )
        assert fit.mre < 1e-5, f"{small} is not inside {large}"


def test_noisy_runs_hold_the_truth_choose_the_law_and_are_held_out(noisy):
    for domain, truth in TRUTH.items():
        fit = find_fit(noisy.content, domain, "pretraining", "total")
        for name in ("alpha", "beta", "B"):
            # Of six 95% intervals one may miss; twice their width does not.
            one = fit["params"][name]
            assert abs(truth[name] - one["value"]) < one["high"] - one["low"], name
        assert 0.001 < fit["mre"] <= fit["bootstrapped_mre"] < 0.01
        assert fit["selection"]["chosen"] == "p on N"
        rivals = {one["name"]: one["aicc_above_best"] for one in fit["selection"]["rivals"]}
        assert min(rivals["no p"], rivals["no D"], rivals["no N"]) > 20
        largest, most = held_out(fit, "N"), held_out(fit, "D")
        assert (largest["num_test"], most["num_test"]) == (15, 20)
        assert max(largest["mre"], most["mre"]) < 0.02
        # Shares are as served: runs that asked for one p differ in it, and are held out together.
        each = ["p = 0%", "p = 0.5%", "p = 1%", "p = 5%", "p = 20%"]
        assert [one["left_out"] for one in fit["hold_outs"]] == [largest["left_out"], most["left_out"], *each]
    assert set(noisy.fits) == set(TRUTH)


def test_an_exponent_of_its_own_for_p_is_told_from_eq_7():
    rows = synthetic(noise=0.002, domains=["code"])
    law, rng = get_law("bethune-forgetting/own-exponent"), np.random.default_rng(1)
    truth = {**TRUTH["code"], "alpha": 0.1, "gamma": 0.7, "A": 655_000**0.1 / 300_000**0.3}
    for row in rows:
        row["loss"] = float(law.predict(truth, {name: row[name] for name in law.columns})[0]) * (1 + 0.002 * rng.normal())
    fit = find_fit(analyse(make_cells(rows)[0], num_resamples=50).content, "code", "pretraining", "total")
    assert fit["selection"]["chosen"] == "own exponent of p"
    assert next(one["aicc_above_best"] for one in fit["selection"]["rivals"] if one["name"] == "p on N") > 10


def test_runs_without_a_minimum_or_with_few_injected_rows_are_left_out_and_said():
    rows = synthetic(domains=["code"])
    # 50 steps of 16 rows at 0.5% are 4 rows; two runs ended at the limit of steps, with a loss that would spoil the fit.
    few = next(row for row in rows if row["p_asked"] == "0.5%")
    few |= {"steps": 50, "loss": 9.0}
    without_end = [row for row in rows if row["p_asked"] == "5%"][:2]
    for row in without_end:
        row |= {"status": "finished", "loss": 9.0}
    cells = make_cells(rows)[0]
    assert {cell.row["run"]: cell.left_out for cell in cells if cell.left_out}[few["run"]] == "4 injected rows at the minimum"
    content = analyse(cells, num_resamples=0).content
    assert (content["num_runs"], content["num_kept"]) == (60, 57)
    assert find_fit(content, "code", "pretraining", "total")["params"]["B"]["value"] == pytest.approx(80, rel=1e-2)
    assert find_fit(content, "code", "pretraining", "all runs")["num_runs"] == 60
    text = "\n".join(study_lines(content))
    assert "Left out of the fits, fewer than 8 injected rows at the minimum (1 runs): 0.16M code D = 100K p = 0.5%." in text
    assert "no minimum within 1,000 steps (2 runs)" in text
    # A limit of time or forgetting ends a run before its minimum as well.
    for row, rule in zip(without_end, ("time", "max_forgetting"), strict=True):
        row |= {"status": "stopped", "stopped_by": rule}
    others = {row["run"]: row | {"stopped_by": "patience"} for row in rows if row["status"] == "stopped" and row not in without_end}
    cells = make_cells([others.get(row["run"], row) for row in rows])[0]
    assert len([cell for cell in cells if cell.left_out]) == 3
    assert "no minimum within 1,000 steps, where max forgetting stopped it" in [cell.left_out for cell in cells]


def test_the_minimum_of_smoothed_losses_is_a_reading_of_its_own():
    rows = synthetic(domains=["code"])
    readings = {row["run"]: {"steps": 700.0, "L_ft": row["L_ft"], "loss": row["loss"] + 0.1} for row in rows}
    content = analyse(make_cells(rows, readings)[0], num_resamples=0).content
    plain, smoothed = (find_fit(content, "code", "pretraining", name) for name in ("total", "smoothed"))
    assert smoothed["num_runs"] == 60
    assert smoothed["params"]["alpha"]["value"] < plain["params"]["alpha"]["value"]


def test_tables_say_what_the_fits_say(noisy):
    content = json.loads(json.dumps(noisy.content, allow_nan=True))
    text = "\n".join(study_lines(content))
    fit = find_fit(content, "math", "pretraining", "total")
    beta = fit["params"]["beta"]
    assert f"{beta['value']:.3g} [{beta['low']:.3g}, {beta['high']:.3g}]" in text
    assert f"{held_out(fit, 'N')['mre']:.2%}" in text
    assert all(words in text for words in ("0.83%", "2.01%", "120 runs", "code, math", "100K, 300K, 1M", "(chosen)", "30%, 70%"))
    widths = {
        line.count("|") for line in text.splitlines() if line.startswith("| code |") or line.startswith("| domain | N | runs")
    }
    assert widths
    # 800 steps of 16 rows of 128 tokens, a fifth of them prose, beside the 1.6M tokens of the smallest base.
    assert "20% at p = 20%" in text
    assert find_fit(content, "code", "pretraining", "p to 5%")["num_runs"] == 48
    assert f"{find_fit(content, 'code', 'target', 'total')['error_by_p']['5%']:+.2%}" in text
    failing = copy.deepcopy(content)
    find_fit(failing, "math", "pretraining", "total").update(status="stalled")
    assert "the fit ended as 'stalled'" in "\n".join(study_lines(failing))
    assert most_common_tokens(content["cells"]) == 300_000


def test_every_row_of_a_table_has_as_many_cells_as_its_head(noisy):
    tables = "\n".join(study_lines(noisy.content)).split("\n\n")
    for part in (part for part in tables if part.startswith("|")):
        assert len({line.replace("\\|", "").count("|") for line in part.splitlines()}) == 1, part


def test_one_size_is_fitted_by_the_law_of_one_size_and_the_rest_is_said_to_be_missing():
    rows = synthetic(sizes=[161_088], domains=["code"])
    content = analyse(make_cells(rows)[0], num_resamples=50).content
    assert find_fit(content, "code", "pretraining", "total")["law"] == "forgetting-fixed-n"
    assert "not held out" in "\n".join(study_lines(content))


def test_the_distance_of_a_domain_is_what_finetuning_takes_off_its_loss():
    rows = [
        flat_row("code", size, tokens, "0", 5.0, target=4.9 - tokens / 1e6) for size in SIZES for tokens in (100_000, 1_000_000)
    ]
    assert analyse(make_cells(rows)[0], num_resamples=0).content["domains"]["code"]["distance_nats"] == pytest.approx(1.0)


def test_distances_are_read_at_an_amount_of_data_that_every_size_has():
    rows = [flat_row("code", size, 100_000, "0", 5.0, target=4.8) for size in SIZES]
    rows.append(flat_row("code", min(SIZES), 1_000_000, "0", 5.0, target=1.0))
    by_size = analyse(make_cells(rows)[0], num_resamples=0).content["domains"]["code"]["by_size"]
    assert len(set(by_size)) == 1


def test_seeds_are_for_part_of_a_study_only_where_some_cell_lacks_one():
    rows = [row | {"seed": seed, "run": f"{row['run']}-{seed}"} for row in synthetic(domains=["code"]) for seed in (0, 1)]
    whole, part = ("\n".join(study_lines(analyse(make_cells(own)[0], num_resamples=0).content)) for own in (rows, rows[1:]))
    assert "seeds 0, 1." in whole
    assert "seeds 0, 1 for part of it." in part


def test_one_domain_gives_no_order_of_domains():
    assert "B by domain" not in "\n".join(study_lines(analyse(make_cells(synthetic(domains=["code"]))[0], num_resamples=0).content))


def test_two_runs_fit_nothing_and_say_why():
    rows = synthetic(sizes=[161_088], domains=["code"])[:2]
    text = "\n".join(study_lines(analyse(make_cells(rows)[0], num_resamples=50).content))
    assert "no law could be fitted" in text
    assert "add at least" in text
    with pytest.raises(UserError, match="no finished finetuning"):
        make_cells([{**rows[0], "base": "scratch"}])


def test_the_table_by_domain_has_a_row_a_domain_and_the_papers(noisy):
    lines = domain_lines(noisy.content)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert [row[0] for row in cells[2:]] == [*noisy.content["axes"]["domain"], "the paper"]
    held = cells[0].index("forgetting: N held out")
    fit = find_fit(noisy.content, cells[2][0], "pretraining", "total")
    assert cells[2][held] == f"{held_out(fit, 'N')['mre']:.2%}"
    assert cells[-1][held] == "0.83%, both"


def test_runs_that_are_no_points_of_the_laws_are_named_with_the_reason():
    rows = synthetic(domains=["code"])
    rows[3] |= {"p_asked": "0..5%"}
    rows[4] |= {"fine_tune_type": "lora"}
    rows[5]["p_asked"] = None
    cells, others = make_cells(rows)
    assert len(cells) == len(rows) - 3
    assert {reason.split(",")[0]: runs for reason, runs in others.items()} == {
        "whose p changes along the run": [rows[3]["run"]],
        "trained with lora": [rows[4]["run"]],
        "whose p is not said": [rows[5]["run"]],
    }


def test_the_recipe_spans_a_factor_of_16_and_its_runs_differ(monkeypatch):
    monkeypatch.delenv("FORGET_SCALE")
    configs = read_recipe(find_recipe("ladder-builtin")).configs({})
    cells = {(c.model, c.target, c.target_tokens, str(c.p), c.seed) for c in configs}
    assert len(cells) == len(configs) >= 150
    assert {c.model for c in configs} == {"0.16m", "0.3m", "0.65m", "1.3m", "2.6m"}
    assert {c.target for c in configs} == {"code", "math", "cpp"}
    assert all(c.stop_patience for c in configs)


@pytest.mark.full
def test_make_reproduce_ladder_runs_plots_and_goes_on(run_forget, tmp_path, monkeypatch):
    root = resource_path().parent
    monkeypatch.chdir(root)
    backend = available_backends()[0]
    asked = ["make", "--dry-run", "--assume-old=setup", "reproduce-ladder", f"OUTPUT={tmp_path / 'runs'}", f"BACKEND={backend}"]
    printed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith(".venv/bin/forget ")]
    assert [command[0] for command in commands] == ["sweep", "plot"]
    commands[1] = [str(tmp_path / "figures") if word == "figures" else word for word in commands[1]]
    for command in (*commands, commands[0]):
        code, out, err = run_forget(*command)
        assert code == 0, err
        if command[0] == "plot":
            assert "no law could be fitted" in out
            assert "fewer than 8 injected rows at the minimum (1 runs)" in out
    made = {path.name for path in (tmp_path / "figures").iterdir()}
    assert made == {f"ladder-builtin.{kind}" for kind in ("png", "pdf", "csv", "json")}
    table = (tmp_path / "figures/ladder-builtin.csv").read_text().splitlines()
    assert table[0] == ",".join(CSV_COLUMNS)
    assert len(table) == 1 + 2 * 4
    code, _, err = run_forget("runs", "export", tmp_path / "runs", "-o", tmp_path / "runs.parquet")
    assert code == 0, err
    beside = tmp_path / "runs.csv"
    for text in (None, "N,D\n1,2\n", (tmp_path / "figures/ladder-builtin.csv").read_text()):
        if text is not None:
            beside.write_text(text)
        code, out, err = run_forget("plot", tmp_path / "runs.parquet", "--kind", "laws", "--output", tmp_path / "again", "--json")
        assert code == 0, err
        assert json.loads(out)["num_runs"] == 2
    beside.write_text(text + "a,code,0.16m,1,1,0,0,x,1,1,1,1,1\n")
    code, _, err = run_forget("plot", tmp_path / "runs.parquet", "--kind", "laws", "--output", tmp_path / "again")
    assert code == 2
    assert "line 10, is not as forget plot wrote it" in " ".join(err.split())


def test_the_published_study_is_of_the_published_runs_and_fits_them_again():
    folder = resource_path("runs")
    content = json.loads((folder / "ladder-builtin.json").read_text())
    evaluations = read_evaluations(folder / "ladder-builtin.csv")
    smoothed = {run: smoothed_reading(own) for run, own in evaluations.items()}
    cells = make_cells(read_export(folder / "ladder-builtin.parquet"), smoothed)[0]
    assert {cell.row["run"] for cell in cells} == {cell["run"] for cell in content["cells"]} == set(evaluations)
    again = analyse(cells, num_resamples=0).content
    for domain in content["axes"]["domain"]:
        for response in ("pretraining", "target"):
            published, fitted = (find_fit(one, domain, response, "total") for one in (content, again))
            assert published["num_runs"] == fitted["num_runs"]
            assert published["mre"] == pytest.approx(fitted["mre"], rel=1e-3)
            published_smoothed, smoothed_again = (find_fit(one, domain, response, "smoothed") for one in (content, again))
            assert published_smoothed["num_runs"] == smoothed_again["num_runs"]
            assert published_smoothed["mre"] == pytest.approx(smoothed_again["mre"], rel=1e-3)
            names = [one["left_out"] for one in published["hold_outs"]]
            assert ("largest D (3e+05)" in names) == (len({cell["D"] for cell in content["cells"] if cell["domain"] == domain}) > 2)


def test_the_figure_shows_all_panels(noisy, tmp_path):
    figure = draw_law_study(noisy.content, title="synthetic")
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes]
    assert len(titles) == 2 + 3
    assert any("B by domain" in title for title in titles)
    # B of every domain, with its interval.
    (replay,) = [axis for part in figure.subfigs for axis in part.axes if "B by domain" in axis.get_title()]
    assert len(replay.lines) == 2 * len(TRUTH)


def test_the_command_draws_an_exported_table_under_its_name_and_says_what_else_is_no_folder(run_forget, tmp_path):
    table = resource_path("runs", "ladder-builtin.parquet")
    code, _, err = run_forget("plot", table, "--output", tmp_path / "figures")
    assert (code, "is a file: --kind laws" in err) == (2, True)
    code, _, err = run_forget("plot", tmp_path / "nowhere", "--output", tmp_path / "figures")
    assert (code, "There is no sweep folder" in err) == (2, True)
