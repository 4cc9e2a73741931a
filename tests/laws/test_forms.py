import re
from dataclasses import replace

import numpy as np
import pytest

from mlx_forget.errors import UserError
from mlx_forget.laws.fit import fit_law
from mlx_forget.laws.forms import Law, Parameter, Rescale, get_law, law_from_function, laws, register
from mlx_forget.laws.model import Constraints, bind
from mlx_forget.laws.predictor import Predictor
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, assess

from .surfaces import SURFACES, paper_grid

NAMES = sorted(SURFACES)
ALL_FORMS = sorted(
    {alternative.law for law in laws() for alternative in law.alternatives} | {*NAMES, "bethune-forgetting/own-exponent"}
)
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


@BY_FORM
def test_the_formula_that_is_shown_is_what_is_computed(law):
    def as_python(text):
        text = re.sub(r"log (\w+)", r"log(\1)", text)
        return re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", text).replace("^", "**")

    columns = _columns(law)
    references = {column: float(np.exp(np.log(columns[column]).mean())) for column in law.logs}
    params = dict(zip(law.names, law.natural(_internal_point(law), references).tolist(), strict=True))
    formula, *definitions = law.formula.removeprefix("loss = ").split("; ")
    scope = {"log": np.log, "exp": np.exp, **columns, **params}
    for definition in ", ".join(definitions).split(", ") if definitions else ():
        head, body = definition.split("(r) = ")
        scope[head] = eval(f"lambda r: {as_python(body)}", scope)
    assert law.predict(params, columns) == pytest.approx(eval(as_python(formula), scope), rel=1e-9)


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


@pytest.mark.parametrize("law", [law for law in laws() if law.alternatives], ids=lambda law: law.name)
def test_rivals_name_laws_parameters_and_larger_rivals_that_exist(law):
    sizes = {}
    for rival in law.alternatives:
        form = get_law(rival.law)
        assert {*rival.fixed, *rival.tied, *rival.tied.values()} <= set(form.names)
        assert set(form.columns) <= set(law.columns)
        sizes[rival.name] = len(form.names) - len(rival.fixed) - len(rival.tied)
    for rival in law.alternatives:
        assert all(sizes[larger] > sizes[rival.name] for larger in rival.inside)
    assert any(rival.law == law.name and not rival.fixed and not rival.tied for rival in law.alternatives)


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


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"logs": ("N",)}, "column 'D' is rescaled, so it must be listed in `logs`"),
        ({"columns": ("N",)}, "'D' is in `logs` and not in `columns`"),
        ({"rescales": (Rescale("X", "N", "alpha", 1.0),)}, "a rescale names 'X' or 'alpha'"),
        ({"rescales": (Rescale("A", "N", "x", 1.0),)}, "a rescale names 'A' or 'x'"),
    ],
)
def test_a_law_that_contradicts_itself_is_refused(changes, words):
    good = get_law("chinchilla")
    with pytest.raises(UserError, match=words):
        register(replace(good, name="bad", **changes))
    assert register(good) is good is get_law("chinchilla")


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
    "constraints, words",
    [
        (Constraints(fixed={"gamma": 1.0}), "gamma"),
        (Constraints(tied={"A": "alpha"}), "an amplitude and an exponent are different things"),
        (Constraints(fixed={"alpha": -1.0}), r"alpha=-1 is outside 0\.\.10"),
        (Constraints(fixed={"alpha": float("nan")}), r"alpha=nan is outside 0\.\.10"),
        (Constraints(fixed={"alpha": 11.0}), r"alpha=11 is outside 0\.\.10"),
        (Constraints(fixed={"alpha": 1.0}, tied={"alpha": "beta"}), "one of them is held already"),
        (Constraints(tied={"alpha": "alpha"}), "one of them is held already"),
        (Constraints(tied={"alpha": "beta", "beta": "alpha"}), "one of them is held already"),
        (Constraints(fixed={"A": 1.0, "alpha": 0.5, "beta": 0.5, "B": 10.0}), "every parameter is fixed"),
        (Constraints(shared=("alpha",)), "name the column of the groups"),
    ],
)
def test_impossible_constraints_are_refused(constraints, words):
    columns = paper_grid()
    table = Table.of(**columns, loss=np.linspace(3, 4, len(columns["N"])))
    with pytest.raises(UserError, match=words):
        fit_law(table, "bethune-forgetting", constraints=constraints)


@pytest.mark.parametrize(
    "constraints, free, undivided",
    [
        (Constraints(), "A alpha beta B", ""),
        (Constraints(fixed={"alpha": 10.0}), "A beta B", ""),
        (Constraints(tied={"beta": "alpha"}), "A alpha B", ""),
        (Constraints(fixed={"A": 2.0}), "alpha beta B", "N D"),
        (Constraints(shared=("A",)), "A alpha[x] alpha[y] beta[x] beta[y] B[x] B[y]", "N D"),
        (Constraints(shared=("A", "alpha")), "A alpha beta[x] beta[y] B[x] B[y]", "D"),
        (Constraints(shared=("A", "alpha", "beta")), "A alpha beta B[x] B[y]", ""),
        (Constraints(shared=("A", "beta"), fixed={"alpha": 0.5}), "A beta B[x] B[y]", ""),
    ],
)
def test_a_held_amplitude_keeps_its_columns_undivided(constraints, free, undivided):
    columns = paper_grid()
    groups = ("x", "y") if constraints.shared else ("",)
    model = bind(get_law("bethune-forgetting"), columns, constraints=constraints, groups=groups)
    assert model.coordinates == tuple(free.split())
    means = {name: np.exp(np.log(columns[name]).mean()) for name in ("N", "D")}
    assert model.references == pytest.approx({name: 1.0 if name in undivided.split() else mean for name, mean in means.items()})
    u = np.random.default_rng(0).uniform(0.2, 0.4, (3, model.num_free))
    natural = model.natural(u)
    assert model.free(natural) == pytest.approx(u)
    for name, value in constraints.fixed.items():
        assert natural[..., model.law.index(name)] == pytest.approx(value)
    for group in range(len(groups)):
        params = dict(zip(model.law.names, natural[1, group], strict=True))
        assert model.predict(u, columns, np.full(125, group))[1] == pytest.approx(model.law.predict(params, columns))


@BY_FORM
def test_the_formula_for_figures_is_printable_and_its_braces_close(law):
    """A backslash that Python took for an escape would leave a control character behind."""
    assert law.latex.isprintable()
    assert law.latex.count("{") == law.latex.count("}")
