"""Two processes that a launcher starts on this machine, against one: the same steps, the same run, and a run that goes on after a signal."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_forget.backends import available_backends, join_group
from mlx_forget.distributed import ALONE, launched_rank
from mlx_forget.errors import UserError
from mlx_forget.history import read_history

ROOT = Path(__file__).parents[2]
LAUNCHER = Path(sys.executable).with_name("mlx.launch")


def free_ports():
    """The first of two neighbouring ports that nobody listens on."""
    for port in range(31_000 + os.getpid() % 1000, 60_000, 37):
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue
    raise AssertionError("no free ports")


def two_of(backend, module, *arguments):
    """The command line that starts `python -m MODULE ARGUMENTS` as two processes."""
    if backend == "mlx":
        launcher = [str(LAUNCHER) if LAUNCHER.exists() else "mlx.launch", "-n", "2", "--backend", "ring"]
        python = ["--starting-port", str(free_ports()), "--", sys.executable, "-m"]
        return [*launcher, *python, module, *map(str, arguments)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return [*launcher, module, *map(str, arguments)]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _launchable(name):
    if name == "mlx" and not LAUNCHER.exists() and shutil.which("mlx.launch") is None:
        pytest.skip("this MLX has no mlx.launch")
    return name


@pytest.fixture(params=available_backends(), scope="module")
def backend(request):
    return _launchable(request.param)


# Whole runs start many processes, and what they test lies in the core: one backend in the short form.
@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.full if number else ()) for number, name in enumerate(available_backends())],
    scope="module",
)
def launched(request):
    return _launchable(request.param)


@pytest.fixture(scope="module")
def folder(backend, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = two_of(backend, "tests.backends.rank_steps", backend, folder)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment()
    )
    assert (folder / "rank1.json").exists(), done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(backend, folder):
    from tests.backends.rank_steps import train

    first = train(backend, folder, "one")[1]
    return first, train(backend, folder, "one-resumed", start="one")[1]


def test_a_step_reads_the_same_on_every_rank(ranks):
    assert ranks[0]["world_size"] == 2
    assert ranks[0]["seen"] == ranks[1]["seen"]


def test_two_ranks_see_what_one_process_sees(ranks, alone):
    np.testing.assert_allclose(ranks[0]["seen"], alone[0], rtol=1e-6)


def test_two_ranks_end_with_the_weights_of_one_process(folder, alone):
    two, one = (load_file(folder / f"{name}.safetensors") for name in ("two", "one"))
    distance = np.sqrt(sum(((two[name] - one[name]) ** 2).sum() for name in one))
    size = np.sqrt(sum((value**2).sum() for value in one.values()))
    assert distance <= 1e-6 * size


def test_a_resumed_pair_goes_on_as_one_process_would(ranks, alone):
    np.testing.assert_allclose(ranks[0]["later"], alone[1], rtol=1e-5)


def test_ranks_agree(ranks):
    for rank in ranks:
        assert rank["sum"] == [3.0 + 2e-12, 4.0]
        assert rank["broadcast"] == [10.0]
        assert rank["agree"] == [True, False]
        assert rank["smallest"] == 7


OPTIONS = [
    "--iters",
    "40",
    "--steps-per-eval",
    "10",
    "--steps-per-report",
    "2",
    "--p",
    "10%",
    "--num-threads",
    "1",
    "--device",
    "cpu",
]


def start(backend, output, *more):
    command = two_of(backend, "mlx_forget", "train", "--backend", backend, "--output", output, *OPTIONS, *more)
    # In a session of its own, so that a signal can be sent to the whole of it, as a terminal does.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
        start_new_session=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out, err


def losses(folder):
    record = json.loads((folder / "record.json").read_text())
    return [value for row in record["losses"].values() for value in row.values()]


@pytest.fixture(scope="module")
def pair(launched, cache_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair") / "run"
    out, err = finish(start(launched, folder, "--json"))
    return folder, out, err


def test_two_processes_train_the_run_of_one_and_rank_zero_alone_speaks(launched, pair, tmp_path, run_forget):
    folder, out, err = pair
    code, _, _ = run_forget("train", "--backend", launched, "--output", tmp_path / "one", *OPTIONS)
    assert code == 0
    np.testing.assert_allclose(losses(folder), losses(tmp_path / "one"), rtol=1e-6)
    one, two = (json.loads((path / "record.json").read_text()) for path in (tmp_path / "one", folder))
    assert one["run_id"] == two["run_id"]
    assert (one["world_size"], two["world_size"]) == (1, 2)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    two.pop("checksum")
    assert json.loads(lines[0]) == two
    # The run's, and the base model's where no other test has trained it.
    starts = [line for line in err.splitlines() if "step 0 " in line]
    assert len(starts) == len(set(starts)) in (1, 2), err


@pytest.mark.parametrize("how", ["ctrl-c", pytest.param("terminate the launcher", marks=pytest.mark.full)])
def test_a_stopped_pair_goes_on_and_ends_with_the_same_numbers(launched, pair, tmp_path, how):
    folder = tmp_path / "run"
    process = start(launched, folder)
    for _ in range(6000):
        if (folder / "history.arrows").exists() and 10 in read_history(folder / "history.arrows")["step"].to_pylist():
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not (folder / "record.json").exists()
    # The launcher may have gone before its processes have: the folder is free once they have, too.
    for _ in range(600):
        if not any(str(folder) in _command_of(number) for number in os.listdir("/proc") if number.isdigit()):
            break
        time.sleep(0.05)
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert 10 <= state["step"] < 40
    assert state["step"] % 2 == 0, "ranks agree to stop at a report step"
    _, err = finish(start(launched, folder, "--resume"))
    assert f"Resuming at step {state['step']}" in err
    assert losses(folder) == losses(pair[0])


def _command_of(number):
    try:
        return (Path("/proc") / number / "cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.full
def test_a_wrong_request_is_refused_once(launched, tmp_path):
    process = start(launched, tmp_path / "run", "--target-tokens", "999999999")
    _, err = process.communicate(timeout=120)
    # mlx.launch does not pass exit codes on; it says them.
    assert process.returncode != 0 or "exited with code 2" in err
    assert err.count("Asked for 999,999,999 tokens") == 1


def test_a_launcher_of_another_framework_is_named(monkeypatch):
    if "mlx" not in available_backends():
        pytest.skip("MLX is not installed")
    monkeypatch.setenv("RANK", "1")
    assert launched_rank() == 1
    with pytest.raises(UserError, match=r"torchrun started: start them with mlx\.launch"):
        join_group("mlx")


def test_a_process_of_its_own_is_a_group_of_one(monkeypatch):
    for name in ("MLX_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() is None
    assert ALONE.broadcast(np.array([3.0])).tolist() == [3.0]
    assert ALONE.smallest(5) == 5
    assert ALONE.agree(True, False) == (True, False)
    with ALONE.rank_zero_first():
        pass
