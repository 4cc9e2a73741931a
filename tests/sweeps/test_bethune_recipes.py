"""The paper's protocol as recipes: what each says at full scale, and that each runs dry at smoke scale, offline."""

import json

import pytest

from mlx_forget.ladder import default_context, model_spec
from mlx_forget.pipeline import recipes as corpora
from mlx_forget.resources import path, recipe
from mlx_forget.schedule import Schedule
from mlx_forget.sweeps.grid import read_recipe
from mlx_forget.sweeps.sweep import plan_sweep

NAMES = sorted(f"bethune/{file.stem}" for file in path("recipes", "bethune").glob("*.yaml"))
SIZES = ("tiny", "small", "medium", "large", "xl")


@pytest.fixture
def at_scale(monkeypatch):
    """Recipes as they are without FORGET_SCALE."""
    monkeypatch.delenv("FORGET_SCALE")


@pytest.mark.usefixtures("at_scale")
def test_five_sizes_make_the_fifteen_hundred_runs_of_the_paper():
    configs = [config for size in SIZES for config in read_recipe(recipe(f"bethune/{size}")).configs({})]
    assert len(configs) == 1500
    assert {config.model for config in configs} == set(SIZES)
    assert {config.target_tokens for config in configs} == {300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000}
    assert {config.p for config in configs} == {"0", "0.1%", "0.5%", "1%", "5%"}
    assert {config.iters for config in configs} == {12_000}
    assert len({config.target for config in configs}) == 12
    assert {config.base_config().tokens_per_param for config in configs} == {100}


@pytest.mark.usefixtures("at_scale")
def test_every_run_has_the_devices_of_the_paper():
    asked = {size: {point.resources.num_ranks for point in read_recipe(recipe(f"bethune/{size}")).runs()} for size in SIZES}
    assert asked == {"tiny": {1}, "small": {1}, "medium": {4}, "large": {8}, "xl": {8}}
    for name in NAMES:
        for point in read_recipe(recipe(name)).runs():
            assert point.resources.gpus == max(asked[point.config.model])
            assert point.config.batch_size % point.resources.num_ranks == 0


@pytest.mark.usefixtures("at_scale")
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_whole_at_the_papers_scale(name):
    configs = read_recipe(recipe(name)).configs({})
    for config in configs:
        # Every corpus is one that `forget prepare` knows, and every shape one of the ladder.
        assert {config.target, config.pretrain} <= set(corpora.names())
        assert model_spec(config.model, 32_000, 1024).context_length == default_context(config.model) == config.max_seq_length
        assert config.base_config().batch_size == config.batch_size == 112
        Schedule(peak=1.0, num_steps=config.iters, decay=config.lr_schedule or "constant", warmup_fraction=config.warmup)
    assert len({str(config) for config in configs}) == len(configs)


def test_what_is_not_in_the_sources_is_marked():
    for name in NAMES:
        lines = recipe(name).read_text().splitlines()
        for key in ("batch_size: 112", "learning_rate: ", "precision: bf16", "max_seq_length: 1024"):
            for line in lines:
                if line.strip().startswith(key) and "auto" not in line:
                    assert "# chosen" in line, f"{name}: {line}"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("bethune/xl", "bethune/weight-decay") else pytest.mark.full) for n in NAMES]
)
def test_every_recipe_runs_dry_offline(name, run_forget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A dry run prepares nothing, and what is not prepared has no name yet.
    plan_sweep(read_recipe(recipe(name)), tmp_path)
    code, out, err = run_forget("sweep", name, "--dry-run", "--json")
    assert code == 0, err
    runs = json.loads(out)["runs"]
    assert len(runs) == 1 + len(read_recipe(recipe(name)).configs({}))
    assert len({run["run_id"] for run in runs}) == len(runs)
