"""Real processes, really killed: the resumed run ends with the numbers of one that was left alone, to the last bit on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.history import read_history

SCIENCE = [
    "step",
    "tokens",
    "pretrain_tokens",
    "batch_loss",
    "target_train_loss",
    "target_val_windows",
    "pretrain_val_windows",
    "grad_norm",
]
STEPS = [
    "--iters",
    "60",
    "--steps-per-eval",
    "10",
    "--steps-per-report",
    "2",
    "--p",
    "10%",
    "--num-threads",
    "1",
]


@pytest.fixture(params=available_backends(), scope="module")
def backend(request, cache_folder):
    if load_backend(request.param).describe().accelerator:
        pytest.skip("sums on a GPU are not the same to the last bit twice")
    return request.param


def start(folder, backend, *more):
    command = [
        sys.executable,
        "-m",
        "mlx_forget",
        "train",
        "--backend",
        backend,
        "--output",
        str(folder),
        *STEPS,
        *more,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, folder, step):
    """Until the history has a row at or beyond a step."""
    for _ in range(6000):
        path = folder / "history.arrows"
        if path.exists() and any(row >= step for row in read_history(path)["step"].to_pylist()):
            return
        if process.poll() is not None:
            pytest.fail(f"ended before step {step}: {process.communicate()[1]}")
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"step {step} was never reached")


@pytest.fixture(scope="module")
def straight(backend, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    process = start(folder, backend)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder


def assert_same(folder, straight):
    ours, theirs = (read_history(path / "history.arrows").select(SCIENCE).to_pylist() for path in (folder, straight))
    assert ours == theirs
    ours, theirs = (json.loads((path / "record.json").read_text()) for path in (folder, straight))
    assert ours["losses"] == theirs["losses"]
    assert ours["run_id"] == theirs["run_id"]
    for name in ("last", "best"):
        a, b = (load_file(path / "checkpoints" / name / "model.safetensors") for path in (folder, straight))
        assert all((a[key] == b[key]).all() for key in b)


def test_a_run_killed_twice_ends_as_if_it_had_not_been(backend, straight, tmp_path):
    folder = tmp_path / "run"
    for step in (10, 30):
        process = start(folder, backend)
        wait_for_step(process, folder, step)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert not (folder / "record.json").exists()
    process = start(folder, backend, "--resume")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Resuming at step" in err
    assert json.loads((folder / "record.json").read_text())["num_resumes"] >= 1
    assert_same(folder, straight)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_says_so(backend, straight, tmp_path, number, code):
    folder = tmp_path / "run"
    process = start(folder, backend, "--json")
    wait_for_step(process, folder, 10)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    answer = json.loads(out)
    assert (answer["status"], answer["signal"], answer["folder"]) == ("interrupted", number, str(folder))
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    assert os.path.exists(folder / "checkpoints" / "last" / "state.json")
    process = start(folder, backend)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same(folder, straight)
