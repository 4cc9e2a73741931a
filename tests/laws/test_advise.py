from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from mlx_forget.errors import UserError
from mlx_forget.laws.advise import AdviceOptions, _hardest_fine, pareto, run_cost, solve
from mlx_forget.laws.bootstrap import Widening
from mlx_forget.laws.choice import choose_law
from mlx_forget.laws.design import describe_plan, next_runs, probe_runs, run_flops
from mlx_forget.laws.fit import fit_law
from mlx_forget.laws.forms import get_law
from mlx_forget.laws.predictor import Predictor, reasons_of
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, assess, predict_intervals

from .surfaces import SIZES, TOKENS, grid, paper_grid

TRUTH = {"A": 3.0, "alpha": 0.45, "beta": 0.4, "B": 600.0}
RUN = {"N": 3.34e8, "D": 1e7}


def predictor(law: str = "bethune-forgetting", truth=TRUTH, columns=None, resamples: int = 300) -> Predictor:
    columns = paper_grid() if columns is None else columns
    form = get_law(law)
    columns = {name: columns[name] for name in form.columns}
    exact = form.predict(truth, columns)
    table = Table.of(**columns, loss=exact * np.exp(0.004 * np.random.default_rng(0).standard_normal(len(exact))))
    return Predictor.from_uncertainty(assess(fit_law(table, law), BootstrapOptions(num_resamples=resamples)))


@pytest.fixture(scope="module")
def known() -> Predictor:
    return predictor()


def test_the_smallest_share_meets_the_budget_with_the_confidence_and_no_smaller_one_does(known):
    advice = solve(known, RUN, "p", max_forgetting=0.08)
    at = {**RUN, "L0": 0.0}
    assert known.upper({**at, "p": advice.answer}, confidence=0.9)[0] <= 0.08
    assert known.upper({**at, "p": 0.99 * advice.answer}, confidence=0.9)[0] > 0.08
    # The truth needs (1 + B p) = (A D^beta / (0.08 N^alpha))^(1 / alpha).
    exact = ((3.0 * 1e7**0.4 / (0.08 * 3.34e8**0.45)) ** (1 / 0.45) - 1) / 600
    assert exact < advice.answer < 1.5 * exact


def test_an_answer_comes_with_its_forgetting_its_cost_and_what_would_be_without_replay(known):
    advice = solve(known, RUN, "p", max_forgetting=0.08, epochs=2.0)
    at = {**RUN, "p": advice.answer}
    assert (advice.unknown, advice.columns) == ("p", at)
    assert advice.question == "smallest p with forgetting <= 0.08 nats at 90% confidence"
    assert advice.expected == pytest.approx(known.forgetting(at)[0])
    assert advice.without_replay == pytest.approx(known.forgetting({**RUN, "p": 0.0})[0])
    assert advice.expected < advice.upper == pytest.approx(known.upper({**at, "L0": 0.0}, confidence=0.9)[0])
    assert advice.cost == run_cost(at, epochs=2.0)
    assert advice.distance == ""
    assert advice.words.endswith("more tokens.")
    assert "confidence" in advice.words


def test_the_largest_share_considered_is_a_half_and_beyond_the_data_twice_what_was_run(known):
    beyond = AdviceOptions(allow_extrapolation=True)
    assert "No p up to 50% keeps forgetting within 1e-05 nats" in solve(known, RUN, "p", max_forgetting=1e-5, options=beyond).words
    little = AdviceOptions(max_share=0.07)
    assert "No p up to 7%" in solve(known, RUN, "p", max_forgetting=1e-5, options=little).words
    far = solve(known, {"N": 3.34e8, "D": 1e8}, "p", max_forgetting=1.0)
    assert far.distance == "D is 3.33 times outside the data (3e+05 to 3e+07)"
    assert far.words.endswith(f" Outside the data: {far.distance}.")


def test_more_confidence_asks_for_more_replay(known):
    shares = [solve(known, RUN, "p", max_forgetting=0.08, options=AdviceOptions(confidence=c)).answer for c in (0.5, 0.9, 0.99)]
    assert shares == sorted(shares)
    assert shares[0] < shares[2]


def test_no_replay_is_advised_where_none_is_needed(known):
    assert solve(known, RUN, "p", max_forgetting=2.0).answer == 0.0


def test_a_budget_out_of_reach_is_said_to_be(known):
    advice = solve(known, {"N": 4.1e7, "D": 3e7}, "p", max_forgetting=1e-5)
    assert advice.answer is None
    assert "No p up to 10%" in advice.words
    assert "the data (0% to 5%) say too little" in advice.words
    assert "No N up to" in solve(known, {"D": 3e7, "p": 0.0}, "N", max_forgetting=1e-5).words
    assert "No D down to" in solve(known, {"N": 4.1e7, "p": 0.0}, "D", max_forgetting=1e-5).words


def test_where_alpha_and_b_are_a_ridge_the_answer_stays_within_the_shares_that_were_run():
    columns = paper_grid(sizes=SIZES[2:3], shares=np.array([0.0, 0.01]))
    ridge = predictor(columns=columns, resamples=60)
    assert "B" in ridge.unidentified
    one = {"N": SIZES[2], "D": 1e7}
    inside = solve(ridge, one, "p", max_forgetting=0.2)
    assert 0 < inside.answer < 0.01
    assert "do not determine" in inside.words
    beyond = solve(ridge, one, "p", max_forgetting=0.05)
    assert beyond.answer is None
    assert "No p up to 1%" in beyond.words


def test_largest_data_and_smallest_model_sit_on_the_budget(known):
    data = solve(known, {"N": 3.34e8, "p": 0.005}, "D", max_forgetting=0.1)
    assert data.upper == pytest.approx(0.1, rel=0.01)
    model = solve(known, {"D": 1e7, "p": 0.005}, "N", max_forgetting=0.1)
    assert model.upper == pytest.approx(0.1, rel=0.01)


def test_a_question_far_outside_is_refused_unless_told_otherwise(known):
    far = {"N": 1.27e11, "D": 1e7}
    with pytest.raises(UserError, match="100 times outside"):
        solve(known, far, "p", max_forgetting=0.01)
    advice = solve(known, far, "p", max_forgetting=0.01, options=AdviceOptions(allow_extrapolation=True))
    assert "100 times outside" in advice.words


def test_no_advice_on_p_from_runs_without_replay():
    with pytest.raises(UserError, match="every one has p = 0%"):
        solve(predictor(columns=paper_grid(shares=np.zeros(1)), resamples=30), RUN, "p", max_forgetting=0.02)


@pytest.mark.parametrize("budget", [0.0, -1.0])
def test_a_budget_must_be_positive(known, budget):
    with pytest.raises(UserError, match="positive"):
        solve(known, RUN, "p", max_forgetting=budget)


def test_replay_costs_p_over_one_minus_p_of_the_target_tokens():
    cost = run_cost({"N": 1e9, "D": 1e6, "p": 0.2}, epochs=3)
    assert cost.target_tokens == 3e6
    assert cost.injected_tokens == pytest.approx(3e6 * 0.25)
    assert cost.train_flops == pytest.approx(6e9 * 3.75e6)
    assert cost.overhead == pytest.approx(0.25)
    plain = run_cost({"D": 1e6})
    assert (plain.target_tokens, plain.injected_tokens, plain.overhead) == (1e6, 0.0, 0.0)
    assert np.isnan(plain.train_flops)
    assert run_cost({"N": 1e9, "D": 1e6, "p": 1.0}).injected_tokens == np.inf


def test_nothing_beats_a_run_on_the_front(known):
    target = predictor(
        "bethune-finetuning",
        {"A": 30.0, "alpha": 0.12, "beta": 0.07, "E": 0.6},
        grid(N=SIZES, D=TOKENS),
        resamples=30,
    )
    sizes, shares = SIZES, np.array([0.0, 0.001, 0.01, 0.05])
    everything = pareto(known, target, sizes=sizes, tokens=TOKENS, shares=shares)
    # The lowest target loss is that of the largest run; of equals, the one that forgets least.
    assert everything[0].columns == {"N": SIZES[-1], "D": TOKENS[-1], "p": 0.05}
    assert everything[0].target_loss == min(choice.target_loss for choice in everything)
    assert everything[0].cost == run_cost(everything[0].columns)
    twice = pareto(known, target, sizes=SIZES[0], tokens=TOKENS[0], shares=0.0, epochs=2.0)
    assert [choice.cost.train_flops for choice in twice] == [pytest.approx(12 * SIZES[0] * TOKENS[0])]
    front = pareto(known, target, sizes=sizes, tokens=TOKENS, shares=shares, max_flops=3e16)
    assert len(front) >= 2
    forgettings = [choice.forgetting for choice in front]
    assert forgettings == sorted(forgettings, reverse=True)
    for n, d, p in product(sizes, TOKENS, shares):
        columns = {"N": n, "D": d, "p": p}
        if run_cost(columns).train_flops <= 3e16:
            loss, forgetting = target.predict(columns)[0], known.forgetting(columns)[0]
            assert any(c.target_loss <= loss and c.forgetting <= forgetting for c in front)


def widths(count: int) -> tuple[float, float]:
    """Median standard deviation of a prediction's logarithm: greedy third against random two thirds, over `count` draws."""
    law = get_law("bethune-forgetting")
    question = {"N": 1.27e9, "D": 3e7, "p": 0.01, "L0": 2.6}
    ours, theirs = [], []
    for seed in range(count):
        generator = np.random.default_rng(seed)
        columns = paper_grid()
        pool = generator.choice(125, size=60, replace=False)
        candidates = {name: values[pool] for name, values in columns.items()}
        truth = {
            "A": 3.0,
            "alpha": generator.uniform(0.3, 0.6),
            "beta": generator.uniform(0.3, 0.5),
            "B": generator.uniform(200, 2000),
        }
        made = Predictor(law, truth, np.empty((0, 4)), Widening(), {})
        ours.append(next_runs(made, question, candidates, count=20, per_flop=False).width[-1])
        rest = generator.choice(60, size=40, replace=False)
        chosen = {name: values[rest] for name, values in candidates.items()}
        theirs.append(next_runs(made, question, chosen, count=40, per_flop=False).width[-1])
    return float(np.median(ours)), float(np.median(theirs))


def test_the_greedy_third_is_as_sharp_as_a_random_two_thirds():
    ours, theirs = widths(50)
    assert ours <= theirs


def fitted_widths(count: int) -> tuple[float, float]:
    """Median widths, in log loss, of profile intervals of a prediction, fitted to noisy losses of the planned third and of a random
    two thirds. The plan knows a usual law, not the true one.
    """
    law = get_law("bethune-forgetting")
    question = {"N": 1.27e9, "D": 3e7, "p": 0.01, "L0": 2.6}
    usual = Predictor(law, TRUTH, np.empty((0, 4)), Widening(), {})
    ours, theirs = [], []
    for seed in range(count):
        generator = np.random.default_rng(seed)
        pool = generator.choice(125, size=60, replace=False)
        candidates = {name: values[pool] for name, values in paper_grid().items()}
        truth = {
            "A": 3.0,
            "alpha": generator.uniform(0.3, 0.6),
            "beta": generator.uniform(0.3, 0.5),
            "B": generator.uniform(200, 2000),
        }
        loss = law.predict(truth, candidates) * np.exp(0.004 * generator.standard_normal(60))
        plan = next_runs(usual, question, candidates, count=20, per_flop=False)
        chosen = {(run["N"], run["D"], run["p"]) for run in plan.runs}
        planned = np.array([key in chosen for key in zip(candidates["N"], candidates["D"], candidates["p"], strict=True)])
        random = np.isin(np.arange(60), generator.choice(60, size=40, replace=False))
        for rows, widths in ((planned, ours), (random, theirs)):
            fit = fit_law(Table.of(**{name: values[rows] for name, values in candidates.items()}, loss=loss[rows]), law)
            interval = predict_intervals(assess(fit, BootstrapOptions(num_resamples=0, method="profile")), question)[0]
            is_closed = interval.low is not None and interval.high is not None
            widths.append(np.log(interval.high / interval.low) if is_closed else np.inf)
    return float(np.median(ours)), float(np.median(theirs))


@pytest.mark.full
def test_the_greedy_third_gives_the_fitted_interval_of_a_random_two_thirds():
    ours, theirs = fitted_widths(50)
    assert ours <= theirs


def test_planned_runs_sharpen_the_fitted_interval_of_the_prediction():
    law = get_law("bethune-forgetting")
    columns = paper_grid()
    question = {"N": 1.27e9, "D": 3e7, "p": 0.01, "L0": 2.6}
    made = Predictor(law, TRUTH, np.empty((0, 4)), Widening(), {})
    generator = np.random.default_rng(0)

    def spread(rows) -> float:
        exact = law.predict(TRUTH, {name: values[rows] for name, values in columns.items()})
        found = []
        for _ in range(12):
            loss = exact * np.exp(0.004 * generator.standard_normal(len(exact)))
            table = Table.of(**{name: values[rows] for name, values in columns.items()}, loss=loss)
            found.append(fit_law(table, law).predict(question)[0])
        return float(np.std(np.log(found)))

    plan = next_runs(made, question, columns, count=40, per_flop=False)
    keys = {(run["N"], run["D"], run["p"]) for run in plan.runs}
    planned = np.array([key in keys for key in zip(columns["N"], columns["D"], columns["p"], strict=True)])
    random = np.isin(np.arange(125), generator.choice(125, size=40, replace=False))
    assert spread(planned) < spread(random)


def width_after(predictor: Predictor, question, runs, **options) -> float:
    """Standard deviation of the log prediction once all of these runs are done."""
    return next_runs(predictor, question, runs, count=len(runs["N"]), **options).width[-1]


def test_a_plan_is_the_best_of_all_choices_of_as_many_runs(known):
    question = {"N": 1.27e9, "D": 3e7, "p": 0.01, "L0": 2.6}
    some = replace(known, columns={name: values[::40] for name, values in known.columns.items()})
    pool = np.random.default_rng(1).choice(125, size=7, replace=False)
    candidates = {name: values[pool] for name, values in paper_grid().items()}
    widths = {
        rows: width_after(some, question, {name: values[list(rows)] for name, values in candidates.items()})
        for count in (1, 3)
        for rows in combinations(range(7), count)
    }
    best = min((rows for rows in widths if len(rows) == 3), key=lambda rows: widths[rows])
    plan = next_runs(some, question, candidates, count=3, per_flop=False)
    assert sorted(run["D"] for run in plan.runs) == sorted(candidates["D"][list(best)])
    assert plan.width[-1] == pytest.approx(widths[best])
    assert plan.width[-1] < 0.8 * plan.width[0]
    # Per FLOP, the first run is the one with the largest fall of the log variance for its price.
    plan, price = next_runs(some, question, candidates, count=3), run_flops(candidates)
    first = max(range(7), key=lambda i: np.log(plan.width[0] / widths[i,]) / price[i])
    assert plan.runs[0] == {name: values[first] for name, values in candidates.items()}
    assert (plan.flops[0], plan.width[1]) == pytest.approx((price[first], widths[first,]))
    assert describe_plan(plan)[0].endswith(f"then within {100 * 1.96 * plan.width[1]:.2g}%")
    for count in (0, 8):
        with pytest.raises(UserError, match=f"Asked for {count} of 7 candidate runs: ask for 1 to 7"):
            next_runs(some, question, candidates, count=count)


def test_runs_that_were_done_count_unless_told_otherwise(known):
    question, runs = {"N": 1.27e9, "D": 3e7, "p": 0.01, "L0": 2.6}, {name: values[:5] for name, values in paper_grid().items()}
    fresh = width_after(known, question, runs, use_data=False)
    assert width_after(known, question, runs) < 0.1 * fresh
    assert width_after(known, question, runs, noise=0.04) > 2 * width_after(known, question, runs)


def test_a_run_costs_six_n_d_with_what_is_injected():
    assert run_flops({"N": 1e9, "D": 2e6, "p": 0.2}) == pytest.approx([6e9 * 2e6 / 0.8])
    assert run_flops({"D": [2e6, 3e6]}) == pytest.approx([1.2e7, 1.8e7])


def test_plans_per_flop_prefer_cheap_runs(known):
    question = {"N": 1.27e9, "D": 3e7, "p": 0.01, "L0": 2.6}
    cheap = next_runs(known, question, paper_grid(), count=5)
    dear = next_runs(known, question, paper_grid(), count=5, per_flop=False)
    assert cheap.flops.sum() < dear.flops.sum()
    assert (np.diff(cheap.width) <= 0).all()


def test_the_probe_determines_the_law_of_one_model():
    runs = probe_runs(3e7, 6)
    assert max(run["D"] for run in runs) <= 1e7
    assert probe_runs(3e7, 4) == runs[:4]
    assert probe_runs(3e7, 3) == [{"D": 3e7, "p": 0.0}, {"D": 3e7, "p": 0.005}, {"D": 3e7, "p": 0.05}]
    truth = {"A": 0.002, "beta": 0.35, "B": 600.0, "alpha": 0.5}
    columns = {name: np.array([run[name] for run in runs]) for name in ("D", "p")} | {"L0": np.full(6, 3.2)}
    fit = fit_law(Table.of(**columns, loss=get_law("forgetting-fixed-n").predict(truth, columns)), "forgetting-fixed-n")
    assert fit.params == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("tokens, count", [(3e7, 2), (3e7, 7), (0.0, 6), (-1.0, 4)])
def test_a_probe_that_makes_no_sense_is_refused(tokens, count):
    with pytest.raises(UserError):
        probe_runs(tokens, count)


def test_the_law_is_chosen_by_what_varies_and_a_column_that_is_not_there_does_not():
    columns = {"D": [1e6, 3e6, 1e7, 1e6], "p": [0.0, 0.0, 0.01, 0.05], "L0": [3.0] * 4}
    table = Table.of(**{name: np.array(values) for name, values in columns.items()}, loss=np.array([3.1, 3.2, 3.2, 3.05]))
    choice = choose_law(table, response="pretraining")
    assert (choice.law.name, dict(choice.constraints.fixed)) == ("forgetting-fixed-n", {})
    alone = choose_law(table.select(table.columns["D"] == 1e6), response="pretraining")
    assert (alone.law.name, dict(alone.constraints.fixed)) == ("forgetting-fixed-n", {"beta": 0.0})
    bare = choose_law(table.select(table.columns["p"] == 0), response="pretraining")
    assert bare.law.name == "forgetting-fixed-n/no-p"
    for one, words in ((choice, "one model size"), (alone, "one number of target tokens"), (bare, "one share p")):
        assert words in one.why
    assert "one share" not in choice.why
    sized = Table({**table.columns, "N": np.array([1e7, 1e7, 1e8, 1e8])})
    whole = choose_law(sized, response="pretraining")
    assert (whole.law.name, whole.why) == ("bethune-forgetting", "")
    assert choose_law(sized.select(np.arange(4) % 3 < 2), response="pretraining").law.name == "bethune-forgetting"
    with pytest.raises(UserError, match="nothing to fit a law of forgetting to"):
        choose_law(table.select(np.arange(4) < 1), response="pretraining")


def test_the_law_of_the_target_loss_holds_what_does_not_vary():
    columns = {"N": np.array([1e7, 1e8, 1e8]), "D": np.array([1e6, 1e6, 3e6]), "loss": np.array([3.0, 2.9, 2.8])}
    held = {}
    for rows in ([0, 1, 2], [0, 1], [1, 2]):
        choice = choose_law(Table({name: values[rows] for name, values in columns.items()}), response="target")
        assert choice.law.name == "bethune-finetuning"
        held[tuple(rows)] = (dict(choice.constraints.fixed), choice.why == "")
    assert held == {(0, 1, 2): ({}, True), (0, 1): ({"beta": 0.0}, False), (1, 2): ({"alpha": 0.0}, False)}
    with pytest.raises(UserError, match="one size and one number of target tokens"):
        choose_law(Table({name: values[:1] for name, values in columns.items()}), response="target")


def test_the_end_of_what_the_data_can_answer_is_no_limit_of_the_law(known):
    """Forgetting grows with D without bound: a budget that is met ten times beyond the data says nothing of what lies further."""
    for unknown, asked in (("D", {"N": 1.27e9, "p": 0.05}), ("N", {"D": 1e5, "p": 0.05})):
        advice = solve(known, asked, unknown, max_forgetting=3.0)
        assert "the farthest that these data can answer for" in advice.words
        assert (
            solve(known, asked, unknown, max_forgetting=3.0, options=AdviceOptions(allow_extrapolation=True)).answer
            != advice.answer
        )


def test_an_easy_budget_is_answered_without_a_run_at_p_0():
    columns = paper_grid()
    some = columns["p"] > 0
    without = predictor(columns={name: values[some] for name, values in columns.items()})
    least = without.data_range["p"][0]
    advice = solve(without, RUN, "p", max_forgetting=5.0)
    assert least / 2 == pytest.approx(advice.answer)
    assert "the farthest" in advice.words
    harder = solve(without, RUN, "p", max_forgetting=0.08)
    assert harder.answer > least


@pytest.mark.parametrize("log", [False, True])
def test_a_budget_that_is_met_on_the_way_only_is_found(log):
    """The upper quantile of few draws need not be monotone."""
    found = _hardest_fine(lambda value: 0.02 <= value <= 0.04, 0.05, 0.001 if log else 0.0, log=log)
    assert found == pytest.approx(0.02, rel=2e-3)
    assert _hardest_fine(lambda value: False, 0.05, 0.001, log=log) is None
    assert _hardest_fine(lambda value: True, 0.05, 0.001, log=log) == 0.001


def test_a_flag_of_one_group_is_not_one_of_the_others():
    flags = [(("B[a]", "alpha"), "why"), (("beta[b]",), "because")]
    assert reasons_of(flags, "a") == {"B": "why", "alpha": "why"}
    assert reasons_of(flags, "b") == {"alpha": "why", "beta": "because"}
    assert reasons_of(flags, "") == {"alpha": "why"}
