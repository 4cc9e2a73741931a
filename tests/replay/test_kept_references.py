"""Runs whose reference is kept on disk: as with a live one, after an interruption too; what they ask and refuse."""

import json
from pathlib import Path

import pytest

from mlx_forget.backends import available_backends
from mlx_forget.config import TrainConfig, scale_defaults
from mlx_forget.config_layers import from_layers
from mlx_forget.errors import Interrupted
from mlx_forget.pipeline.reference_rows import row_bytes
from mlx_forget.training.plan import plan_run
from mlx_forget.training.run import execute
from mlx_forget.training.watch import Watch
from tests.fakes import add_fake_backend
from tests.replay.test_replay import MODEL, Said, start, tokenizer  # noqa: F401

NETWORKS = available_backends()


@pytest.fixture(autouse=True)
def in_a_folder_with_the_fake(monkeypatch, tmp_path):
    add_fake_backend(monkeypatch)
    monkeypatch.chdir(tmp_path)


def config(backend, kind, **keys):
    layer = {"backend": backend, "num_threads": 1, "iters": 12, "steps_per_eval": 4, "method": "kl-replay", "coefficient": 2.0}
    return from_layers(TrainConfig, scale_defaults(), {**layer, "reference_log_probs": kind, **keys})


@pytest.mark.parametrize("backend", ["fake", *NETWORKS])
def test_a_run_with_a_kept_reference_ends_like_the_live_one_and_states_its_error(backend, tmp_path):
    live, full, top = (execute(plan_run(config(backend, kind), folder=tmp_path / kind)) for kind in ("live", "full", "top-64"))
    assert len({record["run_id"] for record in (live, full, top)}) == 3
    assert live["reference_log_probs"] is None
    for name in ("target_val", "pretrain_val"):
        assert full["losses"]["end"][name] == pytest.approx(live["losses"]["end"][name], abs=5e-4)
        assert top["losses"]["end"][name] == pytest.approx(live["losses"]["end"][name], abs=0.02)
    for record in (full, top):
        stated = record["reference_log_probs"]
        ends, (measured,) = stated["at_the_end"], stated["when_kept"].values()
        assert ends["num_tokens"] == 8 * 128
        assert ends["kl_live_nats"] > 1e-5, "training has moved the model"
        assert 0 <= measured["kl_of_kept_nats"] < 1e-5
    assert full["reference_log_probs"]["at_the_end"]["kl_kept_nats"] == pytest.approx(
        full["reference_log_probs"]["at_the_end"]["kl_live_nats"], rel=0.02
    )
    ends = top["reference_log_probs"]["at_the_end"]
    assert ends["kl_kept_nats"] < ends["kl_live_nats"]


@pytest.mark.parametrize("backend", NETWORKS)
def test_adapters_are_held_to_what_is_kept_of_their_base(backend, tmp_path):
    live, full = (
        execute(plan_run(config(backend, kind, fine_tune_type="lora", lora_rank=4, learning_rate=1e-2), folder=tmp_path / kind))
        for kind in ("live", "full")
    )
    for name in ("target_val", "pretrain_val"):
        assert full["losses"]["end"][name] == pytest.approx(live["losses"]["end"][name], abs=2e-3)
    ends = full["reference_log_probs"]["at_the_end"]
    assert ends["kl_live_nats"] > 1e-4, "the adapters count"
    assert ends["kl_kept_nats"] == pytest.approx(ends["kl_live_nats"], rel=0.02)


class Interrupt:
    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return 15 if self.left < 0 else None


def test_an_interrupted_run_with_a_kept_reference_ends_as_if_it_had_not_been(tmp_path):
    straight = execute(plan_run(config("fake", "top-32"), folder=str(tmp_path / "straight")))
    with pytest.raises(Interrupted):
        execute(plan_run(config("fake", "top-32"), folder=tmp_path / "broken"), watch=Watch(interrupted=Interrupt(9)))
    resumed = execute(plan_run(config("fake", "top-32"), folder=tmp_path / "broken"), resume=True)
    assert resumed["num_resumes"] == 1
    assert resumed["losses"] == straight["losses"]


def test_a_dry_run_says_what_it_takes_and_the_command_fills_it(run_forget, tmp_path):
    base = ("--init", "scratch", "--target", "prose", "--pretrain", "none", "--iters", "4", "--output", "base")
    assert run_forget("train", "--backend", "fake", *base)[0] == 0
    ask = ("--backend", "fake", "--num-tokens", "10K", "-o", "store", "--log-probs", "top-16")
    code, _, err = run_forget("replay", "base", *ask)
    assert code == 0, err
    assert "nats per token, over" in err
    kl = ("train", "--backend", "fake", "--init", "base", "--method", "kl-replay", "--iters", "4", "--replay-data", "store")
    code, out, err = run_forget(*kl, "--reference-log-probs", "top-16", "--dry-run", "--json")
    expected = json.loads(out)["kept_log_prob_bytes"]
    assert (
        expected
        == 79 * row_bytes("top-16", 128, 512)
        == sum(path.stat().st_size - 128 for path in Path("store/log-probs").glob("*/*.npy"))
    )
    assert "log-probs" in run_forget(*kl, "--reference-log-probs", "full", "--dry-run")[1]
    code, _, err = run_forget(*kl, "--reference-log-probs", "top-16", "--output", "r")
    assert code == 0, err
    assert "GB in" not in err, "what the command has kept is used"
    code, _, err = run_forget("replay", "base", "--backend", "fake", "-o", "store", "--log-probs", "full")
    assert code == 0, err
    assert "79 rows of store, full" in " ".join(err.split())
    assert json.loads(run_forget(*kl, "--dry-run", "--json")[1])["kept_log_prob_bytes"] == 0


WRONG = [
    (["--method", "kl-replay", "--reference-log-probs", "half"], "such as top-64; 'half' is neither"),
    (["--method", "kl-replay", "--reference-log-probs", "top-0"], "'top-0' is neither"),
    (["--method", "ntp-replay", "--reference-log-probs", "full"], "not of method 'ntp-replay': leave it live"),
    (["--method", "lwf", "--reference-log-probs", "full"], "not of method 'lwf'"),
    (["--method", "kl-replay", "--coefficient", "0", "--reference-log-probs", "full"], "coefficient 0, which asks nothing"),
    (["--method", "kl-replay", "--replay-data", "online", "--reference-log-probs", "full"], "rows never come again"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_requests_are_one_line_and_exit_code_2(run_forget, arguments, message):
    code, out, err = run_forget("train", "--backend", "fake", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
