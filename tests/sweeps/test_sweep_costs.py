"""What a sweep says before it spends anything: costs, what is pending, what cannot work; and which wrong requests it refuses."""

import importlib.util
import json
import os
import shutil
import socket
import time

import pytest

from mlx_forget.costs import DEVICES
from mlx_forget.ladder import model_spec, num_params
from mlx_forget.sweeps.costs import Speed, check_disk, disk_needed, hours_text, size_text
from tests.bigrams import CONFIG
from tests.fakes import add_fake_backend


@pytest.fixture(autouse=True)
def bigram(monkeypatch):
    add_fake_backend(monkeypatch, "bigram")


def recipe(tmp_path, **content):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"config": CONFIG, "grid": {}, **content}))
    return path


def test_a_dry_run_prepares_nothing_and_leaves_ids_pending(run_forget, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGET_HOME", str(tmp_path / "home"))
    path = recipe(tmp_path, grid={"p": [0, "5%"]})
    code, out, err = run_forget("sweep", path, "--output", tmp_path / "s", "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert [row["run_id"] for row in plan["runs"]] == [None] * 3
    assert [row["num_tokens"] for row in plan["runs"]] == [12 * 4 * 32] * 3
    assert all(row["train_flops"] > 0 and row["kept_disk_bytes"] > 0 and row["pending"] for row in plan["runs"])
    assert "Not prepared yet" in plan["notes"][0]
    assert not list((tmp_path / "home").rglob("*.arrow"))
    assert not (tmp_path / "s").exists()
    assert "FORGET_SCALE=smoke: the recipe's test" in err
    code, out, _ = run_forget("sweep", path, "--dry-run")
    assert sum(line.startswith("pending ") for line in out.splitlines()) == 3


def test_a_dry_run_says_how_many_gpus_a_run_has(run_forget, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGET_HOME", str(tmp_path / "home"))
    path = recipe(tmp_path, config=CONFIG | {"resources": {"gpus": 4}})
    hours = []
    for options, gpus in (((), 4), (("--gpus", 1), 1)):
        code, out, err = run_forget("sweep", path, "--dry-run", "--json", "--on", "h100", *options)
        assert code == 0, err
        assert [row["num_gpus"] for row in json.loads(out)["runs"]] == [gpus] * 2
        hours.append(json.loads(out)["totals"]["hours"])
    assert hours[1] == pytest.approx(4 * hours[0])
    _, out, _ = run_forget("sweep", path, "--dry-run")
    assert sum(line.endswith(" on 4 GPUs") for line in out.splitlines()) == 2


def test_a_pending_run_costs_what_it_costs_once_its_data_are_there(run_forget, tmp_path, monkeypatch, cache_folder):
    path = recipe(tmp_path, grid={"p": ["5%"]})
    home = os.environ["FORGET_HOME"]
    plans = []
    for folder in (tmp_path / "home", home):
        monkeypatch.setenv("FORGET_HOME", str(folder))
        if folder == home:
            # Whatever prepares the data first.
            from mlx_forget.sweeps.grid import read_recipe
            from mlx_forget.sweeps.sweep import plan_sweep

            plan_sweep(read_recipe(path), tmp_path / "s")
        code, out, err = run_forget("sweep", path, "--output", tmp_path / "s", "--dry-run", "--json", "--on", "h100")
        assert code == 0, err
        plans.append(json.loads(out))
    keys = ("num_params", "num_steps", "num_tokens", "train_flops", "disk_bytes", "kept_disk_bytes", "state")
    pending, planned = ([{key: row[key] for key in keys} for row in plan["runs"]] for plan in plans)
    assert pending == planned
    assert planned[0]["num_params"] == num_params(model_spec("0.16m", 512, 32))
    assert all(row["hours"] > 0 and "assumed: 40% of" in row["rate"] for row in plans[1]["runs"])
    totals = plans[1]["totals"]
    assert totals["hours"] == pytest.approx(sum(row["hours"] for row in plans[1]["runs"]))
    assert totals["disk_bytes"] > sum(row["kept_disk_bytes"] for row in plans[1]["runs"])


def test_hours_are_those_of_the_finished_run_nearest_in_size():
    small, large = model_spec("0.16m", 512, 128), model_spec("small", 32_000, 1024)
    speed = Speed(((num_params(small), 1e9), (num_params(large), 1e12), (num_params(large), 3e12)), DEVICES["h100"])
    hours, says = speed.hours(small, 1000, "fp32", num_devices=1)
    assert hours == pytest.approx(6 * num_params(small) * 1000 / 1e9 / 3600)
    assert "finished runs" in says
    assert speed.hours(large, 1000, "fp32", num_devices=1)[0] == pytest.approx(6 * num_params(large) * 1000 / 2e12 / 3600)
    one, four = (Speed(device=DEVICES["h100"]).hours(large, 1000, "bf16", num_devices=n)[0] for n in (1, 4))
    assert one == pytest.approx(4 * four)
    assert Speed().hours(small, 1000, "fp32", num_devices=1)[0] is None


def test_disk_is_what_runs_keep_and_what_those_at_work_need_besides():
    rows = [{"state": state, "kept_disk_bytes": 10, "disk_bytes": 25} for state in ("waiting", "waiting", "failed", "done")]
    assert disk_needed(rows, workers=2) == 3 * 10 + 2 * 15


def test_a_grid_larger_than_the_disk_is_refused_before_anything_is_written(run_forget, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr("mlx_forget.sweeps.costs.shutil.disk_usage", lambda place: free)
    code, _, err = run_forget("sweep", recipe(tmp_path, grid={"seed": [0, 1, 2]}), "--output", tmp_path / "s")
    assert code == 2
    assert "3 MB are free" in err
    assert not (tmp_path / "s").exists()
    check_disk(tmp_path / "not" / "there", 2_999_999)


def test_numbers_are_written_as_people_read_them():
    assert [hours_text(hours) for hours in (None, 30, 0.5, 0.001)] == ["?", "30.0 h", "30.0 min", "4 s"]
    assert [size_text(size) for size in (1.234e12, 5e9, 2e6, 999)] == ["1.23 TB", "5 GB", "2 MB", "0.999 kB"]


WRONG = [
    (["--engine", "cloud"], "Unknown engine 'cloud'"),
    (["--engine", "in-process", "--workers", "2"], "one run after another"),
    (["--address", "127.0.0.1:1"], "choose --engine ray"),
    (["--slurm", "partition=gpu"], "choose --engine slurm"),
    (["--slurm", "partition"], "--slurm takes KEY=VALUE"),
    (["--gpus", "3"], "this machine has 0"),
    (["--set", "resources.gpus=1.5"], "whole number"),
    (["--set", "nowhere=1"], "Unknown recipe key 'nowhere'"),
    (["--on", "h100"], "--on is for --dry-run"),
    (["--threads", "0"], "threads must be at least 1"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_a_wrong_request_is_one_line_and_trains_nothing(run_forget, tmp_path, options, message):
    code, _, err = run_forget("sweep", recipe(tmp_path), "--output", tmp_path / "s", *options)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not list(tmp_path.glob("s/*/checkpoints"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize("address, message", [("", "No Ray cluster answers at"), ("nonsense", "HOST:PORT")])
def test_a_ray_cluster_that_does_not_answer_is_said_at_once(run_forget, tmp_path, address, message):
    if not address:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    code, _, err = run_forget("sweep", recipe(tmp_path), "--output", tmp_path / "s", "--engine", "ray", "--address", address)
    assert code == 2
    assert message in err
    assert time.monotonic() - began < 60
    assert not list(tmp_path.glob("s/.sweep-*"))


needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


@needs_submitit
def test_without_slurm_the_way_out_is_named(run_forget, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run_forget("sweep", recipe(tmp_path), "--output", tmp_path / "s", "--engine", "slurm")
    assert code == 2
    assert "no sbatch" in err
    assert "cluster=local" in err
    monkeypatch.undo()


@needs_submitit
def test_settings_that_slurm_does_not_know_are_refused(run_forget, tmp_path):
    path = recipe(tmp_path)
    code, _, err = run_forget(
        "sweep", path, "--output", tmp_path / "s", "--engine", "slurm", "--slurm", "cluster=local", "--slurm", "patrition=x"
    )
    assert code == 2
    assert "patrition" in err
    assert not list(tmp_path.glob("s/.sweep-*"))


@needs_submitit
def test_a_slurm_that_takes_no_jobs_is_said_and_an_array_is_what_it_is_asked_for(run_forget, tmp_path, monkeypatch, cache_folder):
    from mlx_forget.sweeps.grid import read_recipe
    from mlx_forget.sweeps.sweep import plan_sweep
    from mlx_forget.training.run import execute

    path = recipe(tmp_path, grid={"seed": [0, 1, 2]})
    execute(plan_sweep(read_recipe(path), tmp_path / "s").bases[0].plan)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (
        ("sbatch", f"cp $1 {tmp_path}/script; echo 'sbatch: error: Unable to contact slurm controller' >&2; exit 1"),
        ("srun", "exit 0"),
    ):
        (bin_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    code, _, err = run_forget(
        "sweep", path, "--output", tmp_path / "s", "--engine", "slurm", "--slurm", "partition=gpu", "--gpus", "2", "--workers", "2"
    )
    assert code == 1, err
    assert "Slurm takes no jobs" in err
    script = (tmp_path / "script").read_text()
    for line in ("--array=0-2%2", "--partition=gpu", "--gpus-per-node=2", "--cpus-per-task=2", "--time=1440"):
        assert f"#SBATCH {line}\n" in script, script
    assert not list(tmp_path.glob("s/.sweep-*"))
