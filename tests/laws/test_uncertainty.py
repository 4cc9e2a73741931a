from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtri, stdtrit

from mlx_forget.errors import UserError
from mlx_forget.laws import uncertainty
from mlx_forget.laws.bootstrap import Draws, Widening, bootstrap, cluster_weights, draws_interval, refit
from mlx_forget.laws.clusters import Clusters, cluster_rows
from mlx_forget.laws.fit import fit_law
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.model import Constraints, bind
from mlx_forget.laws.predictor import Predictor
from mlx_forget.laws.profiles import critical_fall, profile_coordinates
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, assess, predict_intervals

from . import coverage
from .surfaces import SURFACES, paper_grid


def noisy(name: str, seed: int = 0):
    surface = SURFACES[name]
    return fit_law(surface.table(surface.truths(1, seed=7)[0], noise=0.004, seed=seed), name)


@pytest.mark.parametrize("name", ["chinchilla", "bethune-forgetting", "bethune-forgetting-e"])
def test_resamples_converge_where_data_are_many(name):
    assert bootstrap(noisy(name), num_resamples=400).share_converged >= 0.995


def test_resamples_reach_the_optimum_that_a_full_search_finds():
    fit = noisy("bethune-forgetting")
    draws = bootstrap(fit, num_resamples=12, seed=3)
    own = fit.objective.transform(fit.table.columns["loss"])[None]
    ends = refit(fit, own, draws.weights)
    for i in range(12):
        alone = fit_law(fit.table, "bethune-forgetting", weights=draws.weights[i])
        assert ends.value[i] <= alone.value * (1 + 1e-8)


def test_clusters_are_drawn_whole():
    weights = cluster_weights(Clusters(np.array([0, 0, 1, 2, 2, 2]), "run"), 50, seed=0)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()


def levels_table() -> Table:
    """Six base models of two sizes, two shares with two seeds each, two checkpoints a run: 48 rows."""
    rows = [
        (size, tokens, share, base, seed)
        for size in (1e8, 1e9)
        for base in range(3)
        for share in (0, 0.01)
        for seed in range(2)
        for tokens in (1e6, 1e7)
    ]
    sizes, tokens, shares, bases, seeds = (np.array(values) for values in zip(*rows, strict=True))
    base = [f"{size:g}-{number:g}" for size, number in zip(sizes, bases, strict=True)]
    run = [f"{name}-{share}-{seed}" for name, share, seed in zip(base, shares, seeds, strict=True)]
    return Table.of(run=run, base=base, N=sizes, D=tokens, p=shares, L0=3 + 0.01 * bases, loss=np.linspace(3.5, 4, len(rows)))


@pytest.mark.parametrize("level, count", [("row", 48), ("run", 24), ("repeat", 12), ("base", 6), ("auto", 6)])
def test_checkpoints_seeds_and_base_models_are_nested_clusters(level, count):
    found = cluster_rows(levels_table(), get_law("bethune-forgetting"), level=level)
    assert found.num == count
    assert np.bincount(found.index).tolist() == [48 // count] * count


def test_too_few_base_models_are_not_drawn_from_and_that_is_said():
    table = levels_table()
    some = table.select(np.isin(table.base, ["1e+08-0", "1e+09-0"]))
    found = cluster_rows(some, get_law("bethune-forgetting"))
    assert (found.level, found.num) == ("run", 8)
    assert "2 base models" in found.caution


def test_repeats_of_few_configurations_count_as_independent_and_that_is_said():
    surface = SURFACES["bethune-finetuning"]
    columns = {name: np.repeat(values, 3) for name, values in surface.columns.items()}
    many = Table.of(**columns, loss=np.linspace(3, 4, 75))
    few = many.select(many.columns["D"] < 2e6)
    found = cluster_rows(many, surface.form)
    assert (found.level, found.num, found.caution) == ("repeat", 25, "")
    found = cluster_rows(few, surface.form)
    assert (found.level, found.num) == ("row", 30)
    assert "10 configurations" in found.caution


def test_an_unknown_cluster_level_is_refused():
    with pytest.raises(UserError, match="repeat"):
        cluster_rows(levels_table(), get_law("bethune-forgetting"), level="seed")


def test_rows_of_one_run_widen_the_intervals():
    surface = SURFACES["bethune-forgetting"]
    columns = paper_grid()
    run = np.repeat(np.arange(25), 5)
    effects = 0.006 * np.random.default_rng(0).standard_normal(25)[run]
    order = np.lexsort([columns["D"], columns["p"], columns["N"]])
    loss = surface.form.predict(surface.truths(1)[0], columns)
    loss[order] *= np.exp(effects)
    by_run = np.empty(125, int)
    by_run[order] = run
    widths = []
    for label in (None, by_run):
        found = assess(
            fit_law(Table.of(run=label, **columns, loss=loss), "bethune-forgetting"),
            BootstrapOptions(num_resamples=300),
        )
        widths.append(found.params["A"].high / found.params["A"].low)
    assert widths[1] > 1.1 * widths[0]


def test_the_default_method_follows_the_number_of_independent_runs():
    surface = SURFACES["bethune-finetuning"]
    table = surface.table(surface.truths(1)[0], noise=0.004)
    few = BootstrapOptions(num_resamples=100)
    assert assess(fit_law(table, "bethune-finetuning"), few).method == "profile-F"
    five = Table(table.columns, run=table.columns["N"].astype(str))
    found = assess(fit_law(five, "bethune-finetuning"), few)
    assert found.method == "t on the cluster bootstrap"
    assert "only 5 independent" in found.warnings[0]
    assert assess(noisy("bethune-forgetting"), few).method == "cluster bootstrap"


@pytest.mark.parametrize("method", ["cluster", "profile", "residual", "bayesian"])
def test_all_methods_agree_on_a_well_determined_fit(method):
    fit = noisy("bethune-forgetting")
    reference = assess(fit, BootstrapOptions(num_resamples=400, method="cluster")).params["alpha"]
    found = assess(fit, BootstrapOptions(num_resamples=400, method=method)).params["alpha"]
    width = reference.high - reference.low
    assert found.high - found.low == pytest.approx(width, rel=0.5)
    assert found.low < fit.params["alpha"] < found.high


def test_profile_ends_are_where_the_objective_rises_by_the_f_quantile():
    fit = noisy("bethune-finetuning")
    profile = profile_coordinates(fit, level=0.95)["alpha"]
    for end in (profile.low, profile.high):
        held = fit_law(fit.table, "bethune-finetuning", constraints=Constraints(fixed={"alpha": end}))
        assert (held.value - fit.value) / critical_fall(fit, 0.95) == pytest.approx(1.0, abs=0.05)


def test_an_unidentified_parameter_gets_an_open_interval_and_a_reason():
    surface = SURFACES["bethune-forgetting"]
    columns = paper_grid(shares=np.zeros(1))
    table = Table.of(**columns, loss=surface.form.predict(surface.truths(1)[0], columns) * 1.001)
    found = assess(fit_law(table, "bethune-forgetting"), BootstrapOptions(num_resamples=100))
    assert (found.params["B"].low, found.params["B"].high) == (None, None)
    assert "p is 0" in found.params["B"].reason


def test_an_amplitude_is_no_better_known_than_its_exponent():
    surface = SURFACES["forgetting-fixed-n"]
    columns = {name: values[surface.columns["D"] == 3e6] for name, values in surface.columns.items()}
    columns = {name: np.tile(values, 4) for name, values in columns.items()}
    columns["p"] = np.linspace(0, 0.05, len(columns["p"]))
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(len(columns["p"])))
    table = Table.of(**columns, loss=surface.form.predict(surface.truths(1)[0], columns) * noise)
    found = assess(fit_law(table, "forgetting-fixed-n"), BootstrapOptions(num_resamples=100))
    assert found.params["beta"].low is None
    assert found.params["A"].low is None


def test_as_many_parameters_as_rows_gives_no_interval():
    surface = SURFACES["cmr"]
    table = surface.table(surface.truths(1)[0], noise=0.001).select(np.array([1, 0, 1, 0, 0, 0, 1], bool))
    found = assess(fit_law(table, "cmr"), BootstrapOptions(num_resamples=50))
    assert all(interval.low is None for interval in found.params.values())


def test_prediction_intervals_of_both_methods_agree_and_widen_beyond_the_data():
    fit = noisy("bethune-forgetting")
    inside = {"N": 3.34e8, "D": 3e6, "p": 0.01, "L0": 3.0}
    outside = {"N": 3.34e8, "D": 3e9, "p": 0.0, "L0": 3.0}
    widths = {}
    for method in ("cluster", "profile"):
        found = assess(fit, BootstrapOptions(num_resamples=400, method=method))
        near, far = (predict_intervals(found, point)[0] for point in (inside, outside))
        widths[method] = (near.high - near.low, far.high - far.low)
        assert widths[method][1] > 3 * widths[method][0]
    assert widths["cluster"] == pytest.approx(widths["profile"], rel=0.4)


def test_the_bootstrapped_error_is_out_of_sample():
    fit = noisy("bethune-forgetting")
    draws = bootstrap(fit, num_resamples=200)
    assert fit.mre < draws.out_of_bag_mre < 2 * fit.mre
    two = replace(draws, u=draws.u[:2], weights=draws.weights[:2])
    errors = [
        np.abs(fit.model.predict(u[None], fit.table.columns)[0] / fit.table.columns["loss"] - 1)[weights == 0].mean()
        for u, weights in zip(two.u, two.weights, strict=True)
    ]
    assert two.out_of_bag_mre == pytest.approx(np.mean(errors))
    for unseen in (replace(draws, weights=None), replace(draws, method="bayesian"), replace(draws, weights=draws.weights + 1)):
        assert np.isnan(unseen.out_of_bag_mre)


def drawn(num_clusters: int, method: str = "cluster") -> tuple[Draws, np.ndarray]:
    """4,000 draws of one number about the fit's, a hundred of them lost far away; and those that converged."""
    fit = replace(noisy("bethune-finetuning"), u=np.array([0.5, 0.1, 0.1, 0.6]))
    u = np.tile(fit.u, (4000, 1))
    u[:, 0] += np.random.default_rng(0).gamma(2.0, 0.1, 4000) - 0.15
    u[:100, 0] = 1e9
    return Draws(fit, u, np.arange(4000) >= 100, None, method, num_clusters), u[100:, 0]


def test_intervals_of_many_clusters_are_stretched_percentiles_and_of_few_are_students():
    draws, values = drawn(25)
    low, high = draws_interval(draws, lambda u: u[:, :1], level=0.9)
    stretched = np.sqrt(25 / 24) * 1.7108820799 / 1.6448536270
    assert Widening.of_clusters(25).at(0.9) == pytest.approx(stretched)
    ends = np.quantile(values, [0.05, 0.95])
    assert (low[0], high[0]) == pytest.approx(tuple(0.5 + stretched * (ends - 0.5)))
    # One-sided draws leave the fit's own value as an end.
    draws, values = drawn(25)
    low, high = draws_interval(draws, lambda u: np.maximum(u[:, :1], 0.5), level=0.9)
    assert low[0] == 0.5 < high[0]
    draws, values = drawn(10)
    low, high = draws_interval(draws, lambda u: u[:, :1], level=0.9)
    half = 1.8331129327 * np.std(values, ddof=1) * np.sqrt(10 / 9)
    assert (low[0], high[0]) == pytest.approx((0.5 - half, 0.5 + half))
    residual, values = drawn(10, "residual")
    low, high = draws_interval(residual, lambda u: u[:, :1], level=0.9)
    # Residuals count the parameters of the fit instead of clusters.
    free = residual.fit.num_rows - residual.fit.model.num_free
    factor = stdtrit(free, 0.95) / 1.6448536270
    assert high[0] - low[0] == pytest.approx(factor * np.subtract(*np.quantile(values, [0.95, 0.05])))


def test_profile_ends_of_a_natural_amplitude_are_where_the_objective_rises_by_the_f_quantile():
    """Found from the side: with the amplitude held at an end, no other parameter wins the objective back."""
    surface = SURFACES["bethune-finetuning"]
    whole = surface.table(surface.truths(1, seed=7)[0], noise=0.004, seed=3)
    fit = fit_law(whole.select(np.arange(whole.num_rows) % 3 == 0), "bethune-finetuning")
    found = assess(fit, BootstrapOptions(num_resamples=50, method="profile"))
    interval = found.params["A"]
    assert interval.low < fit.params["A"] < interval.high
    for end in (interval.low, interval.high):
        held = fit_law(fit.table, "bethune-finetuning", constraints=Constraints(fixed={"A": end}))
        assert held.value - fit.value == pytest.approx(critical_fall(fit, 0.95), rel=0.02)


def test_intervals_of_every_level_have_their_own_t():
    """A factor kept for 95% covers 97.3% where 99% are asked for."""
    draws, _ = drawn(25)
    predictor = Predictor(draws.fit.law, draws.fit.params, np.empty((0, 4)), draws.widening, {})
    made = replace(predictor, draws=np.exp(np.random.default_rng(0).normal(0, 0.01, (4000, 1))) * list(draws.fit.params.values()))
    columns = {name: np.array([1e8]) for name in draws.fit.law.columns}
    for level in (0.5, 0.95, 0.99):
        low, high = made.interval(columns, level=level)
        bare = replace(made, widening=Widening()).interval(columns, level=level)
        factor = np.sqrt(25 / 24) * stdtrit(24, 0.5 + level / 2) / ndtri(0.5 + level / 2)
        assert np.log(high / low) == pytest.approx(factor * np.log(bare[1] / bare[0]), rel=1e-9)
    assert made.upper(columns, confidence=0.975) == pytest.approx(made.interval(columns)[1])
    assert made.upper(columns, confidence=0.5) == pytest.approx(made.predict(columns), rel=1e-3)


@pytest.mark.parametrize("converged", [0, 1])
def test_draws_that_did_not_converge_say_nothing(converged):
    draws = replace(drawn(25)[0], converged=np.arange(4000) < converged)
    low, high = draws_interval(draws, lambda u: u[:, :2], level=0.9)
    assert (low.tolist(), high.tolist()) == ([-np.inf] * 2, [np.inf] * 2)


@pytest.mark.parametrize("bayesian", [False, True])
def test_weights_of_resamples_add_up_to_the_clusters_and_are_drawn_again_from_a_seed(bayesian):
    clusters = Clusters(np.array([0, 1, 2, 3]), "row")
    weights = cluster_weights(clusters, 3000, seed=4, bayesian=bayesian)
    assert weights.sum(axis=1) == pytest.approx(4.0)
    assert weights.mean(axis=0) == pytest.approx(1.0, abs=0.06)
    # Variances of a multinomial count, and of a Dirichlet share.
    assert weights.var() == pytest.approx(0.6 if bayesian else 0.75, abs=0.05)
    assert (weights == weights.round()).all() != bayesian
    assert np.array_equal(weights, cluster_weights(clusters, 3000, seed=4, bayesian=bayesian))
    assert not np.array_equal(weights, cluster_weights(clusters, 3000, seed=5, bayesian=bayesian))


def test_what_was_held_and_what_is_tied_is_said_and_forgetting_is_the_loss_less_its_start():
    surface = SURFACES["bethune-forgetting"]
    table = surface.table(surface.truths(1, seed=7)[0], noise=0.004)
    held = Constraints(fixed={"alpha": 0.4}, tied={})
    found = assess(fit_law(table, surface.form, constraints=held), BootstrapOptions(num_resamples=0, method="cluster"))
    assert found.method == "curvature"
    assert vars(found.params["alpha"]) == {"value": 0.4, "low": 0.4, "high": 0.4, "reason": "fixed by the user, not estimated"}
    fit = found.fit
    for name in ("beta", "B"):
        m = fit.model.coordinates.index(name)
        half = 1.9797 * np.sqrt(fit.covariance[m, m])
        ends = fit.u[m] - half, fit.u[m] + half
        assert (found.params[name].low, found.params[name].high) == pytest.approx(np.exp(ends) if name == "B" else ends, rel=1e-3)
    # A mixes its coordinate with beta: log A = u_A - beta log(middle of D) + what is held.
    gradient = np.array(
        [-np.log(fit.model.references["D"]) if name == "beta" else float(name == "A") for name in fit.model.coordinates]
    )
    half = 1.9797 * np.sqrt(gradient @ fit.covariance @ gradient)
    ends = found.params["A"].low, found.params["A"].high
    assert np.log(ends) == pytest.approx(np.log(found.params["A"].value) + np.array([-half, half]), rel=1e-3)
    tied = assess(
        fit_law(table, surface.form, constraints=Constraints(tied={"beta": "alpha"})),
        BootstrapOptions(num_resamples=40, method="cluster"),
    )
    assert tied.params["beta"] == tied.params["alpha"]
    assert tied.params["alpha"].low < tied.params["alpha"].value < tied.params["alpha"].high
    point = {"N": [3.34e8, 1e9], "D": 3e6, "p": 0.01, "L0": [3.0, 2.5]}
    losses, forgotten = (predict_intervals(tied, point, forgetting=only) for only in (False, True))
    for loss, less, start in zip(losses, forgotten, (3.0, 2.5), strict=True):
        assert (less.value, less.low, less.high) == pytest.approx((loss.value - start, loss.low - start, loss.high - start))
        assert less.low < less.value < less.high
    bare = predict_intervals(found, point)
    assert [(interval.low, interval.high) for interval in bare] == [(None, None)] * 2
    assert [interval.value for interval in bare] == pytest.approx(fit.predict(point))


@pytest.mark.parametrize("num_lost, words", [(0, []), (1, []), (2, ["1.0% of the resamples did not converge"])])
def test_resamples_that_do_not_converge_are_warned_of(monkeypatch, num_lost, words):
    def some_lost(*arguments, **options):
        draws = bootstrap(*arguments, **options)
        return replace(draws, converged=np.arange(200) >= num_lost)

    monkeypatch.setattr(uncertainty, "bootstrap", some_lost)
    found = assess(noisy("bethune-finetuning"), BootstrapOptions(num_resamples=200, method="cluster"))
    assert [warning.split(":")[0] for warning in found.warnings] == words


def test_rows_that_are_not_independent_are_warned_of():
    table = noisy("bethune-finetuning").table
    runs = Table(table.columns, run=np.arange(25) % 22)
    found = assess(fit_law(runs, "bethune-finetuning"), BootstrapOptions(num_resamples=20, method="profile"))
    assert "profile-F takes all 25 rows for independent, and they are 22 independent runs: too narrow" in found.warnings


def test_an_unknown_method_is_refused():
    with pytest.raises(UserError, match="profile"):
        assess(noisy("bethune-forgetting"), BootstrapOptions(method="magic"))


# A short form: 30 simulations tell 95% from 75%, not from 92%; `make coverage` runs 2,000.
@pytest.mark.parametrize("name", ["20 base models x 15 runs", "25 independent runs, finetuning"])
def test_nominal_intervals_cover_the_truth(name):
    scenario = next(scenario for scenario in coverage.scenarios() if scenario.name == name)
    found = coverage.measure(scenario, simulations=30, resamples=60)
    for name, share in found.items():
        assert share >= 0.8, name


@pytest.mark.full
@pytest.mark.parametrize("scenario", coverage.scenarios(), ids=lambda scenario: scenario.name)
def test_nominal_intervals_cover_the_truth_in_200_simulations(scenario):
    found = coverage.measure(scenario, simulations=200, resamples=200)
    for name, share in found.items():
        assert share >= 0.91, name


def test_seeds_of_one_configuration_are_repeats_though_they_were_served_other_shares():
    rng = np.random.default_rng(0)
    columns = {name: np.repeat(values, 3) for name, values in paper_grid().items()}
    asked = columns["p"]
    served = asked * (1 + 0.01 * rng.standard_normal(len(asked)))
    law = get_law("bethune-forgetting")
    found = [cluster_rows(Table.of(**columns | {"p": p}, loss=np.ones(len(p))), law, level="repeat").num for p in (asked, served)]
    assert found == [len(asked) // 3] * 2


def test_what_is_tied_to_a_fixed_parameter_is_fixed_and_shares_are_of_both_or_neither():
    table = noisy("bethune-finetuning").table
    fit = fit_law(table, "bethune-finetuning", constraints=Constraints(fixed={"alpha": 0.2}, tied={"beta": "alpha"}))
    interval = assess(fit, BootstrapOptions(num_resamples=0)).params["beta"]
    assert (interval.low, interval.value, interval.high) == (0.2, 0.2, 0.2)
    assert "tied to alpha" in interval.reason
    with pytest.raises(UserError, match="share both of them, or neither"):
        bind(fit.law, table.columns, constraints=Constraints(tied={"beta": "alpha"}, shared=("beta",)), groups=("a", "b"))
