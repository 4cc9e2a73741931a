import numpy as np
import pytest

from mlx_forget.errors import UserError
from mlx_forget.laws.fit import fit_law
from mlx_forget.laws.forms import Law, Parameter, get_law, law_from_function, laws, register
from mlx_forget.laws.model import Constraints
from mlx_forget.laws.predictor import Predictor
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, assess

from .surfaces import SURFACES, paper_grid

NAMES = sorted(SURFACES)
ALL_FORMS = sorted({alternative.law for law in laws() for alternative in law.alternatives} | set(NAMES))
FORMS = [get_law(name) for name in ALL_FORMS] + [law.plain for law in map(get_law, ALL_FORMS) if law.plain is not None]
BY_FORM = pytest.mark.parametrize("law", FORMS, ids=lambda law: law.name + ("" if law.to_natural is None else " (own coordinates)"))


def test_every_named_law_is_registered():
    assert {law.name for law in laws()} >= {
        "chinchilla",
        "bethune-forgetting",
        "bethune-forgetting-e",
        "bethune-finetuning",
        "forgetting-fixed-n",
        "kalajdzievski-linear",
        "kalajdzievski-finetuning",
        "kalajdzievski-forgetting",
        "d-cpt",
        "cmr",
        "overfitting-gap",
    }


def _internal_point(law: Law) -> np.ndarray:
    generator = np.random.default_rng(3)
    return np.array([generator.uniform(0.2, 0.7) if not p.log else generator.uniform(-0.5, 0.5) for p in law.parameters])


def _columns(law: Law) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(4)
    ranges = {
        "N": (4e7, 1e9),
        "D": (1e6, 1e8),
        "P": (1e6, 1e8),
        "steps": (50, 5000),
        "R": (0.1, 1),
        "r": (0.05, 1),
        "p": (0, 0.05),
    }
    return {name: generator.uniform(*ranges.get(name, (2.0, 4.0)), size=7) for name in law.columns}


@BY_FORM
def test_analytic_gradients_match_central_differences(law):
    columns = _columns(law)
    references = {column: float(np.exp(np.log(columns[column]).mean())) for column in law.logs}
    features = law.features(columns, references)
    theta = _internal_point(law)

    def value(point):
        made = law.evaluate(features, [np.array([[x]]) for x in point])[0]
        return np.broadcast_to(made, (1, 7))[0]

    partials = law.evaluate(features, [np.array([[x]]) for x in theta])[1]
    for j in range(len(theta)):
        step = np.zeros(len(theta))
        step[j] = 1e-6
        numeric = (value(theta + step) - value(theta - step)) / 2e-6
        assert np.allclose(np.broadcast_to(partials[j], (1, 7))[0], numeric, rtol=1e-6, atol=1e-7), law.parameters[j].name


@BY_FORM
def test_natural_and_internal_parameters_are_inverse_and_centring_changes_no_prediction(law):
    columns = _columns(law)
    references = {column: float(np.exp(np.log(columns[column]).mean())) for column in law.logs}
    theta = _internal_point(law)
    natural = law.natural(theta, references)
    assert np.allclose(law.internal(natural, references), theta, rtol=1e-9, atol=1e-9)
    centred = law.evaluate(law.features(columns, references), [np.array([[x]]) for x in theta])[0]
    plain = law.predict(dict(zip(law.names, natural.tolist(), strict=True)), columns)
    assert np.allclose(np.broadcast_to(centred, (1, 7))[0], plain, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_natural_gradients_match_central_differences(name):
    surface = SURFACES[name]
    law, params = surface.form, surface.truths(1)[0]
    columns = {column: values[:5] for column, values in surface.columns.items()}
    gradient = law.gradient(params, columns)
    for j, parameter in enumerate(law.names):
        step = 1e-6 * max(abs(params[parameter]), 1e-9)
        above, below = ({**params, parameter: params[parameter] + sign * step} for sign in (1, -1))
        numeric = (law.predict(above, columns) - law.predict(below, columns)) / (2 * step)
        assert np.allclose(gradient[:, j], numeric, rtol=2e-5, atol=1e-6 * np.abs(numeric).max() + 1e-15), parameter


def _saturating_law() -> Law:
    return law_from_function(
        "test-saturating",
        lambda columns, q: q["low"] + q["size"] / (1 + columns["D"] / q["half"]),
        parameters=(
            Parameter("low", "floor", "nats", low=0.0, linear=True),
            Parameter("size", "what data removes", "nats", log=True, low=1e-9, high=1e9, linear=True),
            Parameter(
                "half",
                "tokens that remove half",
                "tokens",
                log=True,
                low=1.0,
                high=1e15,
                grid=(1e5, 1e6, 1e7),
            ),
        ),
        columns=("D",),
        formula="loss = low + size / (1 + D / half)",
    )


def test_a_users_own_law_fits_predicts_and_carries_intervals():
    law = register(_saturating_law())
    truth = {"low": 1.5, "size": 2.0, "half": 3e6}
    tokens = np.geomspace(1e5, 1e8, 50)
    exact = law.predict(truth, {"D": tokens})
    noisy = exact * np.exp(0.002 * np.random.default_rng(1).standard_normal(50))
    clean = fit_law(Table.of(D=tokens, loss=exact), "test-saturating")
    assert clean.params == pytest.approx(truth, rel=1e-6)
    found = assess(fit_law(Table.of(D=tokens, loss=noisy), "test-saturating"), BootstrapOptions(num_resamples=200))
    assert found.params["half"].low < 3e6 < found.params["half"].high
    predictor = Predictor.from_uncertainty(found)
    low, high = predictor.interval({"D": 3e8})
    assert low[0] < law.predict(truth, {"D": 3e8})[0] < high[0]


def test_a_law_that_contradicts_itself_is_refused():
    good = get_law("chinchilla")
    with pytest.raises(UserError, match="logs"):
        register(Law(**{**good.__dict__, "name": "bad", "logs": ("N",)}))


def test_an_unknown_law_suggests_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'bethune-forgetting'"):
        get_law("bethune-forgeting")


@pytest.mark.parametrize("held", [{"A": 3.0}, {"alpha": 0.45}, {"B": 300.0}, {"A": 3.0, "beta": 0.4}])
def test_fixed_parameters_stay_and_the_others_are_recovered(held):
    truth = {"A": 3.0, "alpha": 0.45, "beta": 0.4, "B": 300.0}
    columns = paper_grid()
    table = Table.of(**columns, loss=get_law("bethune-forgetting").predict(truth, columns))
    fit = fit_law(table, "bethune-forgetting", constraints=Constraints(fixed=held))
    assert fit.params == pytest.approx(truth, rel=1e-6)


def test_tied_exponents_are_equal_and_recovered():
    truth = {"A": 3.0, "alpha": 0.4, "beta": 0.4, "B": 300.0}
    columns = paper_grid()
    table = Table.of(**columns, loss=get_law("bethune-forgetting").predict(truth, columns))
    fit = fit_law(table, "bethune-forgetting", constraints=Constraints(tied={"beta": "alpha"}))
    assert fit.model.num_free == 3
    assert fit.params == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("name", ["kalajdzievski-finetuning", "kalajdzievski-forgetting"])
@pytest.mark.parametrize("held", [("a",), ("b",), ("a", "b"), ("a", "rho"), ("alpha",)])
def test_scales_of_the_step_law_can_be_held_and_the_others_are_recovered(name, held):
    surface = SURFACES[name]
    truth = surface.truths(1)[0]
    fit = fit_law(surface.table(truth), name, constraints=Constraints(fixed={parameter: truth[parameter] for parameter in held}))
    assert fit.model.num_free == 6 - len(held)
    assert fit.params == pytest.approx(truth, rel=1e-5)


def test_scales_of_the_step_law_can_be_tied_and_shared():
    surface = SURFACES["kalajdzievski-finetuning"]
    truths = [{**surface.truths(1)[0], "a": 400.0, "b": 400.0, "s": s} for s in (0.5, 0.9)]
    tied = fit_law(surface.table(truths[0]), "kalajdzievski-finetuning", constraints=Constraints(tied={"b": "a"}))
    assert tied.params == pytest.approx(truths[0], rel=1e-5)
    parts = [surface.table(truth) for truth in truths]
    both = Table(
        {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        labels={"data": np.repeat(["x", "y"], parts[0].num_rows)},
    )
    joint = fit_law(both, "kalajdzievski-finetuning", constraints=Constraints(shared=("a", "b")), by="data")
    assert joint.params["a"] == pytest.approx(400.0, rel=1e-5)
    assert joint.params["s[y]"] == pytest.approx(0.9, rel=1e-5)


def test_the_offset_of_the_log_limit_can_be_held():
    truth = {"C": 0.4, "b": 0.05, "a": 0.08, "B": 600.0}
    columns = paper_grid()
    table = Table.of(**columns, loss=get_law("bethune-forgetting/log-limit").predict(truth, columns))
    fit = fit_law(table, "bethune-forgetting/log-limit", constraints=Constraints(fixed={"C": 0.4}))
    assert fit.params == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(fixed={"gamma": 1.0}),
        Constraints(tied={"A": "alpha"}),
        Constraints(fixed={"alpha": -1.0}),
        Constraints(fixed={"alpha": 1.0}, tied={"alpha": "beta"}),
    ],
)
def test_impossible_constraints_are_refused(constraints):
    columns = paper_grid()
    table = Table.of(**columns, loss=np.linspace(3, 4, len(columns["N"])))
    with pytest.raises(UserError):
        fit_law(table, "bethune-forgetting", constraints=constraints)


@BY_FORM
def test_the_formula_for_figures_is_printable_and_its_braces_close(law):
    """A backslash that Python took for an escape would leave a control character behind."""
    assert law.latex.isprintable()
    assert law.latex.count("{") == law.latex.count("}")
