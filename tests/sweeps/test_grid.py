"""What runs a recipe stands for: grids, lists, zips, dotted axes, resources, and what is refused."""

import pytest

from mlx_forget.config import SMOKE, TrainConfig
from mlx_forget.errors import UserError
from mlx_forget.resources import recipe as find_recipe
from mlx_forget.sweeps.grid import Recipe, Resources, read_recipe, titles


def recipe(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    return read_recipe(tmp_path / "r.yaml")


def test_lists_zips_and_grids_multiply_and_arms_run_them_all(tmp_path):
    read = recipe(
        tmp_path,
        """
config: {iters: 5}
arms: {a: {method: plain}, b: {method: low-lr}}
list: [{target: code}, {target: math, p: 0}]
zip: {model: [0.16m, 0.65m], batch_size: [8, 16]}
grid: {seed: [0, 1, 2]}
""",
    )
    configs = read.configs({})
    assert len(configs) == 2 * 2 * 2 * 3
    assert {(c.model, c.batch_size) for c in configs} == {("0.16m", 8), ("0.65m", 16)}
    assert {c.target for c in configs} == {"code", "math"}
    assert {c.method for c in configs} == {"plain", "low-lr"}


def test_several_zips_are_several_axes(tmp_path):
    read = recipe(tmp_path, "zip: [{iters: [1, 2], seed: [3, 4]}, {p: [0, 1%], pretrain_epochs: [1, 2]}]")
    assert [(c.iters, c.seed, c.p, c.pretrain_epochs) for c in read.configs({})] == [
        (1, 3, "0", 1), (1, 3, "1%", 2), (2, 4, "0", 1), (2, 4, "1%", 2)
    ]  # fmt: skip


def test_a_dotted_axis_reaches_the_base_and_aliases_are_the_keys_they_stand_for(tmp_path):
    read = recipe(tmp_path, "config: {base: {max_steps: 7, batch_size: 4}}\ngrid: {base.seed: [0, 1], base.iters: [9]}\nsmoke: {}")
    assert [dict(c.base) for c in read.configs({})] == [
        {"iters": 9, "batch_size": 4, "seed": 0},
        {"iters": 9, "batch_size": 4, "seed": 1},
    ]
    assert [c.p for c in read.configs({"replay-ratio": ["1%", "2%"]})] == ["1%", "2%"] * 2


def test_an_override_takes_its_key_off_every_axis(tmp_path):
    read = recipe(tmp_path, "zip: {iters: [1, 2], seed: [3, 4]}\nlist: [{p: 0, target: code}, {p: 1%, target: math}]")
    assert [(c.iters, c.seed, c.p, c.target) for c in read.configs({"seed": 9, "p": "5%"})] == [
        (1, 9, "5%", "code"), (1, 9, "5%", "math"), (2, 9, "5%", "code"), (2, 9, "5%", "math")
    ]  # fmt: skip


def test_resources_go_with_the_run_and_not_into_its_configuration(tmp_path):
    read = recipe(tmp_path, "config: {resources: {threads: 2}}\nzip: {model: [small, xl], resources.gpus: [1, 8]}")
    assert [(p.config.model, p.resources) for p in read.runs()] == [
        ("small", Resources(threads=2, gpus=1.0)),
        ("xl", Resources(threads=2, gpus=8.0)),
    ]
    assert [p.resources.num_ranks for p in read.runs()] == [1, 8]


def test_runs_are_called_by_the_keys_in_which_they_differ(tmp_path):
    points = recipe(tmp_path, "config: {base: {iters: 3}}\ngrid: {p: [0, 1%], base.seed: [0, 1]}").runs()
    assert titles(points)[-1] == "p = 1%, base.seed = 1"
    assert titles(points[:1]) == ["p = 0"]


def test_runs_of_arms_are_called_by_the_arm_and_by_what_differs_within_it(tmp_path):
    arms = "arms: {plain: {method: plain}, 'kept, stronger': {method: kl-replay, coefficient: 3}}"
    assert titles(recipe(tmp_path, arms).runs()) == ["plain", "kept, stronger"]
    both = recipe(tmp_path, f"{arms}\ngrid: {{seed: [0, 1]}}").runs()
    assert titles(both) == ["plain, seed = 0", "plain, seed = 1", "kept, stronger, seed = 0", "kept, stronger, seed = 1"]


def test_the_smoke_scale_lays_its_axes_over(tmp_path):
    text = "zip: {iters: [100, 200], seed: [0, 1]}\nsmoke: {zip: {iters: [1], seed: [5]}, grid: {p: [0]}}"
    assert [(c.iters, c.seed, c.p) for c in recipe(tmp_path, text).configs({})] == [(1, 5, "0")]


def test_a_recipe_that_says_nothing_of_the_smoke_scale_has_its_defaults(tmp_path, monkeypatch):
    text = "config: {target: code, max_steps: 7, base: {seed: 3}}"
    config = recipe(tmp_path, text).configs({})[0]
    assert (config.iters, config.model, config.vocab_size) == (7, SMOKE["model"], SMOKE["vocab_size"]), "what it gives stays"
    assert config.base == SMOKE["base"] | {"seed": 3}
    monkeypatch.delenv("FORGET_SCALE")
    config = recipe(tmp_path, text).configs({})[0]
    assert (config.iters, config.model, config.base) == (7, TrainConfig.model, {"seed": 3})


def test_every_shipped_recipe_names_its_smoke_scale():
    folder = find_recipe("figure1").parent
    for path in [*folder.glob("*.yaml"), *(folder / "bethune").glob("*.yaml"), *(folder / "kalajdzievski").glob("*.yaml")]:
        configs = read_recipe(path).configs({}) if not read_recipe(path).stages else []
        assert all(config.iters <= 24 and config.base_config().iters <= 32 for config in configs), path


@pytest.mark.parametrize(
    "text, message",
    [
        ("grid: {sede: [1]}", "Did you mean 'seed'"),
        ("grid: {base.sede: [1]}", "Unknown base key 'sede'. Did you mean 'seed'"),
        ("grid: {resources.gpu: [1]}", "Did you mean 'gpus'"),
        ("grid: {seed.x: [1]}", "seed is not a mapping"),
        ("grid: {seed: []}", "Grid axis 'seed' is empty"),
        ("list: []", "'list' is empty"),
        ("zip: {p: [], seed: []}", "is empty"),
        ("zip: {p: [0, 1%], seed: [1]}", "of one length: 'p' has 2, 'seed' has 1"),
        ("zip: [1]", "zip must be"),
        ("grids: {p: [0]}", "Unknown recipe key 'grids'. Did you mean 'grid'"),
        ("grid: [p]", "grid must be a mapping of keys to values"),
        ("smoke: {config: [1]}", "what smoke changes must be mappings"),
        ("grid: {p: 1%}", "grid axis 'p' must be a list of values"),
        ("arms: {plain: none}", "arm 'plain' must be a mapping of keys to values"),
        ("stages: {target: code}", "stages must be a list of mappings"),
        ("list: {p: 0}", "list must be"),
        ("zip: {p: [0], seed: [1]}\ngrid: {seed: [1, 2]}", "'seed' is on two axes"),
        ("config: {base: {iters: 3}, base.iters: 4}", "given twice"),
        ("config: {resources: {gpus: 1.5}}", "whole number or a fraction of one GPU"),
        ("config: {resources: {threads: 0}}", "at least 1"),
    ],
)
def test_what_cannot_be_a_grid_is_refused(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        recipe(tmp_path, text).runs()
    assert message in str(error.value)


def test_overrides_may_be_nested_or_dotted():
    read = Recipe("r", {"base": {"iters": 7}}, {})
    assert read.configs({"base": {"seed": 1}}) == read.configs({"base.seed": 1})
