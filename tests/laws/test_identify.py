import numpy as np
import pytest

from mlx_forget.laws.fit import fit_law
from mlx_forget.laws.fitted import Fit
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.identify import design_flags
from mlx_forget.laws.table import Table

from .designs import DESIGNS, TWIN_CONSTRAINTS, TWIN_TRUTHS, Design

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
