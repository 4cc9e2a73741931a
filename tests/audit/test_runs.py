"""`forget audit` of runs on what real data brings: answers only, other layouts, several targets, other tokenizers, other starts."""

import json
import shutil

import numpy as np
import pytest

from mlx_forget import checkpoint
from mlx_forget.audit.models import open_model
from mlx_forget.audit.overlap import learnt_rows
from mlx_forget.pipeline.corpora import forget_home
from tests.fakes import add_fake_backend


@pytest.fixture
def forget(run_forget, monkeypatch, tmp_path):
    add_fake_backend(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        found, out, err = run_forget(*arguments, "--backend", "fake", "--json")
        assert found == code, err
        return (json.loads(out) if code == 0 else None), err

    return run


@pytest.fixture
def files(tmp_path):
    def turns(i):
        return [
            {"role": role, "content": f"{role} says {i * 37 % 1001} and {turn}"}
            for turn in (1, 2)
            for role in ("user", "assistant")
        ]

    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns(i)}) + "\n" for i in range(300)))
    (tmp_path / "notes.txt").write_text(notes_of("note", 3000))
    learnt = [notes_of("note", 8, start=100 + 8 * i) for i in range(20)]
    new = [
        "".join(f"Storm {i} came up by night, and {j} boats never saw the harbour again.\n" for j in range(8)) for i in range(20)
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in learnt + new))


def notes_of(word, num, start=0):
    return "".join(f"{i}. A {word} about the number {i}, whose square is {i * i}.\n" for i in range(start, start + num))


@pytest.mark.parametrize("layout", ["packed", "documents", "padded"])
def test_learnt_rows_of_conversations_are_those_that_the_run_was_given(forget, files, tmp_path, layout):
    asked = () if layout == "packed" else ("--target-tokens", "2600")
    record, _ = forget("train", "--target", "chats.jsonl", "--rows", layout, "--p", "0", "--iters", "2", "--output", "run", *asked)
    (learnt,), skipped = learnt_rows(open_model(tmp_path / "run"))
    assert skipped == ()
    assert learnt.rows.layout == layout
    assert learnt.rows.num_tokens == record["data"]["chats.jsonl"]["unique_tokens"]


def test_only_answers_count_as_the_finetune_learnt_only_them(forget, files):
    for name, options in (("answers", ()), ("all", ("--no-mask-prompt",))):
        arguments = ("--target", "chats.jsonl", "--rows", "padded", "--p", "0", "--iters", "2", "--eval-rows", "1000")
        record, _ = forget("train", *arguments, "--output", name, *options)
        found, err = forget("audit", "auto", name, "--data", "chats.jsonl")
        (text,) = found["texts"]
        assert ("only what the data marks as to be learnt, such as answers, counts" in err) == (name == "answers")
        assert (text["num_masked"] > 0.4 * text["num_tokens"]) == (name == "answers")
        # Conversations that fit into one row each are read as training evaluates them.
        assert text["losses"]["loss_after"]["value"] == pytest.approx(record["losses"]["end"]["target_val"], abs=1e-5)
        assert sum(text["per_document"]["num_tokens"]) == text["num_tokens"]
        assert 0 < text["num_bytes"] < 300 * 80


@pytest.fixture
def own_stores(monkeypatch, tmp_path):
    """The folder of token stores of a cache that no test beside this one reads."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("corpora", "tokenizers"):
        (home / name).symlink_to(forget_home() / name)
    monkeypatch.setenv("FORGET_HOME", str(home))
    return home / "stores"


def test_what_was_learnt_from_every_target_is_found_and_a_lost_one_is_said(forget, files, tmp_path, tokenizer_file, own_stores):
    forget("train", "--target", "chats.jsonl=50%,notes.txt=50%", "--rows", "padded", "--p", "0", "--iters", "2", "--output", "run")
    found, _ = forget("audit", "auto", "run", "--data", "mixed.jsonl")
    overlap = found["texts"][0]["overlap"]
    # Some were held out for validation.
    assert 10 <= len(overlap) <= 20
    shutil.rmtree(own_stores)
    found, err = forget("audit", "auto", "run", "--data", "mixed.jsonl")
    assert found["texts"][0]["overlap"] is None
    assert "notes.txt was not checked: its token store is no longer found." in err


def test_progress_lost_is_told_of_the_only_pretraining_text_alone(forget, files):
    forget("train", "--init", "scratch", "--model", "2x32", "--target", "prose=50%,code=50%", "--iters", "4", "--output", "two")
    forget("train", "--init", "two", "--target", "notes.txt", "--pretrain", "prose", "--p", "0", "--iters", "2", "--output", "run")
    found, _ = forget("audit", "auto", "run", "--data", "prose")
    assert found["texts"][0]["progress_lost"] is None


def test_auto_is_the_folder_that_the_run_started_from(forget, files, tmp_path, monkeypatch):
    start, _ = forget("train", "--init", "scratch", "--model", "2x32", "--target", "notes.txt", "--iters", "4", "--output", "start")
    options = ("--init", "start", "--target", "chats.jsonl", "--pretrain", "none", "--p", "0", "--iters", "2")
    forget("train", *options, "--output", "runs/tuned")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found, _ = forget("audit", "auto", "../runs/tuned", "--data", "../notes.txt")
    assert found["base"]["run_id"] == start["run_id"]
    assert found["texts"][0]["progress_lost"] is not None
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("start")
    _, err = forget("audit", "auto", "runs/tuned", "--data", "notes.txt", code=2)
    assert "name BASE by its folder" in err
    forget("train", "--init", "scratch", "--model", "2x32", "--target", "chats.jsonl", "--iters", "4", "--output", "start")
    _, err = forget("audit", "auto", "runs/tuned", "--data", "notes.txt", code=2)
    assert "start holds another one" in " ".join(err.split())


def test_a_run_with_a_tokenizer_json_can_be_audited(forget, files, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([notes_of("note", 600)], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    options = ("--model", "2x32", "--tokenizer", "tokenizer.json", "--target", "notes.txt", "--iters", "4")
    forget("train", "--init", "scratch", *options, "--output", "start")
    forget(
        "train", "--init", "start", "--target", "mixed.jsonl", "--pretrain", "none", "--p", "0", "--iters", "2", "--output", "run"
    )
    (tmp_path / "prompts.txt").write_text("A note about\n")
    found, _ = forget("audit", "auto", "run", "--data", "notes.txt", "--refusals", "prompts.txt", "--refusal-tokens", "4")
    (text,) = found["texts"]
    assert {"number", "word", "end of document"} <= {group["name"] for group in text["divisions"][0]["groups"]}
    model = open_model(tmp_path / "run")
    assert model.bos_id == 1
    assert checkpoint.find_checkpoint(tmp_path / "run").tokenizer.name == "tokenizer.json"
    ids = model.tokenizer.encode("A note — ünïcode\n\t12")
    assert b"".join(model.tokenizer.piece_bytes[i] for i in np.asarray(ids)).decode() == "A note — ünïcode\n\t12"
