"""Every file that an earlier release may have left on disk is still read: one committed sample of each schema version."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from mlx_forget import records
from mlx_forget.audit.run import SCHEMA_VERSION as AUDIT_VERSION
from mlx_forget.audit.run import Audit
from mlx_forget.backends import available_backends, load_backend
from mlx_forget.checkpoint import SCHEMA_VERSION as CHECKPOINT_VERSION
from mlx_forget.checkpoint import open_checkpoint
from mlx_forget.config import TrainConfig
from mlx_forget.config_layers import from_layers
from mlx_forget.fuse import fuse
from mlx_forget.history import SCHEMA, read_history
from mlx_forget.laws.files import SCHEMA_VERSION as FIT_VERSION
from mlx_forget.laws.files import read_fit
from mlx_forget.pipeline.store import SCHEMA_VERSION as STORE_VERSION
from mlx_forget.pipeline.store import open_store
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.runs.index import read_index
from mlx_forget.runs.verify import REQUIRED, describe_begun, verify_run
from mlx_forget.strict_yaml import read_yaml
from mlx_forget.studies.loss_matrix import SCHEMA_VERSION as STAGES_VERSION
from mlx_forget.studies.loss_matrix import read_matrices
from mlx_forget.trainer import RuntimeSpec, TrainerSpec

SAMPLES = Path(__file__).parent / "samples"
STORES = Path(__file__).parent / "pipeline" / "samples"
RUN, LORA, EARLY = SAMPLES / "run-v1", SAMPLES / "lora-v1", SAMPLES / "history-v1-early.arrows"


@pytest.mark.parametrize(
    "name, version",
    [
        ("run", records.SCHEMA_VERSION),
        ("lora", CHECKPOINT_VERSION),
        ("history", int(SCHEMA.metadata[b"schema_version"])),
        ("fit", FIT_VERSION),
        ("stages", STAGES_VERSION),
        ("audit", AUDIT_VERSION),
        ("store", STORE_VERSION),
    ],
)
def test_every_schema_version_so_far_has_a_sample(name, version):
    found = [re.match(rf"{name}-v(\d+)", path.name) for path in (STORES if name == "store" else SAMPLES).iterdir()]
    assert {int(match[1]) for match in found if match} == set(range(1, version + 1))


@pytest.mark.parametrize("folder", [RUN, LORA], ids=lambda folder: folder.name)
def test_the_record_of_a_run_is_read_with_every_promised_key(folder):
    record = records.read_record(folder)
    assert record is not None
    assert set(REQUIRED) <= set(record)
    assert list(verify_run(folder)) == []
    assert [run.record for run in records.find_runs(folder)] == [record]
    (row,) = read_index(folder).rows
    assert row["run"] == record["run_id"] or row["base"] == "scratch"
    assert from_layers(TrainConfig, record["config"]) == from_layers(TrainConfig, read_yaml(folder / records.CONFIG))


def test_the_history_of_a_run_is_read():
    table = read_history(RUN / records.HISTORY)
    assert table["step"].to_pylist() == [0, 2, 4]
    record = records.read_record(RUN)
    assert table["target_val_loss"].to_pylist()[-1] == pytest.approx(record["losses"]["end"]["target_val"])


def test_a_history_from_before_checksums_and_comparisons_is_read():
    with pa.OSFile(str(EARLY)) as file, pa.ipc.open_stream(file) as reader:
        assert len(reader.schema) < len(SCHEMA)
    table = read_history(EARLY)
    assert table.schema.names == SCHEMA.names
    assert table["target_val_loss"].to_pylist() == read_history(RUN / records.HISTORY)["target_val_loss"].to_pylist()
    assert table["forgetting_kl"].null_count == table.num_rows == 3


def test_a_checkpoint_is_read_with_its_state():
    found = open_checkpoint(RUN / "checkpoints" / "last")
    assert found.is_own
    assert found.state["step"] == 4
    assert found.model_spec().width == 16
    assert load_vocabulary(found.tokenizer).decode([40, 41]) != ""
    adapters = open_checkpoint(LORA / "checkpoints" / "last")
    assert (adapters.adapter.kind, adapters.adapter.rank) == ("lora", 2)


@pytest.mark.parametrize("backend", available_backends())
def test_a_checkpoint_goes_on_from_where_it_was(backend, tmp_path):
    found = open_checkpoint(RUN / "checkpoints" / "last")
    trainer = load_backend(backend)(TrainerSpec(model=found.model_spec(), runtime=RuntimeSpec(device=None)))
    trainer.load(found.weights)
    trainer.load_state(found.training_state)
    split = open_store(STORES / "store-v1").split("train")
    tokens = np.concatenate([[1], split.document(0)[:16]])[None].astype(np.int32)
    assert trainer.token_losses(tokens).mean() == pytest.approx(5.27558, abs=1e-4)
    trainer.save_state(tmp_path / "again.safetensors")
    before, after = load_file(found.training_state), load_file(tmp_path / "again.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_adapters_are_fused_with_their_base(tmp_path):
    found = open_checkpoint(LORA / "checkpoints" / "last")
    fused = fuse(found, tmp_path / "fused", base=RUN)
    before, after = load_file(RUN / "checkpoints" / "last" / "model.safetensors"), load_file(fused.weights)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all("attn" in name for name in changed)


def test_a_fit_is_read_with_its_draws():
    saved = read_fit(SAMPLES / "fit-v1" / "fit.json")
    predictor = saved.pick(None)
    assert predictor.params == pytest.approx({"A": 20, "B": 300, "alpha": 0.42, "beta": 0.3}, rel=1e-3)
    assert len(predictor.draws) == 20


def test_the_losses_after_stages_are_read():
    (matrix,) = read_matrices(SAMPLES / "stages-v1.json")
    assert (matrix.label, matrix.rows, matrix.columns) == ("chain", ("start", "one", "two"), ("prose", "one", "two"))
    assert matrix.backward_transfer.mean == pytest.approx(-0.04875)


def test_an_audit_still_has_every_key_that_it_had():
    sample = json.loads((SAMPLES / "audit-v1.json").read_text(encoding="utf-8"))
    assert set(sample) <= {field.name for field in fields(Audit)}


def test_why_a_run_was_given_up_is_read(tmp_path):
    shutil.copyfile(SAMPLES / "failure-v1.json", tmp_path / records.FAILURE)
    assert describe_begun(tmp_path) == "failed: No CUDA device: --device gpu asks for one."


def test_a_store_of_version_2_is_read_with_what_is_learnt():
    store = open_store(STORES / "store-v2")
    split = store.split("train")
    text = load_vocabulary(STORES / "store-v2" / "tokenizer.model").decode(split.document(0))
    assert "What is" in text
    assert split.has_loss_mask
    assert store.fingerprint == json.loads((STORES / "store-v2" / "manifest.json").read_text())["fingerprint"]
