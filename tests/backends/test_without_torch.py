"""Checkpoints of other tools on MLX where PyTorch is not installed: finetuned in every way, resumed, fused, replayed and audited."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import find_checkpoint
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from tests.small_checkpoints import transformers_logits, write_checkpoint
from tests.test_imported_adapters import write_adapter
from tests.test_pretrained import nll_of, rows
from tests.training.test_pretrained_runs import STEPS, write_chats, write_texts

pytest.importorskip("transformers")
pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.skipif("mlx" not in available_backends(), reason="needs MLX")

ROOT = Path(__file__).resolve().parents[2]
DATA = ("--target", "chats.jsonl", "--rows", "padded", "--pretrain", "none", "--p", "0", *STEPS, "--backend", "mlx", "--json")


def commands():
    """What a run is called, and the command."""
    yield "full", ("train", "--model", "llama", *DATA, "--output", "full")
    for kind in ("lora", "dora", "ia3"):
        yield kind, ("train", "--model", "llama", *DATA, "--fine-tune-type", kind, "--output", kind)
    # As if it had been killed before its record was written.
    yield "killed", ("rm", "lora/record.json")
    yield "resumed", ("train", "--model", "llama", *DATA, "--fine-tune-type", "lora", "--output", "lora")
    yield "fused", ("fuse", "dora", "-o", "fused", "--json")
    yield "again", ("train", "--init", "fused", *DATA, "--iters", "2", "--output", "again")
    yield "samples", ("replay", "llama", "-o", "samples", "--num-tokens", "400", "--length", "32", "--backend", "mlx")
    yield "kl", ("train", "--model", "qwen2", *DATA, "--method", "kl-replay", "--replay-data", "self", "--output", "kl")
    yield "audit", ("audit", "auto", "lora", "--data", "notes=notes.jsonl", "--backend", "mlx", "--json")
    yield "theirs", ("audit", "llama", "theirs", "--data", "notes=notes.jsonl", "--backend", "mlx", "--json")


def test_everything_works_on_mlx_where_there_is_no_pytorch(tmp_path):
    for kind in ("llama", "qwen2"):
        write_checkpoint(tmp_path / kind, kind)
    write_texts(tmp_path / "notes.jsonl")
    write_chats(tmp_path / "chats.jsonl")
    write_adapter(tmp_path / "theirs", tmp_path / "llama")
    wanted = dict(commands())
    (tmp_path / "commands.json").write_text(json.dumps(list(wanted.values())))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "tests.backends.without_torch", "commands.json"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["loaded"] == []
    answers = dict(zip(wanted, found["answers"], strict=True))
    for name, (code, _, err) in answers.items():
        assert code == 0, (name, err)
        # What transformers says of itself without PyTorch is no news to who trains on MLX.
        assert "PyTorch was not found" not in err + result.stderr, name
    for name in ("full", "lora", "dora", "ia3", "kl"):
        losses = json.loads(answers[name][1])["losses"]
        assert losses["end"]["target_val"] < losses["start"]["target_val"], name
    assert json.loads(answers["resumed"][1])["losses"] == json.loads(answers["lora"][1])["losses"]
    start, again = (json.loads(answers[name][1])["losses"] for name in ("dora", "again"))
    assert again["start"]["target_val"] == pytest.approx(start["end"]["target_val"], abs=1e-4)
    assert json.loads(answers["theirs"][1])["texts"][0]["losses"]["forgetting"]["value"] != 0
    if "cuda" not in available_backends():
        return
    # And what was computed there is what transformers computes where it is installed.
    tokens, fused = rows(), find_checkpoint(tmp_path / "fused")
    own = load_backend("mlx")(TrainerSpec(model=fused.model_spec(), runtime=RuntimeSpec(num_threads=1))).token_losses(tokens)
    expected = nll_of(transformers_logits(tmp_path / "fused", tokens[:, :-1]), tokens[:, 1:])
    np.testing.assert_allclose(own, expected, atol=2e-5, rtol=2e-5)
