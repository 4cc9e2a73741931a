"""`kill -9` of one of two processes: the other ends with one clear line, and one process alone goes on from the checkpoint."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from mlx_forget.backends import available_backends
from mlx_forget.checkpoint import latest_checkpoint
from tests.backends.test_distributed import _launchable, start

CASES = [
    pytest.param("cuda", 1, (), id="pytorch"),
    pytest.param("cuda", 0, ("--shard",), id="pytorch, shared weights", marks=pytest.mark.full),
    pytest.param("mlx", 1, (), id="mlx", marks=pytest.mark.full),
]


def process_of(folder, rank):
    """The number of the process that trains in a folder as this rank."""
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = (Path("/proc") / number / "cmdline").read_bytes().split(b"\0")
            variables = (Path("/proc") / number / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and {f"RANK={rank}".encode(), f"MLX_RANK={rank}".encode()} & set(variables):
            return int(number)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize("backend, killed, options", CASES)
def test_the_end_of_one_process_ends_the_run_with_one_line_and_a_whole_checkpoint(
    backend, killed, options, cache_folder, tmp_path, run_forget
):
    if backend not in available_backends():
        pytest.skip(f"needs {backend}")
    _launchable(backend)
    folder = tmp_path / "run"
    state = folder / "checkpoints" / "last" / "state.json"
    process = start(backend, folder, "--iters", "3000", "--p", "1%", *options)
    try:
        for _ in range(2400):
            if state.exists() and json.loads(state.read_text())["step"] >= 10:
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.kill(process_of(folder, killed), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 or "exited with code" in err
    said = [line for line in err.splitlines() if "Another process of this run has ended" in line]
    assert len(said) == 1, err
    assert said[0].endswith("the same command goes on from the last checkpoint.")
    assert not (folder / "record.json").exists()
    found, problem = latest_checkpoint(folder / "checkpoints")
    assert problem is None
    own = (
        "--iters",
        "3000",
        "--steps-per-eval",
        "10",
        "--p",
        "1%",
        "--device",
        "cpu",
        "--num-threads",
        "1",
        "--stop-minutes",
        "1e-4",
    )
    code, _, err = run_forget("train", "--backend", backend, "--output", folder, "--steps-per-report", "2", *own)
    assert code == 0, err
    assert f"Resuming at step {found.state['step']:,}" in err
