"""Files that people give the tool, and those of runs: a good one of each kind, and how it is read."""

import contextlib
import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from mlx_forget.checkpoint import open_checkpoint
from mlx_forget.config import TrainConfig
from mlx_forget.config_layers import from_layers, to_yaml
from mlx_forget.durable_files import sealed
from mlx_forget.errors import UserError
from mlx_forget.history import HistoryWriter, read_history
from mlx_forget.ladder import spec_from_hf_config
from mlx_forget.laws.files import SCHEMA_VERSION as FIT_VERSION
from mlx_forget.laws.files import read_fit
from mlx_forget.laws.forms import get_law
from mlx_forget.pipeline.formats import BadInput
from mlx_forget.pipeline.recipes import read_recipes
from mlx_forget.pipeline.sources import read_documents
from mlx_forget.pipeline.store import open_store
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.pretrained import older_keys, read_config, read_pretrained
from mlx_forget.records import read_record, write_record
from mlx_forget.replay.sampled_store import _sampled_shard
from mlx_forget.strict_yaml import read_yaml
from mlx_forget.studies.loss_matrix import read_matrices
from mlx_forget.sweeps.grid import read_recipe
from mlx_forget.tables import read_table
from mlx_forget.weight_files import read_tensor, tensor_names, weight_files

SAMPLE = Path(__file__).resolve().parents[1] / "pipeline" / "samples" / "store-v1"
RECORDS = [{"text": f"note {i}, and more"} for i in range(9)]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ROW = {"step": 1, "tokens": 2, "target_val_windows": [1.0, 2.5], "batch_loss": 3.5}
TOKENIZER_CONFIG = {
    "eos_token": {"content": "</s>"},
    "bos_token": "<s>",
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
STAGES = {"schema_version": 1, "recipe": "r", "chains": []}
RUNS: list[dict[str, object]] = [
    {"N": 1e6 * i, "D": 2000000, "p": 0.01, "L0": 3.0, "loss": 3.2, "run": f"r{i}"} for i in range(1, 4)
]


def documents(path: Path) -> object:
    """Both ways with bad input: stop, and skip."""
    list(read_documents(path, bad=BadInput(skip=True)))
    return list(read_documents(path))


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path)


def arrow(path: Path, rows: list[dict[str, object]] = RECORDS) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def zstd(path: Path) -> None:
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
        stream.write(lines())


def lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in [*RECORDS, CHAT]).encode()


def history(path: Path) -> None:
    with HistoryWriter(path) as writer:
        for _ in range(3):
            writer.append(ROW)


def checkpoint(path: Path, seal: Callable[[dict[str, object]], dict[str, object]] = sealed) -> None:
    save_file({"a": np.zeros(3, np.float32)}, path.parent / "model.safetensors")
    digest = hashlib.sha256((path.parent / "model.safetensors").read_bytes()).hexdigest()
    path.write_text(json.dumps(seal({"schema_version": 1, "run_id": "x", "files": {"model.safetensors": digest}})))


def unsealed(path: Path) -> None:
    """A manifest as earlier versions wrote it: nothing but the reader's own care protects it."""
    for file in SAMPLE.iterdir():
        shutil.copy(file, path.parent)


def tokenizer_json(path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path))


def dataset_repository(path: Path) -> None:
    (path.parent / "data").mkdir()
    (path.parent / "data" / "train.jsonl").write_bytes(lines())
    path.write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.jsonl\n---\n# Notes\n"
    )


def model_folder(path: Path) -> None:
    """A checkpoint of another tool with its weights in one file, and an index that says so."""
    weights = {"model.embed_tokens.weight": np.ones((5, 4), np.float32), "model.norm.weight": np.ones(4, np.float16)}
    save_file(weights, path.parent / "model.safetensors")
    index = {"metadata": {"total_size": 88}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 5, "max_position_embeddings": 8}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, "n_embd": 4, "quantization": {"bits": 4}}
    (path.parent / "config.json").write_text(json.dumps(config))


def model_shape(path: Path) -> object:
    shape = read_pretrained(path.parent)
    with contextlib.suppress(UserError):
        spec_from_hf_config(read_config(path.parent) | {"model_type": "gpt2"})
    return shape.num_params, older_keys(read_config(path.parent))


def tensors(path: Path) -> object:
    return [read_tensor(path, name) for name in tensor_names(path)]


def saved_fit(path: Path) -> None:
    law = get_law("chinchilla")
    values = {name: {"value": 1.0, "low": 0.5, "high": 2.0} for name in law.names}
    content = {
        "schema_version": FIT_VERSION,
        "law": law.name,
        "params": values,
        "groups": None,
        "flags": [],
        "intervals": {"widen": 1.0, "inflation": 1.0, "degrees_of_freedom": 9.0},
    }
    path.write_text(json.dumps({**content, "data_range": {"N": [1.0, 2.0], "D": [1.0, 2.0]}, "draws": "fit.draws.npz"}))
    np.savez_compressed(path.with_name("fit.draws.npz"), draws_0=np.ones((9, len(law.names))), column_0_N=np.ones(4))


def configuration(path: Path) -> TrainConfig:
    return from_layers(TrainConfig, read_yaml(path))


Make, Read = Callable[[Path], object], Callable[[Path], object]
# name of the file, how a good one is made, how it is read
GIVEN: dict[str, tuple[str, Make, Read]] = {
    "text": ("a.txt", lambda path: path.write_bytes("naïve words\n".encode() * 9), documents),
    "JSON lines": ("a.jsonl", lambda path: path.write_bytes(lines()), documents),
    "JSON": ("a.json", lambda path: path.write_text(json.dumps(RECORDS)), documents),
    "gzip": ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(lines(), mtime=0)), documents),
    "zstd": ("a.jsonl.zst", zstd, documents),
    "Parquet": ("a.parquet", parquet, documents),
    "Arrow": ("a.arrow", arrow, documents),
    "manifest": ("manifest.json", unsealed, lambda path: open_store(path.parent)),
    "shard": ("train-00000.arrow", unsealed, lambda path: open_store(path.parent, verify=False).split("train").document(0)),
    "tokenizer model": ("tokenizer.model", unsealed, load_vocabulary),
    "tokenizer.json": ("tokenizer.json", tokenizer_json, load_vocabulary),
    "checkpoint state": ("state.json", checkpoint, lambda path: open_checkpoint(path.parent)),
    "record": ("record.json", lambda path: write_record(path.parent, {"schema_version": 1}), lambda path: read_record(path.parent)),
    "history": ("history.arrows", history, read_history),
    "configuration": ("config.yaml", lambda path: path.write_text(to_yaml(TrainConfig())), configuration),
    "sweep recipe": ("r.yaml", lambda path: path.write_text("config: {iters: 8}\ngrid: {p: ['0', '1%']}\n"), read_recipe),
    "dataset card": ("README.md", dataset_repository, lambda path: documents(path.parent)),
    "model configuration": ("config.json", model_folder, model_shape),
    "safetensors": ("model.safetensors", model_folder, tensors),
    "index of weights": ("model.safetensors.index.json", model_folder, lambda path: weight_files(path.parent)),
    "checkpoint without seal": ("state.json", lambda path: checkpoint(path, seal=dict), lambda path: open_checkpoint(path.parent)),
    "tokenizer configuration": (
        "tokenizer_config.json",
        lambda path: (tokenizer_json(path.with_name("tokenizer.json")), path.write_text(json.dumps(TOKENIZER_CONFIG))),
        lambda path: load_vocabulary(path.with_name("tokenizer.json")),
    ),
    "fit": ("fit.json", saved_fit, read_fit),
    "draws of a fit": (
        "fit.draws.npz",
        lambda path: saved_fit(path.with_name("fit.json")),
        lambda path: read_fit(path.with_name("fit.json")),
    ),
    "loss matrices": ("stages.json", lambda path: path.write_text(json.dumps(STAGES)), read_matrices),
    "sampled rows": (
        "rows.npy",
        lambda path: np.save(path, np.zeros((3, 4), np.int32)),
        lambda path: _sampled_shard(path, (3, 4), 9),
    ),
    "table of runs, JSON lines": (
        "t.jsonl",
        lambda path: path.write_text("".join(json.dumps(run) + "\n" for run in RUNS)),
        read_table,
    ),
    "table of runs, Parquet": ("t.parquet", lambda path: pq.write_table(pa.Table.from_pylist(RUNS), path), read_table),
    "table of runs, Arrow": ("t.arrow", lambda path: arrow(path, RUNS), read_table),
    "corpus recipe": (
        "pile.yaml",
        lambda path: path.write_text(
            "description: d\nrole: r\nid: o/n\nrevision: x\nlicence: l\nschema: {text: string}\n"
            "files: {train: a/*.zst}\nsubsets: {one: {fields: {where: {a.b: c}}}, two: {num_bytes: 3}}\n"
        ),
        read_recipes,
    ),
    "table of runs": ("t.csv", lambda path: path.write_text("N,D,p,L0,loss\n1e6,2e6,0.01,3,3.2\n2e6,2e6,0,3,3.4\n"), read_table),
}
