"""Weights shared between two processes (FSDP2 over gloo, on the CPU): the numbers, files and resumes of one process."""

import json
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.errors import UserError
from mlx_forget.ladder import num_params
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from tests.backends.parity import SPEC
from tests.backends.shard_steps import CASES, train
from tests.backends.test_distributed import ROOT, environment, two_of

pytestmark = pytest.mark.skipif("cuda" not in available_backends(), reason="needs PyTorch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def alone(folder):
    return {case: train(folder, case, "one", shard=False)[1] for case in CASES}


@pytest.fixture(scope="module")
def ranks(folder, alone):
    command = two_of("cuda", "tests.backends.shard_steps", folder)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment()
    )
    assert (folder / "rank1.json").exists(), done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def flat(seen):
    return np.concatenate([np.ravel(row) for row in seen])


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_that_share_a_model_see_what_one_process_sees(ranks, alone, case):
    assert ranks[0][case]["seen"] == ranks[1][case]["seen"]
    np.testing.assert_allclose(flat(ranks[0][case]["seen"]), flat(alone[case]), rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_they_write_the_files_of_one_process(ranks, folder, case):
    for kind in ("safetensors", "state.safetensors"):
        two, one = (load_file(folder / f"{case}-{name}.{kind}") for name in ("two", "one"))
        assert list(two) == list(one)
        distance = np.sqrt(sum(((two[name] - one[name]) ** 2).sum() for name in one))
        assert distance <= 1e-6 * np.sqrt(sum((value**2).sum() for value in one.values()))


def test_each_holds_about_half_of_weights_and_moments(ranks):
    whole = 3 * num_params(SPEC)
    held = [rank["plain"]["held"] for rank in ranks]
    assert sum(held) == whole
    assert max(held) < 0.52 * whole


def test_saved_on_two_it_goes_on_on_one_and_the_reverse(ranks, folder):
    _, straight = train(folder, "plain", "one-from-one", shard=False, start="one")
    _, from_two = train(folder, "plain", "one-from-two", shard=False, start="two")
    np.testing.assert_allclose(flat(from_two), flat(straight), rtol=2e-6)
    np.testing.assert_allclose(flat(ranks[0]["from one"]), flat(straight), rtol=2e-6)


def test_one_process_shares_with_nobody_and_says_so():
    trainer = load_backend("cuda")(TrainerSpec(model=SPEC, runtime=RuntimeSpec(device="cpu", num_threads=1, shard=True)))
    assert "One process has nobody to share weights with: --shard does nothing." in trainer.notes


@pytest.mark.skipif("mlx" not in available_backends(), reason="needs MLX")
def test_a_backend_that_cannot_share_says_so(run_forget):
    code, _, err = run_forget("train", "--backend", "mlx", "--shard", "--dry-run")
    assert code == 2
    assert "Backend 'mlx' cannot share weights among processes: leave --shard out." in err


@pytest.mark.parametrize(
    "options, sentence",
    [
        (("--method", "kl-replay"), "Method 'kl-replay' reads a whole second model: it does not go with --shard."),
        (("--compare-to-start",), "--compare-to-start reads a whole second model: it does not go with --shard."),
        (("--optimizer", "adafactor"), "Optimizer 'adafactor' needs whole matrices: --shard takes adamw."),
    ],
)
def test_what_needs_a_whole_model_is_refused_before_anything_is_trained(run_forget, options, sentence):
    code, _, err = run_forget("train", "--backend", "cuda", "--shard", "--dry-run", *options)
    assert code == 2
    assert sentence in " ".join(err.split())


def test_what_needs_a_whole_model_is_refused(monkeypatch):
    from cuda_backend.backend import TorchBackend
    from mlx_forget.methods import method_spec
    from mlx_forget.trainer import OptimSpec

    runtime = RuntimeSpec(device="cpu", num_threads=1, shard=True)

    class Pair:
        rank, size = 0, 2

    for module in ("backend", "trainer"):
        monkeypatch.setattr(f"cuda_backend.{module}.join", Pair)
    for method in ("kl-replay", "lwf", "ewc"):
        with pytest.raises(UserError, match="does not go with --shard"):
            TorchBackend(TrainerSpec(model=SPEC, method=method_spec(method), runtime=runtime))
    with pytest.raises(UserError, match="--shard takes adamw"):
        TorchBackend(TrainerSpec(model=SPEC, optim=OptimSpec(name="adafactor"), runtime=runtime))
