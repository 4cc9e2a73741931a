"""Checkpoints: written aside and sealed, the one before kept, every damage named, nothing outside of the folder read."""

import json
import os

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mlx_forget import adapters, checkpoint
from mlx_forget.checkpoint import (
    adapter_of,
    find_checkpoint,
    latest_checkpoint,
    open_checkpoint,
    places,
    prune,
    save_checkpoint,
    seal,
)
from mlx_forget.errors import UserError
from mlx_forget.ladder import linear_shapes, model_spec
from mlx_forget.pretrained import read_pretrained
from mlx_forget.trainer import AdapterSpec, TrainerSpec
from tests.fakes import BigramTrainer
from tests.training.test_loop import TOKENIZER

SPEC = model_spec("1x16", vocab_size=300, context_length=8)


def save(folder, *, with_training_state=True, **state):
    trainer = BigramTrainer(TrainerSpec(model=SPEC))
    save_checkpoint(folder, trainer, SPEC, TOKENIZER, {"run_id": "r", **state}, with_training_state=with_training_state)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "last"
    save(folder, step=7)
    return folder


@pytest.fixture
def last(written, tmp_path):
    import shutil

    return shutil.copytree(written, tmp_path / "checkpoints" / "last")


def test_a_checkpoint_holds_weights_state_shape_and_tokenizer_and_says_what_it_is(last):
    assert names(last) == ["config.json", "model.safetensors", "state.json", "tokenizer.model", "training_state.safetensors"]
    found = open_checkpoint(last)
    assert (found.folder, found.is_own, found.adapter, found.trust_remote_code) == (last, True, None, False)
    assert found.weights == last / "model.safetensors"
    assert found.training_state == last / "training_state.safetensors"
    assert found.tokenizer == last / "tokenizer.model"
    assert (found.state["run_id"], found.state["step"], found.state["schema_version"]) == ("r", 7, 1)
    assert "checksum" not in found.state
    assert found.model_spec() == SPEC
    config = json.loads((last / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["n_embd"]) == (1, 2, 16)
    assert sorted(found.state["files"]) == [name for name in names(last) if name != "state.json"]


def test_the_one_before_is_kept_as_previous_and_best_is_replaced(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "last", step=step)
        save(tmp_path / "best", step=step, with_training_state=False)
    assert names(tmp_path) == ["best", "last", "previous"]
    assert [open_checkpoint(tmp_path / name).state["step"] for name in ("last", "previous", "best")] == [3, 2, 3]
    assert "training_state.safetensors" not in names(tmp_path / "best")
    (tmp_path / ".half.part").mkdir()
    prune(tmp_path)
    assert names(tmp_path) == ["best", "last"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    (tmp_path / ".last.part" / "x").mkdir(parents=True)
    (tmp_path / ".previous.trash" / "x").mkdir(parents=True)
    for step in (1, 2, 3):
        save(tmp_path / "last", step=step)
    assert names(tmp_path) == ["last", "previous"]
    assert "x" not in names(tmp_path / "last")


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    sync, rename = checkpoint.sync, os.rename
    monkeypatch.setattr(checkpoint, "sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(checkpoint.os, "rename", lambda a, b: (done.append(f"to {b.name}"), rename(a, b)))
    save(tmp_path / "c" / "last")
    assert done[-2:] == ["to last", "c"]
    assert set(done[:-2]) == set(names(tmp_path / "c" / "last"))


def test_the_latest_is_the_last_whole_one_and_says_what_was_passed_over(last, tmp_path):
    import shutil

    folder = last.parent
    assert latest_checkpoint(tmp_path / "none") == (None, None)
    found, problem = latest_checkpoint(folder)
    assert (found.folder, problem) == (last, None)
    shutil.copytree(last, folder / "previous")
    (last / "model.safetensors").write_bytes(b"x")
    found, problem = latest_checkpoint(folder)
    assert found.folder == folder / "previous"
    assert f"{last / 'model.safetensors'} is damaged or missing" in problem
    (folder / "previous" / "state.json").unlink()
    with pytest.raises(UserError, match=f"No other checkpoint of this run is whole: remove {folder.parent} to start again"):
        latest_checkpoint(folder)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "is not a checkpoint: it has no state.json"),
        ("{", "is damaged: state.json cannot be read"),
        ("[]", "is damaged: state.json cannot be read"),
        ('{"schema_version": 1}', "is damaged: state.json cannot be read"),
        ('{"schema_version": 1, "files": 5}', "is damaged: state.json cannot be read"),
        ('{"schema_version": 1, "files": [[1, 2]]}', "is damaged: state.json cannot be read"),
        ('{"schema_version": 2, "files": {}}', "has schema 2, this version reads 1"),
        ('{"schema_version": 1, "files": {}, "checksum": "0"}', "the checksum of state.json does not match"),
        ('{"schema_version": 1, "files": {"../x": "0"}}', "names files outside of it"),
        ('{"schema_version": 1, "files": {}, "adapter_file": "../x"}', "is not what a run writes"),
        ('{"schema_version": 1, "files": {"/etc/passwd": "0"}}', "names files outside of it"),
        ('{"schema_version": 1, "files": {"mlx-lm/gone": "0"}}', "mlx-lm/gone is damaged or missing"),
        ('{"schema_version": 1, "files": {"config.json": "0"}}', "config.json is damaged or missing"),
    ],
)
def test_a_state_that_is_none_is_one_sentence(last, content, words):
    (last / "state.json").unlink()
    if content is not None:
        (last / "state.json").write_text(content)
    with pytest.raises(UserError, match=words):
        open_checkpoint(last)


def test_a_checkpoint_is_found_by_its_run_and_by_its_own_folder(last, tmp_path):
    assert not find_checkpoint(last).trust_remote_code
    assert places(tmp_path) == (tmp_path, tmp_path / "checkpoints" / "last", tmp_path / "last")
    for name in places(tmp_path):
        if (name / "state.json").exists():
            assert find_checkpoint(name).folder == last
    for name in (tmp_path, last.parent, str(last)):
        found = find_checkpoint(name, trust_remote_code=True)
        assert (found.folder, found.trust_remote_code) == (last, True)
    with pytest.raises(UserError, match="There is no checkpoint at"):
        find_checkpoint(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint: give a run folder"):
        find_checkpoint(tmp_path / "empty")
    (tmp_path / "empty" / "model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds pickled weights only"):
        find_checkpoint(tmp_path / "empty")


def test_the_checkpoint_of_another_tool_is_known_by_its_files(last, tmp_path):
    import shutil

    folder = shutil.copytree(last, tmp_path / "gpt2")
    for name in ("state.json", "training_state.safetensors"):
        (folder / name).unlink()
    # A bigram is no GPT-2: the headers are what is read.
    found = find_checkpoint(folder)
    assert not found.is_own
    digest = checkpoint.weights_sha256(folder)
    assert found.state == {
        "run_id": f"gpt2-{digest[:12]}",
        "files": {"model.safetensors": digest},
        "is_pretraining": False,
        "curve": [],
    }
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        find_checkpoint(folder)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="does not describe a language model"):
        find_checkpoint(folder)


def test_weights_in_several_files_are_a_folder_and_adapters_a_file_of_their_own(last):
    adapter = AdapterSpec(rank=2, target_modules=("attention",))
    state = json.loads(json.dumps({"adapter": {**vars(adapter), "target_modules": ["attention"]}}))
    assert adapter_of(state) == adapter
    assert adapter_of({}) is None
    assert checkpoint.Checkpoint(last, state).weights == last / "adapter_model.safetensors"
    (last / "model.safetensors").unlink()
    assert checkpoint.Checkpoint(last, {}).weights == last


def test_sealing_lists_every_file_below(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_text("x")
    (tmp_path / "b").write_text("y")
    seal(tmp_path, {"run_id": "r"})
    assert sorted(open_checkpoint(tmp_path).state["files"]) == ["b", "inner/a"]


@pytest.mark.parametrize(
    "words, kind",
    [
        ("I/O error: No space left on device (os error 28)", OSError),
        ('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })', OSError),
        ("other", SafetensorError),
    ],
)
def test_what_the_system_says_to_safetensors_is_said_as_the_system_says_it(tmp_path, monkeypatch, words, kind):
    def fails(trainer, path, **_):
        raise SafetensorError(words)

    monkeypatch.setattr(BigramTrainer, "save", fails)
    with pytest.raises(kind) as error:
        save(tmp_path / "last")
    assert getattr(error.value, "errno", None) == (28 if kind is OSError else None)
    assert not (tmp_path / "last").exists()


def test_adapters_are_saved_alone_with_the_configurations_that_other_tools_read(tmp_path):
    adapter = AdapterSpec(rank=2, target_modules=("attention",))
    linears = linear_shapes(SPEC)

    class AdapterTrainer:
        def save(self, path, *, trainable_only):
            assert trainable_only
            save_file({adapters.file_name(name): array for name, array in adapters.initial_adapters(linears, adapter, 0)}, path)

    base = {"folder": "BASE", "run_id": None, "weights_sha256": "0" * 64}
    state = json.loads(json.dumps({"adapter": vars(adapter), "base": base}))
    save_checkpoint(tmp_path / "best", AdapterTrainer(), SPEC, TOKENIZER, state, with_training_state=False)
    found = open_checkpoint(tmp_path / "best")
    assert found.adapter == adapter
    assert found.weights == tmp_path / "best" / "adapter_model.safetensors"
    assert "model.safetensors" not in names(tmp_path / "best")
    assert {"mlx-lm/adapters.safetensors", "mlx-lm/adapter_config.json", "adapter_config.json"} < set(found.state["files"])
    config = json.loads((tmp_path / "best" / "adapter_config.json").read_text())
    # GPT-2 stores its matrices [in, out].
    assert (config["base_model_name_or_path"], config["r"], config["fan_in_fan_out"]) == ("BASE", 2, True)
    assert json.loads((tmp_path / "best" / "mlx-lm" / "adapter_config.json").read_text())["num_layers"] == 1
    (tmp_path / "best" / "state.json").unlink()
    imported = find_checkpoint(tmp_path / "best", trust_remote_code=True)
    assert (imported.is_own, imported.weights, imported.trust_remote_code) == (False, found.weights, True)
    assert (imported.adapter.rank, imported.adapter.alpha) == (adapter.rank, adapter.alpha)
    assert imported.state["base"] == {"folder": "BASE", "run_id": None, "weights_sha256": None}
    assert (imported.state["is_pretraining"], imported.state["curve"], imported.state["run_id"][:5]) == (False, [], "best-")


@pytest.mark.parametrize("trusted", [False, True])
def test_what_another_tool_wrote_keeps_its_shape_and_companions_and_its_code_only_where_trusted(tmp_path, trusted):
    start = tmp_path / "start"
    start.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1,
        "vocab_size": 8, "max_position_embeddings": 8, "dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    }  # fmt: skip
    (start / "config.json").write_text(json.dumps(config))
    (start / "generation_config.json").write_text('{"top_k": 3}')
    (start / "modeling.py").write_text("raise SystemExit")
    save_file({"model.embed_tokens.weight": np.zeros((8, 4), np.float32)}, start / "model.safetensors")
    model = read_pretrained(start, trust_remote_code=trusted)
    save_checkpoint(
        tmp_path / "last", BigramTrainer(TrainerSpec(model=SPEC)), model, TOKENIZER, {"run_id": "r"}, with_training_state=True
    )
    own = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "state.json",
        "tokenizer.model",
        "training_state.safetensors",
    ]
    assert names(tmp_path / "last") == sorted([*own, "modeling.py"] if trusted else own)
    written = json.loads((tmp_path / "last" / "config.json").read_text())
    del config["dtype"]
    assert written == {**config, "rope_theta": 5e5, "torch_dtype": "float32"}
    assert open_checkpoint(tmp_path / "last").model_spec().width == 4


def test_weights_come_back_as_they_were(last):
    trainer = BigramTrainer(TrainerSpec(model=SPEC, seed=5))
    before = trainer.weight.copy()
    trainer.load(open_checkpoint(last).weights)
    assert not np.array_equal(trainer.weight, before)
    assert np.array_equal(trainer.weight, BigramTrainer(TrainerSpec(model=SPEC)).weight)
