"""Sinks beside a run's history: they say what the history says, change nothing, and are refused where they cannot be written."""

import importlib.util
import json
import sys
import types

import pytest

from mlx_forget.history import read_history
from mlx_forget.training.tracking import TensorBoard, WeightsAndBiases
from tests.fakes import add_fake_backend


@pytest.fixture
def train(run_forget, tmp_path, monkeypatch):
    """`forget train` on the NumPy bigram."""
    add_fake_backend(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_forget("train", "--backend", "fake", "--iters", "8", *arguments, "--json")


@pytest.fixture
def scalars():
    """What TensorBoard shows of a folder: {name: [(step, value)]}."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        found = EventAccumulator(str(folder)).Reload()
        return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}

    return read


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what it is told."""
    module = types.ModuleType("wandb")
    module.asked, module.logged = {}, []
    module.Settings = lambda **settings: settings
    run = types.SimpleNamespace(log=lambda values, step: module.logged.append((step, values)))
    module.init = lambda **asked: module.asked.update(asked) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or find(name))
    return module


def test_tensorboard_says_what_the_history_says_and_changes_nothing(train, scalars, tmp_path):
    code, out, err = train("--output", "logged", "--log-to", "tensorboard")
    assert code == 0, err
    record = json.loads(out)
    plain = json.loads(train("--output", "plain")[1])
    assert record["run_id"] == plain["run_id"]
    assert record["losses"] == plain["losses"]
    rows = read_history(tmp_path / "logged" / "history.arrows").to_pylist()
    found = scalars(tmp_path / "logged" / "tensorboard")
    for name, column in (("loss/target_validation", "target_val_loss"), ("loss/pretraining_validation", "pretrain_val_loss")):
        assert [step for step, _ in found[name]] == [row["step"] for row in rows]
        assert [value for _, value in found[name]] == pytest.approx([row[column] for row in rows], rel=1e-6)
    assert found["forgetting_nats"][0] == (0, 0.0)
    assert found["loss/batch"][-1][0] == 8
    assert not (tmp_path / "plain" / "tensorboard").exists()


def test_a_resumed_run_shows_no_step_twice(scalars, tmp_path):
    first = TensorBoard(tmp_path, step=0)
    for step in (0, 2, 4, 6):
        first.write(step, {"loss": 10.0 - step})
    again = TensorBoard(tmp_path, step=2)
    for step in (4, 6, 8):
        again.write(step, {"loss": 20.0 - step})
    assert scalars(tmp_path)["loss"] == [(0, 10.0), (2, 8.0), (4, 16.0), (6, 14.0), (8, 12.0)]


def test_wandb_is_offline_and_in_the_runs_folder(train, wandb, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    code, out, err = train("--output", "logged", "--report-to", "wandb")
    assert code == 0, err
    assert wandb.asked["mode"] == "offline"
    assert wandb.asked["dir"] == "logged"
    assert wandb.asked["id"] == json.loads(out)["run_id"]
    assert wandb.asked["config"]["log_to"] == "wandb"
    rows = read_history(tmp_path / "logged" / "history.arrows").to_pylist()
    said = [(step, values["loss/target_validation"]) for step, values in wandb.logged if "loss/target_validation" in values]
    assert said == [(row["step"], row["target_val_loss"]) for row in rows]
    monkeypatch.setenv("WANDB_MODE", "online")
    WeightsAndBiases(tmp_path, run_id="a", title="t", config={})
    assert wandb.asked["mode"] == "online"


def test_a_sink_that_is_not_there_is_refused_before_any_work(train, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "tensorboard") else find(name))
    for name in ("wandb", "tensorboard"):
        code, _, err = train("--output", "r", "--log-to", name)
        assert code == 2
        assert f"--log-to {name} needs {name}, which is not installed: pip install 'mlx-forget[{name}]'" in err
    code, _, err = train("--output", "r", "--log-to", "tensorbord")
    assert code == 2
    assert "Did you mean 'tensorboard'" in err
    assert not (tmp_path / "r").exists()


def test_a_sweep_logs_every_run_into_its_own_folder(run_forget, scalars, tmp_path, monkeypatch):
    add_fake_backend(monkeypatch)
    (tmp_path / "r.yaml").write_text(json.dumps({"config": {"backend": "fake", "iters": 8}, "grid": {"p": [0, "5%"]}}))
    command = ("sweep", tmp_path / "r.yaml", "--output", tmp_path / "s", "--engine", "in-process", "--json")
    code, out, err = run_forget(*command, "--log-to", "tensorboard")
    assert code == 0, err
    runs = [row for row in json.loads(out)["runs"] if not row["title"].startswith("base")]
    assert len(runs) == 2
    for run in runs:
        assert scalars(f"{run['folder']}/tensorboard")["loss/target_validation"]
    code, _, err = run_forget(*command, "--log-to", "tensorbord")
    assert code == 2
    assert "Did you mean 'tensorboard'" in err
