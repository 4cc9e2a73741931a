"""Sweeps with real processes at smoke scale, and the figure that comes of them."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_forget.backends import available_backends
from mlx_forget.errors import UserError
from mlx_forget.resources import recipe as find_recipe
from mlx_forget.runs.missing import PLANNED
from mlx_forget.studies.figure1 import CSV_COLUMNS
from mlx_forget.sweeps.grid import Recipe, read_recipe

pytestmark = pytest.mark.skipif(not available_backends(), reason="a sweep needs a framework")

SETTINGS = ["--set", "p=[0, 5%]", "--set", "iters=12"]


def sweep(folder, *more):
    return [sys.executable, "-m", "mlx_forget", "sweep", "figure1", "--output", str(folder), *SETTINGS, *more]


def losses(folder):
    records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*/record.json"))]
    return {record["run_id"]: record["losses"] for record in records}


@pytest.fixture(scope="module")
def done(tmp_path_factory, cache_folder):
    folder = tmp_path_factory.mktemp("sweep") / "figure1"
    result = subprocess.run(sweep(folder, "--json"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_a_sweep_trains_its_base_and_every_run_and_says_where(done):
    folder, outcome = done
    assert [row["state"] for row in outcome["runs"]] == ["done"] * 3
    assert len(losses(folder)) == 2


def test_a_second_sweep_trains_nothing(done):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    result = subprocess.run(sweep(folder), capture_output=True, text=True)
    assert result.returncode == 0
    assert "3 of 3 runs done" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_sweep_ends_with_the_numbers_of_an_uninterrupted_one(done, tmp_path, number, code):
    process = subprocess.Popen(sweep(tmp_path / "s", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2400):
        if list((tmp_path / "s").glob("*/checkpoints/last")):
            break
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    if number == signal.SIGINT:
        answer = json.loads(out)
        assert (answer["status"], answer["folder"]) == ("interrupted", str(tmp_path / "s"))
        assert "interrupted" in {run["state"] for run in answer["runs"]}
    assert len(losses(tmp_path / "s")) < 2, "the sweep ended before it could be interrupted"
    result = subprocess.run(sweep(tmp_path / "s"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "s") == losses(done[0])


def test_a_stacked_sweep_ends_with_the_losses_of_one_by_one(done, tmp_path):
    result = subprocess.run(sweep(tmp_path / "s", "--stack", "2"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Up to 2 runs of one shape are trained as one." in result.stderr
    stacked, alone = losses(tmp_path / "s"), losses(done[0])
    assert set(stacked) == set(alone)
    for run_id, rows in alone.items():
        for name, row in rows.items():
            for key, value in row.items():
                assert stacked[run_id][name][key] == pytest.approx(value, abs=1e-4), (run_id, name, key)
    sizes = [json.loads(path.read_text())["stack_size"] for path in (tmp_path / "s").glob("*/record.json")]
    assert sizes == [2, 2]


@pytest.mark.full
def test_an_interrupted_stacked_sweep_goes_on_one_by_one(done, tmp_path):
    process = subprocess.Popen(sweep(tmp_path / "s", "--stack", "2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2400):
        if len(list((tmp_path / "s").glob("*/checkpoints/last"))) == 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert not losses(tmp_path / "s"), "the sweep ended before it could be interrupted"
    result = subprocess.run(sweep(tmp_path / "s", "--stack", "off"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for run_id, rows in losses(done[0]).items():
        assert losses(tmp_path / "s")[run_id]["best"]["target_val"] == pytest.approx(rows["best"]["target_val"], abs=1e-4)


@pytest.mark.parametrize("value", ["0", "many", "-3"])
def test_a_wrong_stack_size_is_refused(run_forget, value):
    code, _, err = run_forget("sweep", "figure1", f"--stack={value}", "--dry-run")
    assert code == 2
    assert "--stack takes auto, off or a number of runs" in err


def test_figure1_draws_writes_and_prints_what_the_runs_say(done, tmp_path, run_forget):
    folder, _ = done
    code, out, err = run_forget("plot", folder, "--output", tmp_path, "--name", "f", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["p"] for row in rows] == [0, 0.05]
    best = losses(folder)[rows[0]["run_id"]]
    assert rows[0]["target_val_loss"] == pytest.approx(best["best"]["target_val"])
    assert rows[0]["forgetting_nats"] == pytest.approx(best["best"]["pretrain_val"] - best["start"]["pretrain_val"])
    assert rows[0]["ratio_to_p0"] == 1
    with (tmp_path / "f.csv").open() as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == CSV_COLUMNS
    assert len(written) == 2 * 3
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")
    (tmp_path / "s").mkdir()
    for run in folder.glob("*-*"):
        shutil.copytree(run, tmp_path / "s" / run.name)
    lost = next(run for run in (tmp_path / "s").iterdir() if run.name.startswith(rows[1]["run_id"]))
    shutil.copyfile(folder / PLANNED, tmp_path / "s" / PLANNED)
    (lost / "record.json").unlink()
    code, out, err = run_forget("plot", tmp_path / "s", "--output", tmp_path, "--name", "g", "--json")
    assert code == 0, err
    (missing,) = json.loads(out)["missing"]
    assert missing["folder"] == lost.name
    assert missing["title"] in err
    code, out, err = run_forget("plot", folder, "--output", tmp_path)
    assert "5%" in out
    assert "not in this figure" not in err


def test_a_failing_run_fails_the_sweep_and_shows_its_log(tmp_path):
    result = subprocess.run(sweep(tmp_path, "--set", "learning_rate=1e30"), capture_output=True, text=True)
    assert result.returncode == 1
    assert "diverged" in result.stderr
    assert "log.txt" in result.stderr


def test_plot_wants_finished_finetunes(run_forget, tmp_path):
    code, _, err = run_forget("plot", tmp_path, "--output", tmp_path / "none" / "figures")
    assert not (tmp_path / "none").exists(), "nothing is left of a refused figure"
    assert code == 2
    assert "no finished finetuning runs" in err


def test_grids_are_every_combination_and_settings_replace_or_add_axes():
    recipe = Recipe("r", {"iters": 5, "base": {"iters": 7}}, {"p": [0, "1%"], "seed": [0, 1]})
    assert [(c.p, c.seed) for c in recipe.configs({})] == [("0", 0), ("0", 1), ("1%", 0), ("1%", 1)]
    assert [(c.p, c.seed, c.iters) for c in recipe.configs({"seed": 3, "iters": [8, 9]})] == [
        ("0", 3, 8), ("0", 3, 9), ("1%", 3, 8), ("1%", 3, 9)
    ]  # fmt: skip
    assert dict(recipe.configs({"base": {"batch_size": 2}})[0].base) == {"iters": 7, "batch_size": 2}


@pytest.mark.parametrize(
    "content, message",
    [("grids: {}", "Did you mean 'grid'"), ("grid: {ps: [1]}", "Unknown recipe key 'ps'"), ("grid: {p: []}", "empty"),
     ("grid: {p: 1%}", "must be a list"), ("[1, 2]", "mapping")],
)  # fmt: skip
def test_a_wrong_recipe_is_refused(run_forget, tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    code, _, err = run_forget("sweep", tmp_path / "r.yaml", "--dry-run")
    assert code == 2
    assert message in err


def test_a_dry_run_prints_every_run_and_trains_nothing(run_forget, tmp_path):
    code, out, _ = run_forget("sweep", "figure1", "--output", tmp_path / "s", "--dry-run", "--json")
    assert code == 0
    rows = json.loads(out)["runs"]
    assert len(rows) == 5
    assert all(row["num_tokens"] > 0 and row["train_flops"] > 0 for row in rows)
    assert not (tmp_path / "s").exists()
    _, out, _ = run_forget("sweep", "figure1", "--output", tmp_path / "s", "--dry-run", "--stack", "4", "--json")
    assert [len(run_ids) for run_ids in json.loads(out)["stacks"]] == [4]


def test_the_recipe_that_comes_with_the_package_is_found_by_name():
    assert [config.p for config in read_recipe(find_recipe("figure1")).configs({})] == ["0", "0.1%", "1%", "5%"]
    with pytest.raises(UserError, match="Did you mean 'figure1'"):
        find_recipe("figure2")
