"""The rank study: the line and the joint law on points whose truth is known, and the figure of a small sweep."""

import json

import numpy as np
import pytest

from mlx_forget.adapters import num_trainable
from mlx_forget.backends import available_backends
from mlx_forget.config import SMOKE
from mlx_forget.errors import UserError
from mlx_forget.laws.forms import get_law
from mlx_forget.resources import recipe as find_recipe
from mlx_forget.studies import rank_study
from mlx_forget.studies.rank_study import Point
from mlx_forget.sweeps.grid import read_recipe

TRUE_LINE = (1.7, 5.0)
FLOOR = 1.25


def point(run, L_ft, L_f, *, step=100, P=1000, on_all=True, arm=None, fitted=True):
    arm = arm or f"rank {P}"
    numbers = {"L_ft": L_ft, "L_f": L_f, "L_f_hard": L_f, "kl": L_f - FLOOR, "agreement": 0.9, "pretrain_val": 3.0}
    return Point("code", arm, on_all, 1, 0, run, P, step, fitted=fitted, **numbers)


def study(noise=0.0):
    rng = np.random.default_rng(0)
    slope, intercept = TRUE_LINE
    points = []
    for number in range(8):
        for step in range(60, 260, 20):
            x = 2.0 - 0.1 * number - 0.002 * step
            points.append(point(f"run{number}", x, intercept - slope * x + noise * rng.normal(), step=step, P=1000 * 2**number))
        # Before the warm-up ends, anything may happen.
        points.append(point(f"run{number}", 3.0, 9.0, step=10, P=1000 * 2**number, fitted=False))
    return points


def test_an_exact_line_is_found_exactly():
    (line,) = rank_study.fit_lines(study())
    assert (line.slope.value, line.intercept.value) == pytest.approx(TRUE_LINE)
    assert line.r_squared.value == pytest.approx(1)
    assert (line.num_runs, line.num_points) == (8, 80)
    assert line.floor == pytest.approx(FLOOR)


def test_intervals_of_a_noisy_line_hold_the_truth_and_widen_with_noise():
    (little,), (much,) = (rank_study.fit_lines(study(noise)) for noise in (0.02, 0.2))
    assert little.slope.low < TRUE_LINE[0] < little.slope.high
    assert much.slope.high - much.slope.low > 3 * (little.slope.high - little.slope.low)
    assert much.r_squared.value < little.r_squared.value < 1


def test_two_runs_have_no_interval():
    (line,) = rank_study.fit_lines([p for p in study() if p.run in ("run0", "run1")])
    assert line.slope.low is None
    with pytest.raises(UserError, match="needs three"):
        rank_study.fit_lines(study()[:2])


def test_other_arms_are_held_against_the_line_and_do_not_move_it():
    slope, intercept = TRUE_LINE
    others = [point("f", x, intercept - slope * x + 0.3, on_all=False, arm="all weights") for x in (1.5, 1.4, 1.3)]
    lines = rank_study.fit_lines(study() + others)
    assert lines[0].slope.value == pytest.approx(slope)
    (beside,) = rank_study.hold_beside(study() + others, lines)
    assert beside.arm == "all weights"
    assert beside.excess == pytest.approx(0.3)
    assert beside.r_squared < 0


def test_the_joint_law_describes_data_of_its_own_form():
    law = get_law("kalajdzievski-forgetting")
    truth = {"a": 300.0, "b": 20.0, "alpha": 0.3, "beta": 0.5, "rho": 2.0, "s": 4.0}
    points = []
    for number in range(6):
        for step in range(60, 260, 40):
            L_f = float(law.predict(truth, {"P": np.array([1000.0 * 3**number]), "steps": np.array([float(step)])})[0])
            points.append(point(f"run{number}", (TRUE_LINE[1] - L_f) / TRUE_LINE[0], L_f, step=step, P=1000 * 3**number))
    found = {fit.response: fit for fit in rank_study.fit_joint(points)}
    assert found["L_f"].r_squared > 0.9999
    assert found["L_ft"].r_squared > 0.9999
    assert rank_study.fit_joint([p for p in points if p.P == 1000]) == []


# Table 1 of the paper: what its fits found on Llama-2-7B-chat, P = 2.4986M a rank. Both laws have their own a, b, alpha and beta.
PUBLISHED = {
    "openorca": {
        "line": (1.7334, 2.0481),
        "target": {"a": 0.0007e7, "b": 72.9186, "alpha": 0.0424, "beta": 0.1219},
        "forgetting": {"a": 0.0388e7, "b": 23.6418, "alpha": 0.0351, "beta": 0.1468},
        "shared": (0.0020, 7.6885, 0.6126),
    },
    "news": {
        "line": (1.0615, 3.1285),
        "target": {"a": 0.0022e7, "b": 54.8678, "alpha": 0.0383, "beta": 0.1161},
        "forgetting": {"a": 0.0011e7, "b": 97.8466, "alpha": 0.0458, "beta": 0.1044},
        "shared": (0.0028, 7.5996, 1.9253),
    },
}


@pytest.mark.parametrize("target", PUBLISHED)
def test_the_published_laws_are_found_again_in_noisy_losses_made_by_them(target):
    published = PUBLISHED[target]
    (slope, intercept), (c, rho, s) = published["line"], published["shared"]

    def power(law, P, step):
        return c * ((law["a"] / P) ** law["alpha"] + (law["b"] / step) ** law["beta"]) ** rho

    rng, points, exact = np.random.default_rng(0), [], []
    for rank in (8, 16, 32, 64, 128, 256):
        for step in range(60, 261, 10):
            P = 2_498_560 * rank
            L_ft = power(published["target"], P, step) + s
            L_f = intercept - slope * s - slope * power(published["forgetting"], P, step)
            exact.append((L_ft, L_f))
            noise = rng.normal(0, 0.003, 2)
            points.append(point(f"run{rank}", L_ft + noise[0], L_f + noise[1], step=step, P=P))
    (line,) = rank_study.fit_lines(points)
    # Two laws that were fitted apart, so a line is not quite what they say of each other.
    assert line.slope.low < slope < line.slope.high
    assert line.slope.value == pytest.approx(slope, rel=0.03)
    assert line.r_squared.value > 0.96
    for fit, number in zip(rank_study.fit_joint(points), (0, 1), strict=True):
        assert fit.r_squared > 0.97
        law = get_law("kalajdzievski-finetuning" if number == 0 else "kalajdzievski-forgetting")
        columns = {"P": np.array([p.P for p in points], float), "steps": np.array([p.step for p in points], float)}
        # Where both exponents are near 0, amplitudes and rho trade; what is predicted is determined.
        np.testing.assert_allclose(law.predict(fit.params, columns), [pair[number] for pair in exact], atol=0.006)


def test_a_small_sweep_is_drawn_and_fitted(run_forget, tmp_path):
    backend = available_backends()[0]
    recipe = tmp_path / "ranks.yaml"
    lora = "fine_tune_type: lora, lora_alpha: 1, lora_scaling: alpha/sqrt(r), lora_target_modules: all-linear"
    config = {**SMOKE, "backend": backend, "method": "plain", "compare_to_start": True, "learning_rate": 5e-3, "iters": 12}
    recipe.write_text(
        f"config: {json.dumps({**config, 'steps_per_eval': 4})}\n"
        f"arms:\n  one: {{{lora}, lora_rank: 1}}\n  four: {{{lora}, lora_rank: 4}}\n  all: {{fine_tune_type: full}}\n"
    )
    code, _, err = run_forget("sweep", recipe, "--output", tmp_path / "runs")
    assert code == 0, err
    code, out, err = run_forget("plot", tmp_path / "runs", "--output", tmp_path / "figures", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [line["num_runs"] for line in found["lines"]] == [2]
    assert found["lines"][0]["slope"]["value"] > 0
    assert [row["arm"] for row in found["beside"]] == ["all weights"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"runs.png", "runs.pdf", "runs.csv"}
    assert (tmp_path / "figures/runs.csv").read_text().count("\n") == 1 + 3 * 4
    arguments = (
        "--law",
        "kalajdzievski-linear",
        "--evaluations",
        "--where",
        'lora_target_modules == "all-linear"',
        "--bootstrap",
        "20",
        "--json",
    )
    code, out, err = run_forget("fit", tmp_path / "runs", *arguments)
    assert code == 0, err
    assert json.loads(out)["num_rows"] == 6
    # Laws of models that train all their weights do not take runs with adapters for such.
    _, _, err = run_forget("fit", tmp_path / "runs", "--law", "bethune-forgetting")
    assert "trained with lora" in err


def test_runs_without_the_comparison_are_refused(run_forget, tmp_path):
    with pytest.raises(UserError, match="--compare-to-start"):
        rank_study.load_points([])


def test_the_recipes_are_the_papers_study(monkeypatch):
    monkeypatch.delenv("FORGET_SCALE")
    paper = read_recipe(find_recipe("kalajdzievski/llama-2-7b-chat")).configs({})
    ranks = [c.lora_rank for c in paper if c.lora_target_modules == "all-linear"]
    assert ranks == [8, 16, 32, 64, 128, 256]
    assert {(c.optimizer, c.batch_size, c.max_seq_length, c.iters) for c in paper} == {("adafactor", 32, 512, 260)}
    # 2.4986M parameters a rank in Llama-2-7B: 32 blocks of 4 square maps of 4,096 and 3 of 4,096 x 11,008.
    block = {f"model.layers.0.a{i}": (4096, 4096) for i in range(4)} | {f"model.layers.0.m{i}": (4096, 11008) for i in range(3)}
    assert 32 * num_trainable(block, paper[0].adapter()) == pytest.approx(2.4986e6 * 8, rel=1e-4)
    assert all(c.adapter().scale == pytest.approx(c.lora_rank**-0.5) for c in paper)
    laptop = read_recipe(find_recipe("kalajdzievski/laptop")).configs({})
    assert {c.lora_rank for c in laptop if c.lora_target_modules == "all-linear"} == {1, 2, 4, 8, 16, 32, 64}
    assert {c.fine_tune_type for c in laptop} == {"lora", "full"}
    assert {c.model for c in laptop} == {"2x256"}
    assert all(c.compare_to_start for c in paper + laptop)
