"""Figure 1 over several seeds; of one seed, tests/sweeps/test_sweep.py draws it from a sweep."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from mlx_forget.errors import UserError
from mlx_forget.records import find_runs
from mlx_forget.studies.figure1 import load_curves, over_seeds, table
from tests.runs.conftest import make_run  # noqa: F401

FORGOTTEN = {("0", 0): 3.6, ("0", 1): 3.8, ("0", 2): 4.0, ("5%", 0): 3.3, ("5%", 1): 3.2}


@pytest.fixture
def sweep(make_run, tmp_path):  # noqa: F811
    for number, ((p, seed), forgotten) in enumerate(FORGOTTEN.items()):
        make_run(tmp_path / "s", f"{number:012x}", p=p, seed=seed, forgotten=forgotten)
    return tmp_path / "s"


def test_differences_and_ratios_are_within_a_seed(sweep):
    rows = {(row.curve.label, row.curve.seed): row for row in table(load_curves(list(find_runs(sweep))))}
    assert list(rows) == [("0%", 0), ("0%", 1), ("0%", 2), ("5%", 0), ("5%", 1)]
    for seed in (0, 1):
        least, most = rows["5%", seed], rows["0%", seed]
        assert least.ratio == pytest.approx(least.forgetting.mean / most.forgetting.mean)
        assert least.less_than_previous.mean == pytest.approx(most.pretrain.mean - least.pretrain.mean)
        assert most.ratio == 1
        assert most.less_than_previous is None


def test_seeds_are_summed_up_as_means_and_standard_deviations(sweep):
    rows = table(load_curves(list(find_runs(sweep))))
    none, some = over_seeds(rows)
    assert (none.seeds, some.seeds) == ([0, 1, 2], [0, 1])
    for one, label in ((none, "0%"), (some, "5%")):
        own = [row for row in rows if row.curve.label == label]
        assert one.forgetting == pytest.approx(np.mean([row.forgetting.mean for row in own]))
        assert one.forgetting_sd == pytest.approx(np.std([row.forgetting.mean for row in own], ddof=1))
        assert one.ratio == pytest.approx(np.mean([row.ratio for row in own]))
    assert none.forgetting_sd > 0.1


def test_one_seed_has_no_spread(sweep):
    rows = table(load_curves(list(find_runs(sweep)), 1))
    assert {row.curve.seed for row in rows} == {1}
    assert over_seeds(rows) == []


def test_a_seed_without_runs_and_two_runs_of_one_kind_are_refused(sweep, make_run):  # noqa: F811
    with pytest.raises(UserError, match="no runs of seed 7 here, but of 0, 1, 2"):
        load_curves(list(find_runs(sweep)), 7)
    make_run(sweep, "f" * 12, p="5%", seed=1, d=2e6)
    with pytest.raises(UserError, match="same p and seed"):
        load_curves(list(find_runs(sweep)))


def test_plot_draws_all_seeds_and_prints_both_tables(sweep, run_forget, tmp_path):
    code, out, err = run_forget("plot", sweep, "-o", tmp_path / "f", "--json")
    assert code == 0, err
    content = json.loads(out)
    assert len(content["rows"]) == len(FORGOTTEN)
    assert [(one["p"], one["seeds"]) for one in content["over_seeds"]] == [(0, [0, 1, 2]), (0.05, [0, 1])]
    with (tmp_path / "f" / "s.csv").open() as file:
        assert {(row["p"], row["seed"]) for row in csv.DictReader(file)} == {
            ("0.0", "0"), ("0.0", "1"), ("0.0", "2"), ("0.05", "0"), ("0.05", "1")
        }  # fmt: skip
    code, out, err = run_forget("plot", sweep, "-o", tmp_path / "f")
    assert code == 0, err
    assert "Means over seeds" in out
    code, out, err = run_forget("plot", sweep, "-o", tmp_path / "f", "--seed", "0")
    assert code == 0, err
    assert "Means over seeds" not in out


def test_nothing_forgotten_without_injection_is_no_ratio(make_run, tmp_path):  # noqa: F811
    for number, (p, forgotten) in enumerate({"0": 3.5, "5%": 3.3}.items()):
        make_run(tmp_path / "s", f"{number:012x}", p=p, seed=0, forgotten=forgotten)
    curves = load_curves(list(find_runs(tmp_path / "s")))
    curves[0] = dataclasses.replace(curves[0], best=0)
    assert [row.ratio for row in table(curves)] == [None, None]
