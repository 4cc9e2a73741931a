"""The folder of a run: who holds it, and what is left of one that was refused."""

import dataclasses
import threading

import pytest
import yaml

from mlx_forget.distributed import ALONE
from mlx_forget.errors import UserError
from mlx_forget.training.folder import is_held, only_group
from tests.bigrams import CONFIG
from tests.fakes import BigramTrainer, add_fake_backend


def options(**more):
    keys = {key: value for key, value in CONFIG.items() if key != "base"} | more
    return [word for key, value in keys.items() for word in (f"--{key.replace('_', '-')}", value)]


@pytest.mark.parametrize("init", ["scratch", "auto"])
def test_a_model_that_is_refused_while_loading_leaves_nothing_behind(run_forget, tmp_path, monkeypatch, init):
    def refuse(self, spec):
        raise UserError("this model cannot be")

    add_fake_backend(monkeypatch, "bigram")
    monkeypatch.setattr("mlx_forget.training.plan.forget_home", lambda: tmp_path / "home")
    monkeypatch.setattr(BigramTrainer, "__init__", refuse)
    data = {"target": "prose", "pretrain": "none", "p": "0"} if init == "scratch" else {}
    code, _, err = run_forget("train", *options(init=init, **data), "--output", tmp_path / "runs" / "mine")
    assert (code, err.strip().splitlines()[-1]) == (2, "forget: this model cannot be")
    assert not list(tmp_path.iterdir())


def test_a_run_that_another_device_began_in_another_precision_is_named_so(run_forget, tmp_path, monkeypatch):
    add_fake_backend(monkeypatch, "bigram")
    monkeypatch.setattr("mlx_forget.training.plan.forget_home", lambda: tmp_path / "home")
    asked = ("train", *options(init="scratch", target="prose", pretrain="none", p="0"), "--output", tmp_path / "run")
    on_cpu = BigramTrainer.describe()
    on_gpu = dataclasses.replace(on_cpu, precisions=("fp32", "bf16"), fast_bf16=True)
    monkeypatch.setattr(BigramTrainer, "describe", lambda: on_gpu)
    code, _, err = run_forget(*asked)
    assert code == 0, err
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["precision"] == "bf16"
    code, _, err = run_forget(*asked, "--learning-rate", "3e-3")
    assert code == 2
    assert "(differing: learning_rate)" in " ".join(err.split())
    monkeypatch.setattr(BigramTrainer, "describe", lambda: on_cpu)
    code, _, err = run_forget(*asked)
    assert code == 2
    assert "holds another run" in err
    assert "(differing: precision)" in " ".join(err.split())


def test_a_folder_that_stood_there_or_was_used_stays(tmp_path):
    (tmp_path / "empty").mkdir()
    with only_group(ALONE, tmp_path / "empty", wait=False):
        assert is_held(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())
    with only_group(ALONE, tmp_path / "made" / "used", wait=False):
        (tmp_path / "made" / "used" / "config.yaml").write_text("")
    assert (tmp_path / "made" / "used" / "config.yaml").exists()
    with only_group(ALONE, tmp_path / "made" / "unused", wait=False):
        pass
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["used"]


def test_who_waited_for_a_run_that_was_refused_holds_a_folder_that_is_there(tmp_path):
    folder, waited = tmp_path / "run", threading.Event()
    held = []

    def wait():
        with only_group(ALONE, folder, wait=True):
            held.append(is_held(folder))
            waited.wait(10)

    with only_group(ALONE, folder, wait=False):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        assert not held
    while not held and thread.is_alive():
        thread.join(0.01)
    assert held == [True]
    with pytest.raises(UserError, match="Another process is training"), only_group(ALONE, folder, wait=False):
        pass
    waited.set()
    thread.join()
    assert not folder.exists()
