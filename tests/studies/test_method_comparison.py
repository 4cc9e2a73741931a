"""Methods compared: what the table reads from runs whose losses are known, and the whole way from the recipe to the figure."""

import csv
import json

import pytest

from mlx_forget.errors import UserError
from mlx_forget.history import SCHEMA, HistoryWriter
from mlx_forget.records import SCHEMA_VERSION, find_runs
from mlx_forget.resources import recipe as find_recipe
from mlx_forget.studies.method_comparison import CSV_COLUMNS, _tokens_per_step, describe, load_trajectories, table, table_lines
from mlx_forget.sweeps.grid import read_recipe
from tests.fakes import add_fake_backend


def write_run(folder, losses, *, method="plain", seed=0, replay_tokens=0, **config):
    """A finished run with (target, pretraining) losses at steps 0, 10, 20, ..."""
    folder.mkdir(parents=True)
    with HistoryWriter(folder / "history.arrows") as history:
        for number, (target, pretrain) in enumerate(losses):
            row = dict.fromkeys(SCHEMA.names) | {"step": number * 10, "target_val_loss": target, "pretrain_val_loss": pretrain}
            history.append(row)
    data = {"code": {"role": "target", "tokens_seen": 1000}}
    if replay_tokens:
        data["replay:self"] = {"role": "replay", "tokens_seen": replay_tokens}
    record = {
        "schema_version": SCHEMA_VERSION, "run_id": folder.name, "seed": seed, "num_params": 1000, "forgetting_nats": 0.1, "data": data,
        "config": {"method": method, "p": "0", "replay_data": "self", "pretrain": "prose", "target": "code", **config},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))


PLAIN = [(5.0, 3.0), (4.5, 3.2), (4.0, 3.4), (4.1, 3.9)]
KEPT = [(5.0, 3.0), (4.3, 3.05), (4.03, 3.06), (4.02, 3.10)]


def test_the_table_reads_both_ways_and_averages_seeds(tmp_path):
    write_run(tmp_path / "a", PLAIN)
    write_run(tmp_path / "b", KEPT, method="kl-replay", coefficient=3.0, replay_tokens=250)
    write_run(tmp_path / "c", [(5.0, 3.0), (4.5, 3.0)], method="low-lr", coefficient=None)
    for name, method in (("d", "plain"), ("e", "kl-replay")):
        losses = [(t, 3.0 + 2 * (p - 3.0)) for t, p in (PLAIN if method == "plain" else KEPT)]
        write_run(tmp_path / name, losses, method=method, seed=1, coefficient=3.0 if method == "kl-replay" else None)
    write_run(tmp_path / "f", [(5.0, 3.0), (4.5, 3.0)], method="low-lr", seed=1)
    rows = {row.method: row for row in table(load_trajectories(list(find_runs(tmp_path))))}
    assert list(rows) == ["plain", "kl-replay", "low-lr"]
    plain, kl, low = rows.values()
    assert (plain.step, plain.target, plain.removed, plain.removed_within) == (20, 4.0, 0, pytest.approx(0))
    assert plain.forgetting == pytest.approx((0.4 + 0.8) / 2)
    assert plain.forgetting_sd == pytest.approx(0.4 / 2**0.5)
    assert kl.target_excess == pytest.approx(0.005)
    assert kl.removed == pytest.approx(0.75)
    assert kl.removed_sd == pytest.approx(0)
    assert kl.removed_within == pytest.approx(0.85), "step 20 is within 1% and has forgotten less than the minimum at step 30"
    assert kl.tokens_factor == pytest.approx(1.125)
    assert (low.removed, low.removed_within) == (1, None), "it forgets nothing, and never comes within 1%"
    text = "\n".join(table_lines(list(rows.values())))
    assert "KL replay, self-generated, c = 3" in text
    assert "lower rate, × 0.1" in text
    assert "75.0%" in text


def test_tokens_of_all_sources_of_a_role_count(tmp_path):
    write_run(tmp_path / "a", PLAIN, replay_tokens=250)
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    record["data"] |= {"code": {"role": "target", "tokens_seen": 900}, "cpp": {"role": "target", "tokens_seen": 100}}
    (tmp_path / "a" / "record.json").write_text(json.dumps(record))
    (trajectory,) = load_trajectories(find_runs(tmp_path))
    assert _tokens_per_step(trajectory) == 1.25


def test_decays_are_told_apart_and_compared_with_usual_plain_finetuning(tmp_path):
    write_run(tmp_path / "a", [(t, p + 1) for t, p in PLAIN], weight_decay=10.0)
    write_run(tmp_path / "b", PLAIN, weight_decay=0.1)
    write_run(tmp_path / "c", KEPT, method="anchored-adamw", coefficient=10.0, weight_decay=0.1)
    rows = {row.label: row for row in table(load_trajectories(list(find_runs(tmp_path))))}
    assert set(rows) == {"plain finetuning", "plain finetuning, decay 10", "anchored AdamW, λ = 10"}
    assert rows["plain finetuning"].removed == 0
    assert rows["anchored AdamW, λ = 10"].removed == pytest.approx(0.75)


def test_methods_are_chosen_by_a_limit_of_forgetting(tmp_path, run_forget):
    write_run(tmp_path / "s" / "a", PLAIN)
    write_run(tmp_path / "s" / "b", KEPT, method="kl-replay", coefficient=3.0)
    rows = {row.method: row for row in table(load_trajectories(list(find_runs(tmp_path / "s"))), max_forgetting=0.07)}
    assert (rows["plain"].target_under, rows["plain"].step_under) == (5.0, 0), "only the start is under the limit"
    assert (rows["kl-replay"].target_under, rows["kl-replay"].step_under) == (4.03, 20), "its minimum, at step 30, is over it"
    code, out, err = run_forget("plot", tmp_path / "s", "-o", tmp_path / "f", "--max-forgetting", "0.07")
    assert code == 0, err
    assert "Lowest of all: KL replay, self-generated, c = 3, 4.0300." in out
    assert "under 0.07" not in run_forget("plot", tmp_path / "s", "-o", tmp_path / "f")[1]
    for name in ("a", "b"):
        path = tmp_path / "s" / name / "record.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"config": record["config"] | {"max_forgetting": 0.3}}))
    assert "under 0.3 nats" in run_forget("plot", tmp_path / "s", "-o", tmp_path / "f")[1], "the runs' own limit"


def test_what_cannot_be_compared_is_said(tmp_path):
    write_run(tmp_path / "a" / "b", KEPT, method="kl-replay")
    with pytest.raises(UserError, match="Seed 0 has no run of method plain"):
        table(load_trajectories(list(find_runs(tmp_path / "a"))))
    write_run(tmp_path / "a" / "c", PLAIN)
    write_run(tmp_path / "a" / "d", PLAIN)
    with pytest.raises(UserError, match="same method and seed"):
        table(load_trajectories(list(find_runs(tmp_path / "a"))))
    with pytest.raises(UserError, match="no finished finetuning runs"):
        load_trajectories([])


def test_runs_are_described_by_what_they_replay():
    config = {"method": "ntp-replay", "p": "0", "replay_data": "stores/mine", "coefficient": 0.5}
    assert describe(config) == "NTP replay, stores/mine, c = 0.5"
    assert describe(config | {"replay_data": "pretrain", "p": "1%", "coefficient": None}) == "NTP replay, real data, p = 1%, c = 1"


def test_the_recipe_holds_the_papers_arms_and_each_is_another_run():
    recipe = read_recipe(find_recipe("replay"))
    configs = recipe.configs({"seed": [0, 1]})
    assert len(configs) == 2 * len(recipe.arms)
    arms = {(c.method, c.replay_data) for c in configs}
    assert {("plain", "self")} | {(m, d) for m in ("kl-replay", "ntp-replay") for d in ("self", "pretrain")} <= arms
    assert all(c.p == "0" for c in configs)


def test_rates_are_compared_at_the_target_loss_that_all_reach(run_forget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slow = [(5.0, 3.0), (4.8, 3.05), (4.6, 3.1), (4.2, 3.2)]
    write_run(tmp_path / "s" / "a", [(5.0, 3.0), (4.4, 3.3), (3.8, 3.9)], learning_rate=2e-3)
    write_run(tmp_path / "s" / "b", slow, learning_rate=5e-4)
    write_run(tmp_path / "s" / "c", [(5.0, 3.0), (4.0, 3.02)], method="kl-replay", learning_rate=2e-3)
    for name, rate in (("a", 2e-3), ("b", 5e-4), ("c", 2e-3)):
        path = tmp_path / "s" / name / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"learning_rate": rate}))
    code, out, err = run_forget("plot", "s", "-o", "f", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["target_val_loss"] == 4.2
    rows = {(row["label"].split(",")[0], row["learning_rate"]): row for row in answer["rows"]}
    assert [row["learning_rate"] for row in answer["rows"]] == [2e-3, 5e-4, 2e-3]
    fast = rows["plain finetuning", 2e-3]
    assert fast["step"] == pytest.approx(10 + 10 / 3)
    assert fast["forgetting"] == pytest.approx(0.3 + 0.6 / 3)
    assert rows["plain finetuning", 5e-4]["step"] == 30
    assert rows["KL replay", 2e-3]["forgetting"] == pytest.approx(0.016)
    assert (tmp_path / "f" / "s.png").stat().st_size > 10_000
    assert "first reaches 4.2000" in run_forget("plot", "s", "-o", "f")[1]
    write_run(tmp_path / "s" / "d", [(5.0, 3.0), (5.1, 3.3)], learning_rate=1e-9)
    path = tmp_path / "s" / "d" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"learning_rate": 1e-9}))
    code, _, err = run_forget("plot", "s", "-o", "f")
    assert code == 2
    assert "learnt nothing" in err


def test_adapters_are_a_method_of_their_own_beside_plain(tmp_path):
    lora = {
        "fine_tune_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_scaling": "alpha/r",
        "lora_target_modules": "all-linear",
    }
    config = {"method": "plain", "p": "0", **lora}
    assert describe(config) == "LoRA r = 16, all-linear, α/r, α = 32"
    assert describe(config | {"lora_scaling": "none", "learning_rate": 6e-3}) == "LoRA r = 16, all-linear, unscaled, rate 0.006"
    replayed = config | {"method": "kl-replay", "replay_data": "self", "coefficient": None, "fine_tune_type": "dora"}
    assert describe(replayed) == "DoRA r = 16, all-linear, α/r, α = 32: KL replay, self-generated, c = 1"
    write_run(tmp_path / "s" / "a", [(5.0, 3.0), (4.0, 3.5)])
    write_run(tmp_path / "s" / "b", [(5.0, 3.0), (4.1, 3.1)], **lora)
    plain, adapted = table(load_trajectories(list(find_runs(tmp_path / "s"))))
    assert (plain.method, adapted.method) == ("plain", "lora")
    assert adapted.removed == pytest.approx(0.8)


RECIPES = [
    "replay", "replay-lora", "anchors", "decay", "replay-learning-rate", "replay-model-size", "replay-pretrain-length", "replay-math-paper", "replay-spanish-paper"
]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_methods_hold_a_plain_run_and_smoke_scale(name, monkeypatch):
    recipe = read_recipe(find_recipe(name))
    configs = recipe.configs({})
    assert "plain" in {c.method for c in configs}
    assert {c.model for c in configs} <= {"0.16m", "0.3m", "qknorm-2x48"}
    assert max(c.iters for c in configs) <= 12
    assert len({str(c) for c in configs}) == len(configs)
    monkeypatch.delenv("FORGET_SCALE")
    whole = read_recipe(find_recipe(name)).configs({})
    assert len({str(c) for c in whole}) == len(whole) >= len(configs)
    assert min(c.iters for c in whole) >= 300


def write_slice(folder, losses, *, num_params=1000, iters=100, **config):
    write_run(folder, losses, base={"iters": iters, "batch_size": 4}, stop_target_loss=4.2, batch_size=10, **config)
    record = json.loads((folder / "record.json").read_text())
    record |= {"num_params": num_params, "num_steps": 10, "learning_rate": 1e-3}
    (folder / "record.json").write_text(json.dumps(record))


def test_slices_take_the_best_coefficient_that_reaches_the_target(tmp_path, run_forget):
    kl = {"method": "kl-replay", "replay_data": "pretrain"}
    for number, (params, rise) in enumerate([(1000, 0.4), (4000, 0.1)]):
        sizes = {"num_params": params, "model": f"{params}"}
        write_slice(tmp_path / "s" / f"a{number}", [(5.0, 3.0), (4.4, 3.0 + rise), (4.0, 3.0 + 2 * rise)], **sizes)
        write_slice(tmp_path / "s" / f"b{number}", [(5.0, 3.0), (4.2, 3.0 + rise / 4)], coefficient=1.0, **kl, **sizes)
        write_slice(tmp_path / "s" / f"c{number}", [(5.0, 3.0), (4.4, 3.0)], coefficient=10.0, **kl, **sizes)
    code, out, err = run_forget("plot", tmp_path / "s", "-o", tmp_path / "f", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["axis"], answer["target_val_loss"]) == ("model-size", 4.2)
    rows = {(row["label"], row["x"]): row for row in answer["rows"]}
    assert rows["plain finetuning", 1000]["forgetting"] == pytest.approx(0.6), "halfway between two evaluations"
    assert rows["plain finetuning", 4000]["forgetting"] == pytest.approx(0.15)
    best = rows["KL replay, real data", 1000]
    assert (best["forgetting"], best["coefficient"]) == (pytest.approx(0.1), 1.0)
    assert (best["num_reached"], best["num_runs"]) == (1, 2), "the strongest never reaches the target"
    assert (tmp_path / "f" / "s.png").stat().st_size > 10_000
    assert [row["learnt"] for row in answer["rows"]] == pytest.approx([5.0 - 4.2] * 4)
    out = run_forget("plot", tmp_path / "s", "-o", tmp_path / "f")[1]
    assert "1 of 2" in out
    assert "+0.125" in out, "0.1 nats forgotten of 0.8 learnt"


def test_the_length_of_pretraining_is_in_tokens_per_parameter(tmp_path, run_forget):
    for number, iters in enumerate((100, 400)):
        losses = [(5.0, 3.0 - number), (4.0, 3.2)]
        write_slice(tmp_path / "s" / f"a{number}", losses, iters=iters)
        write_slice(tmp_path / "s" / f"b{number}", losses, iters=iters, method="kl-replay")
    code, out, err = run_forget("plot", tmp_path / "s", "-o", tmp_path / "f", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["axis"] == "pretrain-length"
    assert [row["x"] for row in answer["rows"]] == [4, 16, 4, 16]
    for name in ("a0", "a1", "b0", "b1"):
        own = json.loads((tmp_path / "s" / name / "record.json").read_text())
        own["config"]["stop_target_loss"] = 3.9
        (tmp_path / "s" / name / "record.json").write_text(json.dumps(own))
    code, _, err = run_forget("plot", tmp_path / "s", "-o", tmp_path / "f")
    assert code == 2
    assert "No run reached the target loss 3.9" in err


@pytest.mark.parametrize("name", ["replay-math-paper", "replay-spanish-paper"])
def test_the_recipes_of_the_papers_own_scale_run_when_they_are_small(name, tmp_path, monkeypatch, run_forget):
    """Plain finetuning and the last arm, on PyTorch where it is there, then the figure."""
    from mlx_forget.backends import available_backends
    from mlx_forget.training.plan import plan_run
    from mlx_forget.training.run import execute

    if not available_backends():
        pytest.skip("needs a framework")
    monkeypatch.chdir(tmp_path)
    configs = read_recipe(find_recipe(name)).configs({"backend": available_backends()[-1], "num_threads": 1})
    for config in (configs[0], configs[-1]):
        execute(plan_run(config, folder=tmp_path / "sweep" / config.method))
    code, out, err = run_forget("plot", "sweep", "-o", "figures", "--json")
    assert code == 0, err
    assert [row["method"] for row in json.loads(out)["rows"]] == ["plain", "kl-replay"]


def test_a_recipe_becomes_a_table_and_a_figure(run_forget, tmp_path, monkeypatch):
    """Two arms of the recipe in this process, then the plot."""
    from mlx_forget.training.plan import plan_run
    from mlx_forget.training.run import execute

    add_fake_backend(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for config in read_recipe(find_recipe("replay")).configs({"backend": "fake"})[:2]:
        execute(plan_run(config, folder=tmp_path / "sweep" / config.method))
    code, out, err = run_forget("plot", "sweep", "-o", "figures", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["plain", "kl-replay"]
    for suffix in ("png", "pdf"):
        assert (tmp_path / "figures" / f"sweep.{suffix}").stat().st_size > 10_000
    with (tmp_path / "figures" / "sweep.csv").open() as file:
        table_rows = list(csv.DictReader(file))
    assert tuple(table_rows[0]) == CSV_COLUMNS
    assert len(table_rows) == 2 * 4
    assert run_forget("plot", "sweep", "--kind", "figure2")[0] == 2


def test_an_injection_of_nothing_is_plain_finetuning(tmp_path):
    write_run(tmp_path / "a", PLAIN, method="injection", p="0")
    write_run(tmp_path / "b", KEPT, method="injection", p="1%")
    rows = {row.label: row for row in table(load_trajectories(list(find_runs(tmp_path))))}
    assert set(rows) == {"plain finetuning", "injection, p = 1%"}
    assert rows["injection, p = 1%"].removed > 0.5
