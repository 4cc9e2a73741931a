"""A store is the same however it was made: by how many workers, in how many goes, in how many parts."""

import dataclasses
import fcntl
import itertools
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_forget.errors import RunFailed, UserError
from mlx_forget.pipeline.catalog import documents_of, write_store
from mlx_forget.pipeline.conversations import Conversation
from mlx_forget.pipeline.encoding import encode
from mlx_forget.pipeline.sources import Reading
from mlx_forget.pipeline.store import StoreWriter, merge_stores, open_store
from mlx_forget.pipeline.tokenizer import END_INST, EOS, INST
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.pipeline.workers import ordered_map

SAMPLE = Path(__file__).parent / "samples" / "store-v1"
TOKENIZER = SAMPLE / "tokenizer.model"
ROOT = Path(__file__).resolve().parents[2]


def rows(num=600):
    for i in range(num):
        if i % 3:
            yield {"text": f"{i}. A note about the number {i}, and about {i * i}. " * (i % 7 + 1)}
        else:
            yield {"messages": [{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant") * (1 + i % 2)]}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that there are many."""
    monkeypatch.setattr("mlx_forget.pipeline.tokenise._BLOCK_DOCUMENTS", 16)


def small_writer(monkeypatch, tokens=4000):
    original = StoreWriter.__init__

    def init(self, *arguments, **keywords):
        original(self, *arguments, **{"tokens_per_shard": tokens, **keywords})

    monkeypatch.setattr(StoreWriter, "__init__", init)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_store_is_the_same_for_any_number_of_workers(tmp_path, source, monkeypatch):
    small_writer(monkeypatch)
    stores = []
    for workers in (0, 1, 3):
        write_store(tmp_path / str(workers), [documents_of(str(source))], TOKENIZER, num_workers=workers)
        stores.append(files_of(tmp_path / str(workers)))
    assert stores[0] == stores[1] == stores[2]
    assert len([name for name in stores[0] if name.startswith("train") and "documents" not in name]) > 3


def test_an_interrupted_store_goes_on_after_the_last_whole_shard(tmp_path, source, monkeypatch):
    small_writer(monkeypatch)
    write_store(tmp_path / "whole", [documents_of(str(source))], TOKENIZER, num_workers=0)
    real, num_calls, num_encoded = encode, 0, 0

    def breaks(contents, *arguments, **keywords):
        nonlocal num_calls, num_encoded
        num_calls += 1
        if num_calls == 25:
            raise KeyboardInterrupt
        num_encoded += len(contents)
        return real(contents, *arguments, **keywords)

    monkeypatch.setattr("mlx_forget.pipeline.tokenise.encode", breaks)
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "again", [documents_of(str(source))], TOKENIZER, num_workers=0)
    assert not (tmp_path / "again").exists()
    with pytest.raises(UserError, match="not a token store"):
        open_store(tmp_path / ".again.part")
    num_encoded = 0
    write_store(tmp_path / "again", [documents_of(str(source))], TOKENIZER, num_workers=0)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")
    assert 0 < num_encoded < 500
    assert not (tmp_path / ".again.part").exists()


@pytest.mark.parametrize("change", ["source", "shard", "options"])
def test_what_was_written_of_something_else_is_not_used(tmp_path, source, monkeypatch, change):
    small_writer(monkeypatch)
    reading = Reading(min_chars=20) if change == "options" else Reading()
    write_store(tmp_path / "half", [documents_of(str(source), reading)], TOKENIZER, num_workers=0)
    if change == "source":
        source.write_text(source.read_text().replace("A note", "A remark"))
    real = encode
    calls = itertools.count()

    def breaks(*arguments, **keywords):
        if next(calls) == 25:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr("mlx_forget.pipeline.tokenise.encode", breaks)
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "again", [documents_of(str(source), reading)], TOKENIZER, num_workers=0)
    shard = tmp_path / ".again.part" / "train-00001.arrow"
    if change == "shard":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif change == "source":
        source.write_text(source.read_text().replace("A remark", "A note"))
    write_store(tmp_path / "again", [documents_of(str(source))], TOKENIZER, num_workers=0)
    write_store(tmp_path / "whole", [documents_of(str(source))], TOKENIZER, num_workers=0)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_a_store_that_was_killed_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} words and more words {i * i} " * 40}) + "\n" for i in range(1500)))
    script = (
        "import sys\nfrom pathlib import Path\nfrom mlx_forget.pipeline import tokenise, store\n"
        "from mlx_forget.pipeline.catalog import documents_of, write_store\n"
        "original = store.StoreWriter.__init__\n"
        "def init(self, *a, **k): original(self, *a, **{'tokens_per_shard': 20000, **k})\n"
        "store.StoreWriter.__init__ = init\n"
        "write_store(Path(sys.argv[2]), [documents_of(sys.argv[1])], Path(sys.argv[3]), num_workers=2)\n"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "store"), str(TOKENIZER)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment)
    journal = tmp_path / ".store.part" / "journal.json"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 600):
        time.sleep(0.005)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "store").exists()
    small_writer(monkeypatch, 20_000)
    for name in ("store", "whole"):
        write_store(tmp_path / name, [documents_of(str(path))], TOKENIZER, num_workers=0)
    assert files_of(tmp_path / "store") == files_of(tmp_path / "whole")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_two_processes_do_not_write_one_store(tmp_path, source, monkeypatch):
    real = fcntl.flock

    def between_machines(file, operation):
        """As network file systems: a folder is locked on one machine only."""
        number = file if isinstance(file, int) else file.fileno()
        if not stat.S_ISDIR(os.fstat(number).st_mode):
            real(file, operation)

    monkeypatch.setattr(fcntl, "flock", between_machines)

    def writer(**more):
        return StoreWriter(tmp_path / "s", TOKENIZER, "hash", 512, 1, 2, "test", key="k", **more)

    first = writer()
    first.add("train", np.array([300]), 1)
    with pytest.raises(UserError, match="Another process is writing"):
        writer()
    first.close()
    with pytest.raises(UserError, match="exists already"):
        writer(wait=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, source, monkeypatch):
    small_writer(monkeypatch)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8200, hard))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            write_store(tmp_path / "s", [documents_of(str(source))], TOKENIZER, num_workers=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert not (tmp_path / "s").exists()
    write_store(tmp_path / "s", [documents_of(str(source))], TOKENIZER, num_workers=0)


@pytest.mark.parametrize("num_files", [1, 4])
def test_parts_merge_into_a_store_of_all_documents(tmp_path, num_files):
    everything = list(rows())
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(num_files):
        (folder / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in everything[i::num_files]))
    parts = [
        write_store(tmp_path / f"part{i}", [documents_of(str(folder), Reading(part=(i, 3)))], TOKENIZER, num_workers=0)
        for i in range(3)
    ]
    merged = merge_stores(parts[::-1], tmp_path / "merged")
    whole = write_store(tmp_path / "whole", [documents_of(str(folder))], TOKENIZER, num_workers=0)

    def documents(store):
        return {name: sorted(tuple(split.document(i)) for i in range(split.num_documents)) for name, split in store.splits.items()}

    assert documents(merged) == documents(whole)
    assert open_store(tmp_path / "merged").fingerprint == merged.fingerprint
    with pytest.raises(UserError, match="not all parts"):
        merge_stores(parts[:2], tmp_path / "other")
    with pytest.raises(UserError, match="not all parts"):
        merge_stores([parts[0], parts[1], whole], tmp_path / "other")
    with pytest.raises(UserError, match="made with different tokenizers"):
        merge_stores([parts[0], dataclasses.replace(parts[1], tokenizer_hash="another"), parts[2]], tmp_path / "other")
    # What an interrupted merge left behind is no part of the next one.
    (tmp_path / ".other.part").mkdir()
    (tmp_path / ".other.part" / "train-00009.arrow").write_bytes(b"x")
    assert merge_stores(parts, tmp_path / "other").fingerprint == merged.fingerprint
    assert not (tmp_path / "other" / "train-00009.arrow").exists()


def test_several_sources_keep_their_names(tmp_path, source):
    (tmp_path / "b.txt").write_text("another source\n" * 100)
    store = write_store(
        tmp_path / "s", [documents_of(str(source)), documents_of(str(tmp_path / "b.txt"))], TOKENIZER, num_workers=0
    )
    assert store.sources == (str(source), str(tmp_path / "b.txt"))
    assert set(np.unique(store.split("train").sources(0))) == {0, 1}
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["schema_version"] == 2


def test_a_sample_of_version_1_is_still_read_and_still_written(tmp_path):
    store = open_store(SAMPLE)
    split = store.split("train")
    text = load_vocabulary(TOKENIZER).decode(split.document(0))
    assert text.startswith("0. A note about the number 0")
    assert not split.has_loss_mask
    assert store.fingerprint == "f206e777859c3310da8a693c136752d0dc050cccf173a4742cbf4a807126b735"
    (tmp_path / "small.txt").write_text("".join(f"{i}. A note about the number {i}, and about {i * i}.\n" for i in range(400)))
    again = write_store(tmp_path / "s", [documents_of(str(tmp_path / "small.txt"))], TOKENIZER, num_workers=0)
    assert again.fingerprint == store.fingerprint


def test_only_answers_of_a_conversation_are_learnt():
    vocabulary = load_vocabulary(TOKENIZER)
    turns = (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    ((ids, mask),) = encode([Conversation(turns)], vocabulary)
    one, two, three, four = (list(part) for part in vocabulary.encode_batch(["one", "two", "three", "four"]))
    assert ids.tolist() == [INST, *one, END_INST, *two, EOS, INST, *three, END_INST, *four]
    learnt = [token for token, keep in zip([*ids, EOS], mask, strict=True) if keep]
    assert learnt == [*two, EOS, *four, EOS]


def test_the_end_of_a_conversation_without_an_answer_is_not_learnt():
    vocabulary = load_vocabulary(TOKENIZER)
    ((ids, mask),) = encode([Conversation((("user", "one"), ("assistant", "two"), ("user", "three")))], vocabulary)
    assert len(mask) == len(ids) + 1
    assert mask[-1] == 0
    assert mask.sum() == len(vocabulary.encode_batch(["two"])[0]) + 1


def upper(setup):
    return lambda question: setup + question.upper()


def dies(setup):
    def work(question):
        if question == b"7":
            os.kill(os.getpid(), signal.SIGKILL)
        return question

    return work


def test_answers_come_in_the_order_of_the_questions():
    questions = [str(i).encode() * (i % 5 * 20_000 + 1) for i in range(60)]
    entry = "tests.pipeline.test_tokenise:upper"
    assert list(ordered_map(questions, entry, num_workers=3, setup=b"x")) == [b"x" + q.upper() for q in questions]


def test_a_worker_that_dies_is_a_failure_and_no_hang():
    with pytest.raises(RunFailed, match="worker process died"):
        list(ordered_map((str(i).encode() for i in range(20)), "tests.pipeline.test_tokenise:dies", num_workers=2))
