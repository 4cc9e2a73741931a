"""The minimiser, its objectives and the noise, against closed forms and against code that shares nothing with them."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from mlx_forget.laws import objective as objectives
from mlx_forget.laws.fit import FitOptions, fit_law
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.model import Constraints, bind
from mlx_forget.laws.noise import estimate_noise
from mlx_forget.laws.objective import Curvature, LawProblem, Objective, TangentProblem
from mlx_forget.laws.profiles import profile_coordinates
from mlx_forget.laws.solver import CONVERGED, OUT_OF_STEPS, STALLED, minimise, solve_small
from mlx_forget.laws.starts import exponent_grid, projected_starts
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, assess, predict_intervals

from .surfaces import SURFACES


def positive_definite(count, k, seed=0):
    roots = np.random.default_rng(seed).standard_normal((count, k + 2, k))
    return roots, roots.transpose(0, 2, 1) @ roots


@pytest.mark.parametrize("k", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("count", [1, 31, 32, 40])
def test_small_systems_are_solved(k, count):
    _, matrices = positive_definite(count, k)
    vectors = np.random.default_rng(1).standard_normal((count, k))
    before = matrices.copy()
    assert np.allclose(solve_small(matrices, vectors), np.linalg.solve(matrices, vectors[:, :, None])[:, :, 0], rtol=1e-8)
    assert np.array_equal(matrices, before)


def test_a_system_without_a_pivot_gives_zero_there():
    matrices = np.tile(np.diag([4.0, 0.0, 2.0]), (40, 1, 1))
    assert np.allclose(solve_small(matrices, np.tile([8.0, 0.0, 1.0], (40, 1))), [2.0, 0.0, 0.5])
    assert np.isfinite(solve_small(matrices[:3], np.tile([8.0, 0.0, 1.0], (3, 1)))).all()


@dataclass
class Quadratic:
    """0.5 |A u - b|^2 in a batch, plus a constant; `lie` times its gradient is what the solver is told."""

    roots: np.ndarray
    targets: np.ndarray
    lie: float = 1.0

    def __call__(self, rows, u):
        residual = np.einsum("rnk,rk->rn", self.roots[rows], u) - self.targets[rows]
        square = np.einsum("rnk,rnl->rkl", self.roots[rows], self.roots[rows])
        gradient = self.lie * np.einsum("rn,rnk->rk", residual, self.roots[rows])
        return Curvature(0.5 * (residual**2).sum(axis=1), gradient, square, square)


def quadratic(count=40, k=3):
    roots, _ = positive_definite(count, k, seed=2)
    return Quadratic(roots, 3 * np.random.default_rng(3).standard_normal((count, k + 2)))


def test_a_quadratic_within_bounds_ends_where_an_active_set_method_ends():
    problem, low, high = quadratic(), np.array([-0.5, 0.1, -np.inf]), np.array([0.4, np.inf, 0.3])
    ends = minimise(problem, np.zeros((40, 3)), low=low, high=high)
    assert (ends.status == CONVERGED).all()
    for i in range(40):
        peer = lsq_linear(problem.roots[i], problem.targets[i], (low, high), tol=1e-14)
        assert ends.u[i] == pytest.approx(peer.x, abs=1e-6)
        assert ends.value[i] == pytest.approx(peer.cost, rel=1e-9)
    assert ((ends.u == low) | (ends.u == high)).any(axis=1).sum() > 20
    assert (ends.decrement < 1e-9).all()


def test_held_coordinates_stay_and_the_others_take_their_best():
    problem, start, free = quadratic(), np.tile([0.7, 0.0, 0.0], (40, 1)), np.full(3, np.inf)
    ends = minimise(problem, start, low=-free, high=free, held=np.array([[True, False, False]]))
    for i in range(40):
        rest, *_ = np.linalg.lstsq(problem.roots[i][:, 1:], problem.targets[i] - 0.7 * problem.roots[i][:, 0], rcond=None)
        assert ends.u[i] == pytest.approx([0.7, *rest], abs=1e-6)


def test_a_far_optimum_is_reached_in_steps_of_bounded_length_and_steps_are_counted():
    roots, free = np.eye(2)[None], np.full(2, np.inf)
    far = Quadratic(roots, np.array([[30.0, 1.0]]))
    ends = minimise(far, np.zeros((1, 2)), low=-free, high=free)
    assert ends.u[0] == pytest.approx([30.0, 1.0], abs=1e-9)
    assert (ends.value[0], ends.decrement[0]) == (pytest.approx(0.0, abs=1e-28), 0.0)
    assert 11 <= ends.steps[0] <= 20
    cut = minimise(far, np.zeros((1, 2)), low=-free, high=free, max_steps=4)
    assert (cut.status[0], cut.steps[0]) == (OUT_OF_STEPS, 5)
    assert 0 < cut.u[0, 0] <= 12


def test_a_gradient_that_leads_nowhere_is_a_stall_and_nothing_gets_worse():
    problem, free = quadratic(5), np.full(3, np.inf)
    problem.lie = -1.0
    ends = minimise(problem, np.zeros((5, 3)), low=-free, high=free)
    assert (ends.status == STALLED).all()
    assert np.array_equal(ends.u, np.zeros((5, 3)))
    assert np.array_equal(ends.value, problem(np.arange(5), np.zeros((5, 3))).value)


def test_the_edge_of_what_is_finite_is_no_end():
    def barrier(rows, u):
        with np.errstate(all="ignore"):
            value = np.where(u > 0, u - np.log(u), np.inf)[:, 0]
            return Curvature(value, 1 - 1 / u, 1 / (u**2)[:, :, None], 1 / (u**2)[:, :, None])

    ends = minimise(barrier, np.array([[2.5], [0.01], [1.0]]), low=np.array([-np.inf]), high=np.array([np.inf]))
    assert ends.u[:, 0] == pytest.approx(1.0, abs=1e-5)
    assert (ends.status == CONVERGED).all()


# --- objectives


def law_problem(objective: Objective, count: int = 3) -> tuple[LawProblem, np.ndarray]:
    surface = SURFACES["bethune-finetuning"]
    truth = surface.truths(1)[0]
    table = surface.table(truth, noise=0.01)
    model = bind(surface.form, table.columns)
    generator = np.random.default_rng(0)
    u = model.free(np.array([[truth[name] for name in surface.form.names]])) + 0.02 * generator.standard_normal((count, 4))
    response = objective.transform(table.columns["loss"])[None]
    features = surface.form.features(table.columns, model.references)
    return LawProblem(model, objective, features, response, generator.uniform(0, 2, (count, table.num_rows))), u


OBJECTIVES = [Objective(link, delta) for link in ("log", "linear") for delta in (0.01, np.inf)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: f"{one.link}-{one.delta}")
def test_value_gradient_and_curvature_are_those_of_weighted_huber_terms(objective):
    problem, u = law_problem(objective)
    rows = np.arange(3)
    found = problem(rows, u)
    residual, jacobian = problem.residual(rows, u)
    size, delta = np.abs(residual), objective.delta
    huber = np.where(size <= delta, residual**2 / 2, delta * size - (0.0 if np.isinf(delta) else delta**2 / 2))
    assert found.value == pytest.approx((problem.weights * huber).sum(axis=1))
    for j in range(u.shape[1]):
        step = 1e-6 * np.eye(u.shape[1])[j]
        slope = (problem(rows, u + step).value - problem(rows, u - step).value) / 2e-6
        assert found.gradient[:, j] == pytest.approx(slope, rel=1e-4, abs=1e-6)
    inner = problem.weights * (size <= delta)
    outer = problem.weights * np.minimum(1.0, delta / size)
    assert 0 < (inner > 0).sum() < inner.size or np.isinf(delta)
    assert np.allclose(found.inner, np.einsum("rn,rkn,rln->rkl", inner, jacobian, jacobian))
    assert np.allclose(found.outer, np.einsum("rn,rkn,rln->rkl", outer, jacobian, jacobian))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: f"{one.link}-{one.delta}")
def test_the_tangent_is_the_law_where_it_touches_and_straight_from_there(objective):
    problem, u = law_problem(objective)
    residual, jacobian = problem.residual(np.array([0]), u[:1])
    tangent = TangentProblem(objective, residual, jacobian[0], problem.weights)
    law = problem(np.arange(3), np.tile(u[:1], (3, 1)))
    same = tangent(np.arange(3), np.zeros((3, 4)))
    for name in ("value", "gradient", "inner", "outer"):
        assert np.allclose(getattr(same, name), getattr(law, name)), name
    step = np.array([[0.01, -0.02, 0.005, 0.01]])
    moved = TangentProblem(objective, residual - step @ jacobian[0], jacobian[0], problem.weights)(np.array([1]), 0 * step)
    assert np.allclose(tangent(np.array([1]), step).gradient, moved.gradient)


def test_a_batch_in_pieces_is_the_batch(monkeypatch):
    problem, u = law_problem(Objective(), count=7)
    residual, jacobian = problem.residual(np.array([0]), u[:1])
    tangent = TangentProblem(Objective(), residual, jacobian[0], problem.weights)
    whole = [problem(np.arange(7), u), tangent(np.arange(7), u - u[0])]
    monkeypatch.setattr(objectives, "BLOCK", 2 * problem.weights.shape[1] * 4)
    for one, again in zip(whole, [problem(np.arange(7), u), tangent(np.arange(7), u - u[0])], strict=True):
        for name in ("value", "gradient", "inner", "outer"):
            assert np.allclose(getattr(again, name), getattr(one, name), rtol=1e-12), name


def test_an_objective_says_what_it_is():
    assert [one.name for one in OBJECTIVES] == ["huber", "least squares"] * 2
    assert OBJECTIVES[0].describe(5) == "sum over 5 rows of Huber terms (delta 0.01) of the residual in log loss"
    assert OBJECTIVES[3].describe(5) == "sum over 5 rows of half squares of the residual in loss"
    assert Objective(delta=1.0).terms(np.array([0.5, -3.0, np.nan])).tolist() == [0.125, 2.5, np.inf]
    for one in OBJECTIVES:
        assert one.invert(one.transform(np.array([2.5]))) == pytest.approx([2.5])


def test_the_noise_of_normal_residuals_is_their_deviation():
    residual = 0.01 * np.random.default_rng(0).standard_normal(4000)
    squares = estimate_noise(residual, Objective(delta=np.inf), 10)
    exact = np.sqrt((residual**2).sum() / 3990)
    assert (squares.residual, squares.estimator, squares.ratio) == pytest.approx((exact, exact, exact**2))
    # A nearly absolute loss is as wide as a median: sqrt(pi / 2) times a mean.
    robust = estimate_noise(residual, Objective(delta=1e-5), 10)
    assert robust.residual == pytest.approx(0.01, rel=0.05)
    assert robust.estimator == pytest.approx(0.01 * np.sqrt(np.pi / 2), rel=0.05)
    assert robust.ratio == pytest.approx(1e-5 * 0.01 * np.sqrt(np.pi / 2), rel=0.05)
    # The rows that a fit runs through are no noise.
    few = estimate_noise(np.array([0.0, 0.0, 0.0, -3.0, 3.0, 3.0]), Objective(delta=1e-5), 3)
    assert few.residual == pytest.approx(3.0 / 0.67449, rel=1e-5)


# --- a law that is a straight line: every estimate and interval has a closed form


@pytest.fixture(scope="module")
def line():
    x = np.linspace(0.6, 0.9, 12)
    loss = 2.5 - 1.2 * x + 0.01 * np.random.default_rng(0).standard_normal(12)
    options = FitOptions(objective=Objective("linear", np.inf))
    fit = fit_law(Table.of(L_ft=x, loss=loss), "kalajdzievski-linear", options=options)
    design = np.stack([-x, np.ones(12)], axis=1)
    best, (squares,), *_ = np.linalg.lstsq(design, loss, rcond=None)
    covariance = squares / 10 * np.linalg.inv(design.T @ design)
    return fit, best, covariance


T_OF_10 = 2.2281388519649385


def test_the_line_is_the_least_squares_line(line):
    fit, best, covariance = line
    assert [fit.params["c"], fit.params["s"]] == pytest.approx(best, rel=1e-9)
    assert np.allclose(fit.covariance, covariance, rtol=1e-9)


@pytest.mark.parametrize("method, name", [("profile", "profile-F"), ("cluster", "curvature")])
def test_intervals_of_the_line_are_students(line, method, name):
    fit, best, covariance = line
    found = assess(fit, BootstrapOptions(num_resamples=0, method=method))
    assert found.method == name
    for i, parameter in enumerate(("c", "s")):
        half = T_OF_10 * np.sqrt(covariance[i, i])
        interval = found.params[parameter]
        assert (interval.low, interval.high) == pytest.approx((best[i] - half, best[i] + half), rel=1e-4)
        assert (interval.value, interval.reason) == (pytest.approx(best[i]), "")


def test_prediction_intervals_of_the_line_are_students(line):
    fit, best, covariance = line
    found = assess(fit, BootstrapOptions(num_resamples=0, method="profile"))
    for x, interval in zip((0.5, 0.75), predict_intervals(found, {"L_ft": [0.5, 0.75]}), strict=True):
        at = np.array([-x, 1.0])
        half = T_OF_10 * np.sqrt(at @ covariance @ at)
        assert (interval.low, interval.high) == pytest.approx((at @ best - half, at @ best + half), rel=1e-4)


def test_a_profile_of_the_line_is_a_parabola_whose_ends_are_where_it_is_one(line):
    fit, best, covariance = line
    profile = profile_coordinates(fit, level=0.95, coordinates=("s",))["s"]
    half = T_OF_10 * np.sqrt(covariance[1, 1])
    assert profile.rise == pytest.approx(((profile.points - best[1]) / half) ** 2, abs=2e-3)
    assert (np.diff(profile.points) > 0).all()
    assert 0.0 in profile.rise
    assert (profile.low, profile.high) == pytest.approx((best[1] - half, best[1] + half), rel=1e-5)
    # Beyond three deviations on each side where 95% asks for more: four rows leave two degrees of freedom, and t is 4.3.
    few = fit_law(fit.table.select(np.arange(12) % 3 == 0), fit.law, options=FitOptions(objective=fit.objective))
    wide = profile_coordinates(few, level=0.95)["s"]
    half = 4.302652729911275 * np.sqrt(few.covariance[1, 1])
    assert (wide.low, wide.high) == pytest.approx((few.params["s"] - half, few.params["s"] + half), rel=1e-4)


def test_two_lines_of_one_slope_are_the_analysis_of_covariance():
    x, g = np.tile(np.linspace(0.6, 0.9, 6), 2), np.repeat([0, 1], 6)
    loss = 2.5 + 0.3 * g - 1.2 * x + 0.01 * np.random.default_rng(1).standard_normal(12)
    table = replace(Table.of(L_ft=x, loss=loss), labels={"data": np.array(["u", "v"])[g]})
    options = FitOptions(objective=Objective("linear", np.inf))
    fit = fit_law(table, "kalajdzievski-linear", constraints=Constraints(shared=("c",)), by="data", options=options)
    design = np.stack([-x, g == 0, g == 1], axis=1).astype(float)
    best, (squares,), *_ = np.linalg.lstsq(design, loss, rcond=None)
    covariance = squares / 9 * np.linalg.inv(design.T @ design)
    assert [fit.params[name] for name in ("c", "s[u]", "s[v]")] == pytest.approx(best)
    found = assess(fit, BootstrapOptions(num_resamples=0, method="profile"))
    t_of_9 = 2.2621571627409915
    for i, name in enumerate(("c", "s[u]", "s[v]")):
        half = t_of_9 * np.sqrt(covariance[i, i])
        assert (found.params[name].low, found.params[name].high) == pytest.approx((best[i] - half, best[i] + half), rel=1e-4)
    for group, at in (("u", np.array([-0.5, 1, 0])), ("v", np.array([-0.5, 0, 1]))):
        half = t_of_9 * np.sqrt(at @ covariance @ at)
        (interval,) = predict_intervals(found, {"L_ft": 0.5}, group=group)
        assert (interval.low, interval.high) == pytest.approx((at @ best - half, at @ best + half), rel=1e-4)


# --- starts


@pytest.mark.parametrize("name", sorted(SURFACES))
def test_data_made_at_a_point_of_the_grid_are_found_by_the_first_start(name):
    law, columns = get_law(name), SURFACES[name].columns
    references = {column: float(np.exp(np.log(columns[column]).mean())) for column in law.logs}
    features = law.features(columns, references)
    if law.starts is not None:
        sign = 1.0 if law.response == "target" else -1.0
        theta = np.array([np.log(0.5) / 3 + 1, np.log(0.5) / 3 - 1, 0.1, 0.3, np.log(3.0), 6.0 * (sign < 0) + 0.7])
    else:
        grid = exponent_grid(law)
        theta = grid[len(grid) // 2].copy()
        for j, parameter in enumerate(law.parameters):
            if parameter.linear:
                theta[j] = np.log(0.4 + 0.1 * j) if parameter.log else 0.7 + 0.1 * j
    loss = np.broadcast_to(law.evaluate(features, [np.array([[x]]) for x in theta])[0], (1, len(next(iter(columns.values())))))[0]
    weights = np.random.default_rng(0).uniform(0.5, 2, (2, len(loss)))
    for own, row in zip(weights, projected_starts(law, features, loss, weights, count=3), strict=True):
        # A law without exponents has one start, which is its optimum.
        assert len(row) == min(3, len(exponent_grid(law)) if law.starts is None else 3)
        found = law.evaluate(features, [np.array([[x]]) for x in row[0]])[0]
        assert np.allclose(found, loss, rtol=1e-5)
        misfits = [np.sum(own * (law.evaluate(features, [np.array([[x]]) for x in one])[0] / loss - 1) ** 2) for one in row]
        assert misfits == sorted(misfits)
        assert len(set(misfits)) == len(row)
    if law.plain is not None:
        (row,) = projected_starts(law.plain, law.plain.features(columns, references), loss, weights[:1], count=1)
        features = law.plain.features(columns, references)
        assert np.allclose(law.plain.evaluate(features, [np.array([[x]]) for x in row[0]])[0], loss, rtol=1e-5)
