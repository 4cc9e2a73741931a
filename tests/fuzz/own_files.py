"""Files that the tool writes for itself and reads again: as deep as the commands that read them go.

Checksums are left out where a file has one: whoever can write a file can write its checksum too, and files of earlier releases have none.
"""

import contextlib
import functools
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from mlx_forget.audit.refusals import read_prompts
from mlx_forget.checkpoint import open_checkpoint
from mlx_forget.cli.predict import question
from mlx_forget.cli.runs import print_json, print_rows, say_others
from mlx_forget.durable_files import SEAL
from mlx_forget.engines.lease import Lease
from mlx_forget.errors import UserError
from mlx_forget.fuse import whole_checkpoint
from mlx_forget.imported_adapters import read_adapter, read_parts
from mlx_forget.laws.files import read_fit
from mlx_forget.pipeline import corpora
from mlx_forget.pipeline.chat_template import ChatTemplate
from mlx_forget.pipeline.sides import RowSubset
from mlx_forget.pipeline.store import StoreWriter, open_store
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.progress import read_progress
from mlx_forget.records import read_record
from mlx_forget.replay.log_probs import keep_log_probs
from mlx_forget.replay.sampled_store import _open_part
from mlx_forget.runs import index as run_index
from mlx_forget.runs.comparison import finished
from mlx_forget.runs.export import export, read_export
from mlx_forget.runs.missing import missing_lines, missing_runs, note_planned
from mlx_forget.runs.selection import select
from mlx_forget.runs.verify import describe_begun, verify_runs
from mlx_forget.studies import loss_matrix, prospective, toy_continual
from mlx_forget.sweeps.grid import labels, read_recipe
from mlx_forget.tables import read_table
from mlx_forget.trainer import TrainerSpec
from tests.fakes import BigramTrainer
from tests.fuzz.given_files import SAMPLE, Make, Read, tokenizer_json, unsealed

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
TOY = Path(__file__).resolve().parents[2] / "data" / "runs" / "toy-continual.json"
LENGTH = 16
_WEIGHTS = json.loads((SAMPLES / "run-v1" / "checkpoints" / "last" / "state.json").read_text())["files"]["model.safetensors"]
# Where log-probabilities of that model, its three likeliest tokens, are kept.
LOG_PROBS = f"store/log-probs/{_WEIGHTS[:16]}-top-3-packed-{LENGTH}-fp32"
RECIPE = """
name: r
config: {iters: 8, p: 1%, model: 1x16}
arms: {plain: {method: plain, p: 0}, replay: {method: ntp-replay, coefficient: 1.0}}
grid: {seed: [0, 1], base.iters: [4]}
zip: [{learning_rate: [1e-3], batch_size: [4]}]
smoke: {config: {iters: 2}, grid: {seed: [0]}}
"""
STAGES = "config: {iters: 8}\nstages:\n- {target: code}\n- {target: math, iters: 4}\narms: {plain: {p: 0}, mixed: {p: 1%}}\n"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"


def without_seal(source: Path, target: Path) -> None:
    target.write_text(json.dumps({key: value for key, value in json.loads(source.read_text()).items() if key != SEAL}))


def run_folder(path: Path) -> None:
    shutil.copytree(SAMPLES / "run-v1", path.parent, dirs_exist_ok=True)
    without_seal(SAMPLES / "run-v1" / "record.json", path.parent / "record.json")


def quietly(act: Callable[[], object]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        act()


def listed(folder: Path) -> None:
    """What the commands over a folder of runs make of it."""
    index = run_index.read_index(folder)
    for order in ("-forgetting_nats", "run", "tokens_seen"):
        rows = select(index.rows, sort=order if index.rows else None)
    quietly(lambda: (print_rows(index, rows), print_json(index, rows), say_others(index)))
    verify_runs(index, hashes=False)
    for row in rows:
        with contextlib.suppress(UserError):
            finished(index.folder_of(row))
    with contextlib.suppress(UserError):
        read_table(folder)
    with contextlib.suppress(UserError):
        export(rows, folder / "t.csv", root=folder, provenance={})


def index_of_runs(path: Path) -> None:
    run_folder(path.parent / "run" / "record.json")
    os.utime(path.parent / "run" / "record.json", (1e9, 1e9))
    indexed(path)


def indexed(path: Path) -> None:
    before = run_index.LEAST_RECORDS
    run_index.LEAST_RECORDS = 1
    try:
        index = run_index.read_index(path.parent)
        assert len(index.rows) == 1
        quietly(lambda: print_rows(index, select(index.rows, sort="run")))
    finally:
        run_index.LEAST_RECORDS = before


def exported(path: Path) -> None:
    folder = path.parent / "run"
    run_folder(folder / "record.json")
    export(run_index.read_index(folder).rows, path, root=folder, provenance={})
    shutil.rmtree(folder)


def read_exported(path: Path) -> None:
    with contextlib.suppress(UserError):
        read_table(path)
    rows = read_export(path)
    with contextlib.suppress(UserError):
        select(rows, where="N > 0 and method == 'injection'", sort="seed")


def adapters(path: Path) -> None:
    shutil.copytree(SAMPLES / "lora-v1" / "checkpoints" / "last", path.parent, dirs_exist_ok=True)
    shutil.copytree(SAMPLES / "run-v1" / "checkpoints" / "last", path.parent / "base")
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != SEAL}
    path.write_text(json.dumps({**content, "base": {**content["base"], "folder": str(path.parent / "base")}}))


def opened(path: Path) -> None:
    found = open_checkpoint(path.parent)
    _ = found.adapter, found.model_spec(), found.tokenizer
    os.environ["FORGET_HOME"] = str(path.parent / "home")
    shutil.rmtree(path.parent / "home", ignore_errors=True)
    whole_checkpoint(found)


def run_checkpoint(path: Path) -> None:
    shutil.copytree(SAMPLES / "run-v1" / "checkpoints" / "last", path.parent, dirs_exist_ok=True)
    without_seal(path, path)


def progress(path: Path) -> None:
    content = {"title": "t", "step": 3, "num_steps": 9, "tokens_per_second": 5.5, "seconds_left": 2.5, "losses": "target 3"}
    path.write_text(json.dumps(content))


def matrices(path: Path) -> None:
    for matrix in loss_matrix.read_matrices(path):
        loss_matrix.table_lines([matrix])
        loss_matrix.write_csv([matrix], path.with_name("m.csv"))


def toy(path: Path) -> None:
    path.write_text(json.dumps(json.loads(TOY.read_text())))


def read_toy(path: Path) -> None:
    found = toy_continual.read_outcome(path.parent)
    if found is not None:
        _ = found.is_finished
        toy_continual.table_lines(found)
        toy_continual.write_csv(found, path.with_name("t.csv"))


def kept_log_probs(path: Path) -> None:
    """A store with what a model of its vocabulary says about it; `path` is below the store."""
    store = path.parents[2]
    for file in SAMPLE.iterdir():
        shutil.copy(file, store)
    shutil.copytree(SAMPLES / "run-v1" / "checkpoints" / "last", store.parent / "base")
    assert keep(store) == path.parent


@functools.cache
def rows_and_model(store: Path) -> Any:
    start = open_checkpoint(store.parent / "base")
    subset = RowSubset.of_tokens(open_store(store, verify=False).split("train"), LENGTH, 2 * LENGTH)
    return start, subset, BigramTrainer(TrainerSpec(model=start.model_spec()))


def keep(store: Path) -> Path:
    start, subset, trainer = rows_and_model(store)
    kept = keep_log_probs(subset, trainer, start, "top-3", backend="fake", precision="fp32")
    kept.read(np.arange(subset.num_rows))
    kept.in_words()
    return kept.folder


def corpus(path: Path) -> None:
    texts = {split: [f"{split} {i}" for i in range(5)] for split in corpora.SPLITS}
    path.parent.rmdir()
    corpora._write(path.parent, cast(Any, texts), [])


def read_corpus(path: Path) -> None:
    folder = path.parent
    recipe = SimpleNamespace(folder=lambda corpora, name: folder)
    found = corpora._open(cast(Any, recipe), folder.parent, "math")
    for split in corpora.SPLITS if found is not None else ():
        list(corpora.read_documents(found, split))


def store_writer(folder: Path) -> StoreWriter:
    found = a_model().tokenizer
    sizes = {"vocab_size": found.vocab_size, "bos_id": found.bos_id, "eos_id": found.eos_id, "tokenizer_hash": found.hash}
    return StoreWriter(
        folder=folder, tokenizer_file=SAMPLE / "tokenizer.model", source="s", key="k", tokens_per_shard=8, **cast(Any, sizes)
    )


def journal(path: Path) -> None:
    path.parent.rmdir()
    writer = store_writer(path.parents[1] / "made")
    for number in range(4):
        writer.add("train", np.arange(5, 10), 5 + number)
    writer.release()
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != SEAL}))


def continued(path: Path) -> None:
    aside = path.parent
    kept = {file: file.read_bytes() for file in aside.iterdir()}
    try:
        writer = store_writer(aside.parent / "made")
        writer.add("train", np.arange(5, 10), 5)
        _ = writer.num_documents
        writer.release()
    finally:
        aside.mkdir(exist_ok=True)
        for file, content in kept.items():
            file.write_bytes(content)


def samples(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    _open_part(path.parent, {"seed": 0}, lambda sentence: None)


def template(path: Path) -> None:
    tokenizer_json(path.with_name("tokenizer.json"))
    path.with_name("chat_template.jinja").write_text(TEMPLATE)
    path.with_name("special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"}))


def rendered(path: Path) -> None:
    found = ChatTemplate.find(path.with_name("tokenizer.json").read_bytes(), path.parent)
    if found is not None:
        found.text([("user", "a"), ("assistant", "b")])
        found.document([("user", "a"), ("assistant", "b")], bos_id=0, eos_id=1)


def predicted(path: Path) -> None:
    predictor = read_fit(path).pick(None)
    columns = question(predictor.law, {"N": 1e9, "D": 3e7, "p": 0.01, "L0": 3.0})
    with np.errstate(all="ignore"):
        _ = predictor.predict(columns), predictor.interval(columns), predictor.distance(columns)


def saved_fit(path: Path) -> None:
    for file in (SAMPLES / "fit-v1").iterdir():
        shutil.copy(file, path.parent)


@functools.cache
def a_model() -> Any:
    vocabulary = load_vocabulary(SAMPLE / "tokenizer.model")
    return SimpleNamespace(spec=SimpleNamespace(context_length=64), tokenizer=vocabulary, bos_id=vocabulary.bos_id)


def prompts(path: Path) -> None:
    read_prompts(str(path), [a_model()], 8)


def store_v2(path: Path) -> None:
    for file in (SAMPLE.parent / "store-v2").iterdir():
        shutil.copy(file, path.parent)
    if path.suffix == ".json":
        without_seal(path, path)


def rows_of(path: Path) -> None:
    split = open_store(path.parent, verify=False).split("train")
    for number in range(len(split.shards)):
        split.documents(number)
    split.document(0)


def chosen(path: Path) -> None:
    rows = [{"N": 1.0, "method": "plain", "seed": 0, "p": None}, {"N": 2.0, "method": "injection", "seed": 1, "p": 0.1}]
    select(rows, where=path.read_text(encoding="utf-8", errors="replace"))


def planned(path: Path) -> None:
    found = read_recipe(path)
    labels(found.runs({}))


def imported(path: Path) -> None:
    made = SAMPLES / "lora-v1" / "checkpoints" / "last"
    by_mlx_lm = path.parent.name == "mlx-lm"
    for name in (path.name, "adapters.safetensors" if by_mlx_lm else "adapter_model.safetensors"):
        shutil.copy(made / ("mlx-lm" if by_mlx_lm else ".") / name, path.parent)


def read_imported(path: Path) -> None:
    found, start = read_adapter(path.parent), open_checkpoint(SAMPLES / "run-v1" / "checkpoints" / "last")
    read_parts(found.weights, found.spec, start.model_spec(), start.folder)


def predictions(path: Path) -> None:
    one = {"domain": "code", "model": "1x16", "N": 9000, "D": 9000, "p": "1%", "seed": 0, "outside": {"N": 2.0}}
    content = {
        "schema_version": prospective.SCHEMA_VERSION,
        "kind": prospective.KIND,
        "made_at": "2026-01-01T00:00:00Z",
        "level": 0.9,
    }
    path.write_text(json.dumps({**content, "predictions": [{**one, "forgetting": 0.1, "low": 0.0, "high": 0.2}] * 2}))


def compared(path: Path) -> None:
    content = prospective.read_predictions(path)
    if content is not None:
        prospective.summary(prospective.compare(content, run_index.read_index(SAMPLES / "lora-v1").rows))


OWN: dict[str, tuple[str, Make, Read]] = {
    "record of a run": ("record.json", run_folder, lambda path: listed(path.parent)),
    "record that is shown": ("record.json", run_folder, lambda path: read_record(path.parent)),
    "index of runs": (".forget-runs.json", index_of_runs, indexed),
    "exported table, CSV": ("t.csv", exported, read_exported),
    "exported table, Parquet": ("t.parquet", exported, read_exported),
    "condition on runs": ("where.txt", lambda path: path.write_text("N <= 3.4e8 and p > 0 and method == 'injection'"), chosen),
    "state of a run's checkpoint": ("state.json", run_checkpoint, opened),
    "state of adapters": ("state.json", adapters, opened),
    "progress": ("progress.json", progress, lambda path: (read_progress(path.parent), describe_begun(path.parent))),
    "failure": (
        "failure.json",
        lambda path: shutil.copy(SAMPLES / "failure-v1.json", path),
        lambda path: describe_begun(path.parent),
    ),
    "beat of a lease": (
        "beat.json",
        lambda path: path.write_text('{"count": 3, "stop": false}'),
        lambda path: Lease(path.parent, 1.0, path.parent, {}).beat(),
    ),
    "loss matrices of stages": ("stages.json", lambda path: shutil.copy(SAMPLES / "stages-v1.json", path), matrices),
    "toy": ("toy.json", toy, read_toy),
    "kept log-probabilities": (f"{LOG_PROBS}/log_probs.json", kept_log_probs, lambda path: keep(path.parents[2])),
    "corpus": ("math/corpus.json", corpus, read_corpus),
    "corpus text": ("math/train.arrow", corpus, read_corpus),
    "journal of a store": (".made.part/journal.json", journal, continued),
    "samples": (".made.samples/samples.json", samples, samples),
    "adapter of peft": ("adapter_config.json", imported, read_imported),
    "adapter of mlx-lm": ("mlx-lm/adapter_config.json", imported, read_imported),
    "weights of an adapter": (
        "adapter_model.safetensors",
        lambda path: imported(path.with_name("adapter_config.json")),
        lambda path: read_imported(path.with_name("adapter_config.json")),
    ),
    "predictions": ("predictions.json", predictions, compared),
    "planned runs": (
        "planned.json",
        lambda path: note_planned(path.parent, {"a": "p = 0"}),
        lambda path: missing_lines(missing_runs(path.parent)),
    ),
    "chat template": ("chat_template.jinja", template, rendered),
    "special tokens": ("special_tokens_map.json", template, rendered),
    "fit that predicts": ("fit.json", saved_fit, predicted),
    "prompts": ("p.jsonl", lambda path: path.write_text('{"prompt": "a b"}\n{"prompt": "c"}\n'), prompts),
    "manifest of version 2": ("manifest.json", store_v2, rows_of),
    "shard of version 2": ("train-00000.arrow", store_v2, rows_of),
    "documents of a shard": ("train-00000.documents.arrow", unsealed, rows_of),
    "recipe with arms": ("r.yaml", lambda path: path.write_text(RECIPE), planned),
    "recipe with stages": ("r.yaml", lambda path: path.write_text(STAGES), planned),
}
