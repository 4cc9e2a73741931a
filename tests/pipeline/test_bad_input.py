"""What `forget prepare` and `forget train` say to data that cannot be used; more of it is beside the reader of each format."""

import json
from pathlib import Path

import pytest

TOKENIZER = Path(__file__).parent / "samples" / "store-v1" / "tokenizer.model"
WORDS = "a b c d e f g h i j k l m n o p q r s t u v w x y z and more words, to have a row of text"


@pytest.fixture
def prepare(run_forget, tmp_path):
    def call(lines, *options, validation=None):
        folder = tmp_path / "data"
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        if validation is not None:
            (folder / "valid.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in validation))
        return run_forget("prepare", folder, "-o", tmp_path / "s", "--tokenizer", TOKENIZER, *options)

    return call


@pytest.fixture
def train(run_forget, tmp_path):
    def call(store):
        sizes = ("--model", "1x16", "--init", "scratch", "--max-seq-length", 64, "--iters", 2, "--pretrain", store, "--dry-run")
        return run_forget("train", "--target", store, *sizes)

    return call


def test_empty_documents_are_left_out_and_nothing_but_them_is_refused(prepare, tmp_path):
    code, _, err = prepare(["", "  \n"])
    assert code == 2
    assert "holds no text." in err
    assert list(tmp_path.glob("*s*")) == []


def test_empty_documents_among_others_do_no_harm(prepare):
    code, out, err = prepare(["", WORDS, "  "], "--json")
    assert code == 0, err
    assert sum(split["num_documents"] for split in json.loads(out)["splits"].values()) == 1


def test_one_document_is_prepared_and_cannot_be_evaluated(prepare, train, tmp_path):
    code, _, err = prepare([WORDS])
    assert code == 0
    assert "No document was held out to validate on" in err
    code, _, err = train(tmp_path / "s")
    assert code == 2
    assert "has no validation split (it has train)" in err


@pytest.mark.parametrize("validation", [[], ["x"]])
def test_a_split_without_a_row_says_what_to_do(prepare, train, tmp_path, validation):
    assert prepare([WORDS] * 9, validation=validation)[0] == 0
    code, _, err = train(tmp_path / "s")
    assert code == 2
    wanted = (
        "smaller than one row of 64 tokens: give more text, or a shorter --max-seq-length." if validation else "no validation split"
    )
    assert wanted in " ".join(err.split())


def test_a_line_that_no_memory_should_hold_is_named_or_counted(prepare, monkeypatch, run_forget, tmp_path):
    monkeypatch.setattr("mlx_forget.pipeline.formats._MOST_BYTES_PER_LINE", 1 << 20)
    code, _, err = prepare([WORDS, "word " * 300_000, WORDS + "!"])
    assert code == 2
    assert "line 2: a line is longer than 1 MB: cut its document into several. It begins" in err
    options = ("--tokenizer", TOKENIZER, "--on-error", "skip", "--json")
    code, out, _ = run_forget("prepare", tmp_path / "data", "-o", tmp_path / "s", *options)
    assert code == 0
    facts = json.loads(out)
    assert facts["skipped"] == {"line too long": 1}
    assert sum(split["num_documents"] for split in facts["splits"].values()) == 2
