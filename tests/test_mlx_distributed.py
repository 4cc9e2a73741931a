"""Two processes that `mlx.launch` starts on this machine, against one: the same steps, the same weights, and a resumed run."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_forget.trainer import available_backends

ROOT = Path(__file__).parents[1]
LAUNCHER = Path(sys.executable).with_name("mlx.launch")

pytestmark = [
    pytest.mark.skipif("mlx" not in available_backends(), reason="MLX is not installed"),
    pytest.mark.skipif(not LAUNCHER.exists() and shutil.which("mlx.launch") is None, reason="this MLX has no mlx.launch"),
]


def free_ports():
    """The first of two neighbouring ports that nobody listens on."""
    for port in range(31_000, 60_000, 37):
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ring")
    launcher = str(LAUNCHER) if LAUNCHER.exists() else "mlx.launch"
    command = [
        launcher, "-n", "2", "--backend", "ring", "--starting-port", str(free_ports()), "--cwd", str(ROOT),
        "--env", f"PYTHONPATH={ROOT}", "--", sys.executable, "-m", "tests.ring_rank", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert (folder / "rank1.json").exists(), done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(folder):
    from tests.ring_rank import train

    first = train(folder, "one")[1]
    return first, train(folder, "one-resumed", start="one")[1]


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


def test_sums_are_float64_and_broadcast_gives_rank_zeros_values(ranks):
    for rank in ranks:
        assert rank["sum"] == [3.0 + 2e-12, 4.0]
        assert rank["broadcast"] == [10.0]
