"""`forget prepare` and `forget data` as a user meets them."""

import io
import json
import sys

import pytest


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"{i}. A note about the number {i}, and about {i * i}.\n" for i in range(3000)))
    return path


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"q": f"What is {i} and {i}?", "a": f"It is {2 * i}.", "kind": "sum" if i % 2 else "other"} for i in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prepare_counts_what_it_skips(run_forget, tmp_path, chats):
    chats.write_text(chats.read_text() + "not json\n" + '{"q": 3, "a": "x"}\n')
    columns = ("--prompt-column", "q", "--completion-column", "a")
    code, _, err = run_forget("prepare", chats, "-o", tmp_path / "s", *columns)
    assert code == 2
    assert "line 401: not valid JSON" in err
    assert not (tmp_path / "s").exists()
    code, out, err = run_forget("prepare", chats, "-o", tmp_path / "s", *columns, "--on-error", "skip", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["skipped"] == {"invalid JSON": 1, "missing or wrong field": 1}
    assert "line 402" in err
    assert 0 < facts["splits"]["train"]["num_useful_tokens"] < facts["splits"]["train"]["num_tokens"]
    assert run_forget("data", "verify", tmp_path / "s")[0] == 0
    code, out, _ = run_forget("data", "stats", tmp_path / "s", "--json")
    stats = json.loads(out)
    assert stats["splits"]["train"]["num_useful_tokens"] == facts["splits"]["train"]["num_useful_tokens"]
    assert sum(row["num_documents"] for row in stats["splits"].values()) == 400


def test_a_sample_of_conversations_shows_who_says_what(run_forget, tmp_path, chats):
    run_forget("prepare", chats, "-o", tmp_path / "s", "--prompt-column", "q", "--completion-column", "a")
    code, out, _ = run_forget("data", "sample", tmp_path / "s", "-n", "1", "--json")
    text = json.loads(out)["documents"][0]["text"]
    number = text.split()[2]
    assert code == 0
    assert text == f"[INST]What is {number} and {number}?[/INST]It is {2 * int(number)}."
    assert text in run_forget("data", "sample", tmp_path / "s", "-n", "1")[1]


def test_where_filters_and_lengths_are_options(run_forget, tmp_path, chats):
    options = ("--text-column", "a", "--where", "kind=sum", "--min-chars", "9", "--dedup", "--json")
    code, out, err = run_forget("prepare", chats, "-o", tmp_path / "s", *options)
    assert code == 0, err
    facts = json.loads(out)
    assert sum(row["num_documents"] for row in facts["splits"].values()) + facts["skipped"]["too short"] == 200


def test_standard_input_is_a_source(run_forget, tmp_path, notes, monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(notes.read_bytes())}))
    code, out, err = run_forget("prepare", "-", "-o", tmp_path / "piped", "--json")
    assert code == 0, err
    run_forget("prepare", notes, "-o", tmp_path / "file", "--json")
    assert json.loads(out)["splits"]["train"]["num_bytes"] > 0
    assert (tmp_path / "piped" / "train-00000.arrow").read_bytes() == (tmp_path / "file" / "train-00000.arrow").read_bytes()


def test_near_copies_of_held_out_text_stay_out(run_forget, tmp_path, notes):
    run_forget("prepare", notes, "-o", tmp_path / "pretraining")
    code, out, err = run_forget("prepare", notes, "-o", tmp_path / "s", "--without-copies-of", tmp_path / "pretraining", "--json")
    assert code == 0, err
    assert json.loads(out)["skipped"]["near-copy of held-out text"] >= 1
    code, out, _ = run_forget("data", "stats", tmp_path / "pretraining", "--against", tmp_path / "pretraining", "--json")
    overlap = json.loads(out)["overlap"]["validation in train"]
    assert overlap["num_copied_documents"] == 0
    code, out, err = run_forget("data", "stats", tmp_path / "s", "--against", tmp_path / "pretraining")
    assert code == 0, err
    assert "validation of" in out


def test_overlap_is_found_where_there_is_some(run_forget, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    document = [" ".join(f"word{i * j % 997}" for j in range(200)) for i in range(1, 41)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in document[:30]))
    (folder / "valid.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in document[20:]))
    run_forget("prepare", folder, "-o", tmp_path / "s")
    _, out, _ = run_forget("data", "stats", tmp_path / "s", "--json")
    overlap = json.loads(out)["overlap"]["validation in train"]
    assert overlap["num_copied_documents"] == 10
    assert overlap["num_documents"] == 20
    assert overlap["share_of_windows"] == pytest.approx(0.5, abs=0.1)


def test_shards_merge(run_forget, tmp_path, notes):
    for i in (1, 2):
        code, _, err = run_forget("prepare", notes, "-o", tmp_path / str(i), "--shard", f"{i}/2")
        assert code == 0, err
    code, out, err = run_forget("data", "merge", tmp_path / "2", tmp_path / "1", "-o", tmp_path / "all", "--json")
    assert code == 0, err
    _, whole, _ = run_forget("prepare", notes, "-o", tmp_path / "whole", "--json")
    for split, row in json.loads(whole)["splits"].items():
        assert json.loads(out)["splits"][split] == row


@pytest.mark.parametrize(
    "options, message",
    [
        (("--shard", "3/2"), "i/n"),
        (("--shard", "x"), "i/n"),
        (("--where", "kind"), "COLUMN=VALUE"),
        (("--on-error", "guess"), "Unknown --on-error"),
        (("--min-chars", "0"), "at least 1"),
        (("--workers", "-1"), "must not be negative"),
        (("--tokenizer-kind", "bpe"), "--tokenizer new"),
        (("--tokenizer", "new", "--tokenizer-kind", "word"), "unigram or bpe"),
        (("--tokenizer", "none.model"), "There is no tokenizer"),
        (("--without-copies-of", "nothing"), "Unknown corpus, recipe or path"),
        (("--from", "."), "Unknown recipe"),
        (("--config", "x"), "leave --config out|has no config"),
    ],
)
def test_bad_requests_are_one_sentence(run_forget, tmp_path, notes, options, message):
    import re

    source = notes.parent if "--config" in options else notes
    code, _, err = run_forget("prepare", source, "-o", tmp_path / "s", *options)
    assert code == 2
    assert re.search(message, err)
    assert not (tmp_path / "s").exists()


def test_recipes_are_listed(run_forget):
    code, out, _ = run_forget("data", "recipes")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("pile-arxiv ")]
    assert "120.71 GB" in line
    assert "licence: " in line
    code, out, _ = run_forget("data", "recipes", "--json")
    names = {recipe["name"] for recipe in json.loads(out)["recipes"]}
    assert code == 0
    assert {"redpajama-v2", "pile-arxiv", "fineweb-edu", "openorca", "wikitext-103", "openhermes"} <= names
