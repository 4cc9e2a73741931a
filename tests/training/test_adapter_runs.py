"""Whole runs with adapters: resume, the files that other tools load, fusing, audits, and requests that cannot work."""

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_forget import checkpoint
from mlx_forget.backends import available_backends, load_backend
from mlx_forget.config import TrainConfig, scale_defaults
from mlx_forget.config_layers import from_layers
from mlx_forget.durable_files import sealed
from mlx_forget.errors import Interrupted
from mlx_forget.fuse import whole_checkpoint
from mlx_forget.history import read_history
from mlx_forget.tables import read_table
from mlx_forget.trainer import RuntimeSpec, TrainerSpec
from mlx_forget.training.plan import plan_run
from mlx_forget.training.run import execute
from mlx_forget.training.watch import Watch

BACKENDS = available_backends()


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


class Interrupt:
    """A stop after some questions of the loop."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return 15 if self.left < 0 else None


def config(backend, **keys):
    small = {"backend": backend, "num_threads": 1, "iters": 12, "steps_per_eval": 4, "learning_rate": 3e-3, "lora_rank": 4}
    return from_layers(TrainConfig, scale_defaults(), small, {"fine_tune_type": "lora", **keys})


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A finished DoRA run of a backend, made once."""
    made = {}

    def run(backend):
        if backend not in made:
            folder = tmp_path_factory.mktemp(backend) / "run"
            keys = {"fine_tune_type": "dora", "lora_scaling": "alpha/sqrt(r)", "lora_target_modules": "all-linear"}
            made[backend] = folder, execute(plan_run(config(backend, compare_to_start=True, **keys), folder=folder))
        return made[backend]

    return run


def logits_by_losses(folder, tokens, backend):
    """Token losses of a whole checkpoint."""
    found = checkpoint.find_checkpoint(folder)
    trainer = load_backend(backend)(TrainerSpec(model=found.model_spec(), runtime=RuntimeSpec(num_threads=1)))
    trainer.load(found.weights)
    return trainer.token_losses(tokens)


def rows_of(spec, count=4):
    return np.random.default_rng(0).integers(0, spec.vocab_size, (count, 33)).astype(np.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_run_ends_as_if_it_had_not_been(backend, tmp_path):
    keys = {"method": "kl-replay", "fine_tune_type": "dora", "lora_dropout": 0.2, "compare_to_start": True}
    straight = execute(plan_run(config(backend, **keys), folder=tmp_path / "straight"))
    with pytest.raises(Interrupted):
        execute(plan_run(config(backend, **keys), folder=tmp_path / "broken"), watch=Watch(interrupted=Interrupt(9)))
    resumed = execute(plan_run(config(backend, **keys), folder=tmp_path / "broken"), resume=True)
    assert resumed["num_resumes"] == 1
    assert resumed["losses"] == straight["losses"]
    columns = ["step", "batch_loss", "target_val_windows", "forgetting_ce", "grad_norm"]
    ours, theirs = (read_history(tmp_path / name / "history.arrows").select(columns).to_pylist() for name in ("broken", "straight"))
    assert ours == theirs
    a, b = (load_file(tmp_path / name / "checkpoints/last/adapter_model.safetensors") for name in ("broken", "straight"))
    assert all((a[key] == b[key]).all() for key in b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_record_says_what_was_trained_and_what_was_forgotten(run_of, backend):
    folder, record = run_of(backend)
    found = checkpoint.find_checkpoint(folder)
    d, num_layers, r = found.model_spec().width, found.model_spec().num_layers, 4
    per_block = (d + 3 * d) + (d + d) + 2 * (d + 4 * d)
    assert record["num_trainable_params"] == num_layers * (r * per_block + 9 * d)
    assert record["num_params"] > record["num_trainable_params"]
    assert record["adapter"] == {
        "kind": "dora", "rank": 4, "alpha": 16.0, "scaling": "alpha/sqrt(r)", "dropout": 0.0, "target_modules": ("all-linear",),
        "num_layers": None,
    }  # fmt: skip
    start, end = record["losses"]["start"], record["losses"]["end"]
    assert start["forgetting_kl"] == pytest.approx(0, abs=1e-5)
    assert start["start_agreement"] == 1
    assert end["forgetting_kl"] > 1e-4
    # Cross-entropy to the start model is the divergence and the start model's own entropy, which does not change.
    assert end["forgetting_ce"] - start["forgetting_ce"] == pytest.approx(end["forgetting_kl"] - start["forgetting_kl"], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_holds_adapters_only_and_fuses_to_the_same_model(run_of, backend, run_forget, tmp_path):
    folder, record = run_of(backend)
    assert {path.name for path in (folder / "checkpoints/best").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "mlx-lm", "config.json", "tokenizer.model", "state.json",
    }  # fmt: skip
    code, out, err = run_forget("fuse", folder, "-o", "fused", "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 12
    found = checkpoint.find_checkpoint(folder)
    tokens = rows_of(found.model_spec())
    base = checkpoint.open_checkpoint(type(tmp_path)(found.state["base"]["folder"]))
    trainer = load_backend(backend)(
        TrainerSpec(model=found.model_spec(), adapter=found.adapter, runtime=RuntimeSpec(num_threads=1))
    )
    trainer.load(base.weights)
    trainer.load(found.weights)
    np.testing.assert_allclose(logits_by_losses(tmp_path / "fused", tokens, backend), trainer.token_losses(tokens), atol=1e-5)
    code, out, err = run_forget("fuse", folder, "-o", "words")
    start = found.state["base"]["folder"]
    assert f"forget audit {start} words; go on from it: --init words" in err
    assert run_forget("fuse", folder, "-o", "fused")[0] == 2
    assert run_forget("fuse", "fused", "-o", "again")[0] == 2
    # A fused checkpoint is one to start from, and so is the run itself.
    for init in ("fused", folder):
        keys = {"init": str(init), "iters": 1, "fine_tune_type": "full", "lora_rank": 8}
        assert execute(plan_run(config(backend, **keys), folder=tmp_path / f"from-{init == folder}"))["status"] == "finished"
    reports = [read_history(tmp_path / f"from-{own}/history.arrows")["target_val_loss"].to_pylist() for own in (True, False)]
    assert reports[0] == reports[1]
    assert reports[0][0] == pytest.approx(record["losses"]["end"]["target_val"], abs=1e-4)


def test_an_audit_reads_a_run_with_adapters(run_of, run_forget):
    folder, _ = run_of(BACKENDS[0])
    code, out, err = run_forget("audit", "auto", folder, "--data", "prose", "--json", "--backend", BACKENDS[0])
    assert code == 0, err
    assert "by dora" in json.loads(out)["tuned"]["description"]


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs PyTorch")
def test_peft_loads_the_adapters_on_the_exported_base(run_of, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import GPT2LMHeadModel

    folder, _ = run_of(BACKENDS[0])
    found = checkpoint.find_checkpoint(folder)
    tokens = torch.from_numpy(rows_of(found.model_spec())).long()
    with torch.no_grad():
        base = GPT2LMHeadModel.from_pretrained(found.state["base"]["folder"]).eval()
        before = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, found.folder).eval()
        theirs = adapted(tokens).logits
        whole = GPT2LMHeadModel.from_pretrained(whole_checkpoint(found).folder).eval()
        ours = whole(tokens).logits
    assert (theirs - before).abs().max() > 0.01
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif("mlx" not in BACKENDS, reason="needs MLX")
def test_mlx_lm_loads_the_adapters_on_the_exported_base(run_of):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.models.gpt2 import Model, ModelArgs
    from mlx_lm.tuner.utils import load_adapters

    folder, _ = run_of("mlx")
    found = checkpoint.find_checkpoint(folder)
    tokens = rows_of(found.model_spec())

    def model(weights):
        args = {**json.loads((found.folder / "config.json").read_text()), "n_ctx": found.model_spec().context_length}
        made = Model(ModelArgs.from_dict(args))
        made.load_weights(
            list(made.sanitize({name.removeprefix("transformer."): w for name, w in mx.load(str(weights)).items()}).items())
        )
        return made

    adapted = load_adapters(model(f"{found.state['base']['folder']}/model.safetensors"), str(found.folder / "mlx-lm"))
    theirs, ours = (np.array(m(mx.array(tokens))) for m in (adapted, model(whole_checkpoint(found).weights)))
    np.testing.assert_allclose(theirs, ours, atol=2e-5)


def test_adapters_for_another_base_are_refused(run_of, run_forget, tmp_path):
    folder, _ = run_of(BACKENDS[0])
    other = execute(
        plan_run(
            from_layers(TrainConfig, scale_defaults(), {"init": "scratch", "iters": 1, "target": "prose"}), folder=tmp_path / "o"
        )
    )
    assert other["status"] == "finished"
    code, _, err = run_forget("fuse", folder, "-o", "fused", "--base", tmp_path / "o")
    assert code == 2
    assert "other weights" in err
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    state_file = moved / "checkpoints/last/state.json"
    state = json.loads(state_file.read_text())
    state["base"]["folder"] = "/nowhere"
    del state["checksum"]
    state_file.write_text(json.dumps(sealed(state)))
    code, _, err = run_forget("fuse", moved, "-o", "fused")
    assert code == 2
    assert "--base" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--lora-rank", "4"), "--fine-tune-type is full"),
        (("--fine-tune-type", "lora", "--init", "scratch"), "give --init"),
        (("--fine-tune-type", "lora", "--method", "l2-sp"), "adapters freeze them"),
        (("--fine-tune-type", "lora", "--lora-target-modules", "q_proj"), "names no linear module"),
        (("--fine-tune-type", "lora", "--lora-rank", "500"), "exceeds the size"),
        (("--fine-tune-type", "lora", "--lora-r", "0"), "lora_rank must be positive"),
        (("--fine-tune-type", "lora", "--lora-dropout", "1"), "below 1"),
        (("--fine-tune-type", "qlora"), "lora"),
        (("--init", "scratch", "--target", "prose", "--pretrain", "none", "--compare-to-start"), "--compare-to-start"),
        (("--compare-to-start", "--rows", "documents"), "document masks"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(run_forget, arguments, message):
    code, _, err = run_forget("train", "--backend", BACKENDS[0], *arguments)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err


def test_names_are_those_that_peft_and_mlx_lm_users_know():
    known = from_layers(TrainConfig, {"fine_tune_type": "lora", "lora_r": 4, "target_modules": ["attn.c_attn", "mlp.c_fc"]})
    assert known.adapter().rank == 4
    assert known.adapter().target_modules == ("attn.c_attn", "mlp.c_fc")


def test_evaluations_of_a_run_are_rows_of_a_table(run_of):
    folder, record = run_of(BACKENDS[0])
    table = read_table(folder, response="forgetting", evaluations=True)
    assert table.columns["steps"].tolist() == [4, 8, 12]
    assert set(table.columns["P"].tolist()) == {record["num_trainable_params"]}
    assert table.columns["loss"][-1] == record["losses"]["end"]["forgetting_ce"]
    assert table.columns["L_ft"][-1] == record["losses"]["end"]["target_val"]
    assert math.isfinite(read_table(folder, response="forgetting").columns["loss"][0])
