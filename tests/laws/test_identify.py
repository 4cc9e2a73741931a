import numpy as np
import pytest

from mlx_forget.laws.fit import fit_law
from mlx_forget.laws.fitted import Fit
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.identify import candidate_runs, describe_run, design_flags, fit_flags, limits, ridges
from mlx_forget.laws.model import bind
from mlx_forget.laws.noise import Noise
from mlx_forget.laws.table import Table

from .designs import DESIGNS, TWIN_CONSTRAINTS, TWIN_TRUTHS, Design
from .surfaces import SURFACES, paper_grid

BY_NAME = pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)


def unidentified(flags) -> set[str]:
    return {name for flag in flags if flag.kind == "unidentified" for name in flag.parameters}


def noisy(law: str, truth, columns, seed: int) -> Table:
    exact = get_law(law).predict(truth, columns)
    return Table.of(**columns, loss=exact * np.exp(0.004 * np.random.default_rng(seed).standard_normal(len(exact))))


def fit_design(design: Design, seed: int) -> Fit:
    table = noisy(design.truth_law or design.law, design.truth, design.columns, seed)
    return fit_law(table, design.law, constraints=design.constraints)


@BY_NAME
def test_what_a_design_leaves_open_is_flagged_after_the_fit(design):
    for seed in range(2):
        assert unidentified(fit_design(design, seed).flags) & set(design.expected)


@BY_NAME
def test_the_identified_twin_is_not_flagged(design):
    truth = TWIN_TRUTHS.get(design.name, design.truth)
    constraints = TWIN_CONSTRAINTS.get(design.name, design.constraints)
    for seed in range(2):
        table = noisy(design.twin_truth_law or design.law, truth, design.twin, seed)
        assert not unidentified(fit_law(table, design.law, constraints=constraints).flags)
    assert not unidentified(design_flags(get_law(design.law), Table.of(**design.twin), constraints=constraints))


@pytest.mark.full
@BY_NAME
def test_25_noisy_data_sets_of_a_design_are_flagged_and_of_its_twin_are_not(design):
    truth = TWIN_TRUTHS.get(design.name, design.truth)
    constraints = TWIN_CONSTRAINTS.get(design.name, design.constraints)
    for seed in range(25):
        assert unidentified(fit_design(design, seed).flags) & set(design.expected)
        table = noisy(design.twin_truth_law or design.law, truth, design.twin, seed)
        assert not unidentified(fit_law(table, design.law, constraints=constraints).flags)


@BY_NAME
def test_what_the_columns_alone_leave_open_is_flagged_before_any_run(design):
    flags = design_flags(get_law(design.law), Table.of(**design.columns), constraints=design.constraints)
    assert unidentified(flags) & set(design.expected)


def test_the_named_run_breaks_the_tie():
    design = next(d for d in DESIGNS if d.name == "every p is 0")
    flag = next(flag for flag in fit_design(design, 0).flags if flag.kind == "unidentified")
    assert "p = 1%" in flag.remedy
    columns = {name: np.append(values, values[:2]) for name, values in design.columns.items()}
    columns["p"][-2:] = (0.01, 0.05)
    assert not unidentified(fit_law(noisy(design.law, design.truth, columns, 0), design.law).flags)


def test_a_ridge_names_the_parameters_that_move_together_and_by_how_much():
    design = next(d for d in DESIGNS if d.name == "one size, two p")
    flag = next(flag for flag in fit_design(design, 0).flags if flag.kind == "unidentified")
    assert set(flag.parameters) == {"alpha", "B"}
    assert "apart" in flag.words
    assert "run at" in flag.remedy


def test_directions_are_as_wide_as_their_intervals_in_units_of_what_counts_as_known():
    # Columns at right angles, of lengths 3, 4 and 0: the third is free.
    jacobian = np.zeros((5, 3))
    jacobian[0, 0], jacobian[1, 1] = 3.0, 4.0
    extents, directions = ridges(jacobian, np.array([2.0, 0.5, 1.0]), 0.1, degrees=2)
    assert extents == pytest.approx([np.inf, 0.43026527 / 2, 0.43026527 / 6], rel=1e-6)
    assert np.abs(directions) == pytest.approx(np.eye(3)[[2, 1, 0]])
    # Fewer rows than coordinates, and a noise that is none.
    extents, _ = ridges(jacobian[:2, :], np.ones(3), 0.0, degrees=0)
    assert extents == pytest.approx([np.inf, 12.7062047e-6 / 3, 12.7062047e-6 / 4])


def test_what_counts_as_known_is_a_factor_a_share_of_the_loss_or_half_a_unit():
    columns = DESIGNS[0].columns
    model = bind(get_law("chinchilla"), {"N": columns["N"], "D": columns["D"]})
    assert model.coordinates == ("E", "A", "B", "alpha", "beta")
    assert limits(model, np.array([2.0, 3.0, -7.0])).tolist() == [1.5, 2.0, 2.0, 0.5, 0.5]


def test_candidate_runs_change_one_column_of_a_run_that_exists():
    table = Table.of(N=[1e8, 1e8, 1e9], D=[1e6, 1e7, 1e7], p=[0.0, 0.01, 0.01], L0=3.0)
    rows = list(zip(*(table.columns[name].tolist() for name in "NDp"), strict=True))
    found = candidate_runs(get_law("bethune-forgetting"), table)
    # Of each of three rows: four other sizes, four other D, and the other four of five shares.
    assert len(found) == 3 * (4 + 4 + 4) - sum(one[2] not in (0.0, 0.01) for one in rows)
    for run in found:
        assert min(sum(a != b for a, b in zip((run["N"], run["D"], run["p"]), row, strict=True)) for row in rows) <= 1
        assert run["L0"] == 3.0
    ratios = sorted({round(run["N"] / 1e8, 6) for run in found})
    assert ratios == [0.1, 0.25, 1.0, 2.5, 4.0, 10.0, 40.0, 100.0]
    assert sorted({run["p"] for run in found}) == [0.0, 0.002, 0.01, 0.05, 0.25]
    for law, name in (("cmr", "R"), ("overfitting-gap", "r")):
        runs = candidate_runs(get_law(law), Table.of(**{name: [0.3]}, D=1e9))
        assert [run[name] for run in runs if run[name] != 0.3] == [0.002, 0.01, 0.05, 0.25, 0.5, 1.0]
    steps = candidate_runs(get_law("kalajdzievski-finetuning"), Table.of(P=[1e6], steps=[800.0]))
    assert {(run["P"], run["steps"]) for run in steps} == {(1.25e5, 800), (8e6, 800), (1e6, 100), (1e6, 6400)}
    line = candidate_runs(get_law("kalajdzievski-linear"), Table.of(L_ft=[1.0]))
    assert [run["L_ft"] for run in line] == [0.8, 1.25]
    assert describe_run({"N": 1.27e9, "D": 3e6, "p": 0.015, "L0": 3.0}) == "N = 1.27e+09, D = 3e+06, p = 1.5%"


def test_parameters_that_end_on_a_bound_say_which_and_what_that_means():
    columns = paper_grid()
    exact = get_law("bethune-forgetting").predict({"A": 3.0, "alpha": 0.45, "beta": 0.0, "B": 600.0}, columns)
    falling = exact - 0.02 * np.log(columns["D"] / columns["D"].min())
    fit = fit_law(Table.of(**columns, loss=falling), "bethune-forgetting")
    flag = next(flag for flag in fit.flags if flag.kind == "bound" and flag.parameters == ("beta",))
    assert flag.words == "beta ended on its lower bound 0: these data show no effect of the amount of data"
    assert "beta" in fit.certificate.at_bounds
    assert f"on a bound: {', '.join(fit.certificate.at_bounds)}" in fit.certificate.reason


def test_a_bound_of_an_amplitude_is_said_in_natural_units():
    """Within the fit, B of p added to N is relative to a typical N."""
    columns = paper_grid(shares=np.array([0.0, 0.01]))
    loss = columns["L0"] + get_law("bethune-forgetting").predict(
        {"A": 1.0, "alpha": 0.3, "beta": 0.3, "B": 0.0}, {**columns, "L0": 0.0}
    )
    fit = fit_law(Table.of(**columns, loss=loss), "bethune-forgetting/additive")
    (flag,) = (flag for flag in fit.flags if flag.kind == "bound")
    assert flag.words.startswith(f"B ended on its lower bound {fit.params['B']:g}: replay shows no effect")
    assert fit.params["B"] == pytest.approx(1e-6 * fit.model.references["N"])


def test_as_many_rows_as_parameters_is_a_flag_of_the_data():
    surface = SURFACES["cmr"]
    fit = fit_law(surface.table(surface.truths(1)[0]).select(np.arange(7) % 3 == 0), "cmr")
    assert [flag.words for flag in fit.flags if flag.kind == "data"] == [
        "3 rows for 3 free parameters: the law passes through them, and no interval is possible"
    ]


def test_a_free_direction_names_what_moves_in_it_by_more_than_a_seventh_of_the_strongest():
    columns = paper_grid()
    table = Table.of(**columns, loss=3.0)
    model = bind(get_law("bethune-forgetting"), columns)
    limit = limits(model, table.columns["loss"])
    free = np.array([1.0, 0.2, -0.1, 0.0]) / np.sqrt(1.05)
    # Known in every direction at right angles to that one.
    rows = np.linalg.svd(free[None])[2][1:]
    jacobian = np.tile(rows, (42, 1))[:125] / limit
    (flag,) = fit_flags(model, np.array([0.0, 0.5, 0.5, 3.0]), jacobian, Noise(0.01, 0.01, 1e-4), table, ())
    assert flag.parameters == ("A", "alpha")
    assert flag.words.startswith("the data do not tell A and alpha apart")
