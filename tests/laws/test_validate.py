import numpy as np
import pytest
from scipy.special import erf, fdtrc

from mlx_forget.errors import UserError
from mlx_forget.laws import validate
from mlx_forget.laws.fit import FitOptions
from mlx_forget.laws.forms import Alternative, get_law
from mlx_forget.laws.objective import Objective
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions
from mlx_forget.laws.validate import leave_out, select, train_on

from .surfaces import SURFACES, paper_grid

COLUMNS = paper_grid()
BASE = {"A": 12.0, "alpha": 0.45, "beta": 0.3, "B": 600.0}
# Each rival's own surface, far enough from the others for 125 runs with 0.4% noise to tell.
TRUTHS = {
    "no p": ("bethune-forgetting/no-p", {"A": 12.0, "alpha": 0.45, "beta": 0.3}),
    "p on N": ("bethune-forgetting", BASE),
    "p on D": ("bethune-forgetting/on-d", BASE),
    "p added to N": ("bethune-forgetting/additive", {**BASE, "B": 2e11}),
    "p saturates": ("bethune-forgetting/saturating", {**BASE, "S": 0.25}),
    "with E": ("bethune-forgetting-e", {**BASE, "E": 0.08}),
    "tied exponents": ("bethune-forgetting", {**BASE, "A": 1.2, "beta": 0.45}),
    "log limit": ("bethune-forgetting/log-limit", {"C": 1.6, "b": 0.05, "a": 0.08, "B": 600.0}),
}


def simulate(name: str, seed: int) -> Table:
    law, truth = TRUTHS[name]
    form = get_law(law)
    columns = {column: COLUMNS[column] for column in ("N", "D", "p", "L0")}
    exact = form.predict(truth, columns)
    return Table.of(**columns, loss=exact * np.exp(0.004 * np.random.default_rng(seed).standard_normal(len(exact))))


def share_right(name: str, count: int) -> float:
    return float(np.mean([select(simulate(name, seed), "bethune-forgetting").chosen == name for seed in range(count)]))


@pytest.mark.parametrize("name", sorted(TRUTHS))
def test_selection_names_the_true_member(name):
    assert share_right(name, 4) >= 0.75


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(TRUTHS))
def test_selection_names_the_true_member_in_90_of_100_simulations(name):
    assert share_right(name, 100) >= 0.9


def test_the_verdict_says_why():
    chosen = select(simulate("p on N", 0), "bethune-forgetting", condition="N<=3.4e8")
    assert chosen.chosen == "p on N"
    assert "'no p' is rejected" in chosen.verdict
    assert "outside 'N<=3.4e8'" in chosen.verdict
    assert all(np.isfinite(rival.hold_out) for rival in chosen.rivals)


def test_a_law_without_rivals_cannot_be_selected():
    with pytest.raises(UserError, match="rivals"):
        select(
            simulate("p on N", 0),
            "bethune-forgetting",
            alternatives=[Alternative("p on N", "bethune-forgetting")],
        )


def test_train_on_reports_every_held_out_point():
    found = train_on(simulate("p on N", 0), "bethune-forgetting", "N<=3.4e8 and D<=3e6")
    assert found.test.num_rows == 80
    assert len(found.error) == 80
    assert found.mre <= 0.01
    assert found.worst >= found.mre


def test_standard_hold_outs_leave_the_extremes_and_each_share():
    table = simulate("p on N", 0)
    labelled = Table(table.columns, labels={"domain": np.where(np.arange(125) % 2 == 0, "even", "odd")})
    found = leave_out(labelled, "bethune-forgetting", domain="domain", bootstrap=BootstrapOptions(num_resamples=60))
    names = " ".join(hold_out.name for hold_out in found)
    for expected in ("largest N", "largest D", "p = 0%", "p = 5%", "domain = even"):
        assert expected in names
    calibrated = [h.covered for h in found if "largest" in h.name or "domain" in h.name]
    assert min(calibrated) >= 0.8


@pytest.mark.parametrize(
    "law, tops, shares",
    [
        ("bethune-forgetting", "N D", "p"),
        ("chinchilla", "N D", ""),
        ("d-cpt", "N D", "r"),
        ("cmr", "", "R"),
        ("kalajdzievski-finetuning", "P steps", ""),
        ("kalajdzievski-linear", "", ""),
    ],
)
def test_standard_hold_outs_of_a_law_are_its_own_columns(monkeypatch, law, tops, shares):
    monkeypatch.setattr(validate, "hold_out", lambda table, law, train, *, name, **_: (name, train))
    columns = SURFACES[law].columns
    found = dict(leave_out(Table.of(**columns, loss=3.0), law))
    wanted = {f"largest {name} ({columns[name].max():.3g})": columns[name] < 0.95 * columns[name].max() for name in tops.split()}
    for name in shares.split():
        wanted |= {f"{name} = {100 * value:g}%": columns[name] != value for value in np.unique(columns[name])}
    assert list(found) == list(wanted)
    assert all(np.array_equal(found[name], rows) for name, rows in wanted.items())
    two = {name: np.where(values == values.max(), values.max(), values.min()) for name, values in columns.items()}
    assert leave_out(Table.of(**two, loss=3.0), law) == []


def test_selection_weighs_a_line_against_a_constant_as_the_textbook_does():
    # Residuals of one size, so that the Huber loss of either is a square: then the F ratio and AICc have closed forms.
    x = np.linspace(-1.0, 1.0, 12) + 2.0
    loss = 3.0 - 0.004 * x + 0.01 * np.array([1, -1, -1, 1] * 3)
    table = Table.of(L_ft=x, loss=loss)
    rivals = [
        Alternative("line", "kalajdzievski-linear"),
        Alternative("constant", "kalajdzievski-linear", fixed={"c": 0.0}, inside=("line",)),
    ]
    found = select(table, "kalajdzievski-linear", alternatives=rivals, options=FitOptions(objective=Objective("linear")))
    squares = {"constant": ((loss - loss.mean()) ** 2).sum(), "line": np.polyfit(x, loss, 1, full=True)[1][0]}
    # The share of a normal law within 1.345 deviations stands for the slope of the Huber loss.
    slope = erf(1.345 / np.sqrt(2))
    (test,) = found.tests
    statistic = (squares["constant"] - squares["line"]) / (squares["line"] / 10) * slope
    assert (test.smaller, test.larger, test.statistic) == ("constant", "line", pytest.approx(statistic, rel=0.05))
    assert test.p_value == pytest.approx(fdtrc(1, 10, test.statistic))
    assert (found.chosen, found.rivals[0].name) == ("constant", "constant")
    by_name = {rival.name: rival.aicc for rival in found.rivals}
    ratio = min(squares["line"] / 10, squares["constant"] / 11) / slope
    penalties = 2 * 3 + 24 / 8 - (2 * 2 + 12 / 9)
    assert by_name["line"] - by_name["constant"] == pytest.approx(
        (squares["line"] - squares["constant"]) / ratio + penalties, rel=0.05
    )


def test_shares_that_one_p_was_served_as_are_held_out_together(monkeypatch):
    monkeypatch.setattr(validate, "hold_out", lambda table, law, train, *, name, **_: (name, train))
    p = np.array([0.0, 0.0, 0.00501, 0.00499, 0.0503, 0.05, 0.201, 0.2])
    table = Table.of(N=np.full(8, 1e6), D=np.full(8, 1e5), p=p, L0=np.full(8, 3.0), loss=np.full(8, 3.1))
    found = dict(leave_out(table, "bethune-forgetting"))
    assert list(found) == ["p = 0%", "p = 0.5%", "p = 5%", "p = 20%"]
    assert [list(np.flatnonzero(~train)) for train in found.values()] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    # Of the share of the target, what it leaves is compared.
    assert [len(level) for level in validate.share_levels(1 - p)] == [2, 2, 2, 1]


@pytest.mark.parametrize("condition", ["N < ", "import os", "N <= 'big'", "size <= 3", "N.real < 3", "N <= 1"])
def test_a_condition_that_cannot_be_used_is_refused(condition):
    with pytest.raises(UserError):
        train_on(simulate("p on N", 0), "bethune-forgetting", condition)


def test_chinchilla_rivals_are_told_apart():
    surface = SURFACES["chinchilla"]
    truth = {"E": 0.0, "A": 480.0, "B": 2100.0, "alpha": 0.3, "beta": 0.37}
    exact = surface.form.predict(truth, surface.columns)
    table = Table.of(**surface.columns, loss=exact * np.exp(0.004 * np.random.default_rng(0).standard_normal(len(exact))))
    assert select(table, "chinchilla").chosen == "E = 0"


def test_what_lies_a_little_below_the_largest_is_held_out_with_it():
    """Subsets of tokens are cut at whole rows: 15 of 16 runs of one D in the training part would be a leak."""
    columns = paper_grid()
    rng = np.random.default_rng(0)
    columns["D"] = columns["D"] * (1 + 1e-3 * rng.standard_normal(len(columns["D"])))
    loss = get_law("bethune-forgetting").predict(BASE, columns)
    top = paper_grid()["D"].max()
    (largest,) = [
        held for held in leave_out(Table.of(**columns, loss=loss), "bethune-forgetting") if held.name.startswith("largest D")
    ]
    assert largest.test.num_rows == (paper_grid()["D"] == top).sum()
