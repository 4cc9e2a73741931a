import json

import pytest

from mlx_forget.errors import UserError
from mlx_forget.pipeline.sources import Reading, content_hash, find_files, read_documents


@pytest.mark.parametrize("num_lines", [300, 3000, 30_000])
def test_a_text_file_comes_back_whole_and_some_of_it_validates(tmp_path, num_lines):
    text = "".join(f"line {i}, {i * i} ünï\r\n" for i in range(num_lines))
    (tmp_path / "a.txt").write_bytes(text.encode())
    documents = list(read_documents(tmp_path / "a.txt"))
    assert "".join(text for _, text in documents) == text
    held_out = sum(len(text) for split, text in documents if split == "validation")
    assert 0 < held_out < 0.5 * len(text)


def test_a_file_on_one_line_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 10_000)
    assert len(list(read_documents(tmp_path / "a.txt"))) == 1


def test_the_split_of_a_document_does_not_depend_on_its_place(tmp_path):
    rows = [json.dumps({"text": f"document number {i}"}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n\n")
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(rows)))
    forward, backward = (sorted(read_documents(tmp_path / name), key=lambda row: row[1]) for name in ("a.jsonl", "b.jsonl"))
    assert forward == backward
    assert {split for split, _ in forward} == {"train", "validation"}


def test_files_named_train_and_valid_are_those_splits_and_test_is_left_out(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    assert sorted(read_documents(tmp_path)) == [("train", "train"), ("validation", "valid")]


def test_subfolders_named_train_valid_and_test_are_those_splits(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "part.txt").write_text(name)
    assert sorted(read_documents(tmp_path / "data")) == [("train", "train"), ("validation", "valid")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\nnot json', "line 2"),
        ("a.jsonl", b'{"words": "x"}', "line 1"),
        ("a.jsonl", b'{"text": 3}', "must be a string"),
        ("a.bin", b"x", "unknown format"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize(
    "card, reading, message",
    [
        ("configs: [{config_name: a, data_files: a.jsonl}]", {"split": "dev"}, "Unknown split 'dev'"),
        ("configs: [{config_name: a, data_files: b.jsonl}]", {}, "lists no data files of a known format"),
        ("configs: [{config_name: a, data_files: a.jsonl}]", {"config": "b"}, "Unknown configuration 'b'"),
        (
            "configs: [{config_name: a, data_files: a.jsonl}, {config_name: b, data_files: a.jsonl}]",
            {},
            "several configurations: choose one with --config: a, b",
        ),
        ("configs: none", {"config": "b"}, "has no configurations"),
        ("configs: [", {"config": "b"}, "has no configurations"),
    ],
)
def test_a_card_that_does_not_say_what_to_read_is_one_sentence(tmp_path, card, reading, message):
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\nA data set.\n")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UserError, match=message):
        list(read_documents(tmp_path, Reading(**reading)))


def test_two_stars_of_a_card_are_any_number_of_folders(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs: [{config_name: a, data_files: 'data/**/*.jsonl'}]\n---\n")
    for place in (".", "x", "x/y", ".hidden"):
        (tmp_path / "data" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / place / "a.jsonl").write_text(json.dumps({"text": f"of {place}"}))
    assert sorted(text for _, text in read_documents(tmp_path)) == ["of .", "of x", "of x/y"]


def test_missing_files_and_folders_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        find_files(tmp_path / "none")
    with pytest.raises(UserError, match="no files of a known format"):
        find_files(tmp_path)


def test_the_content_hash_follows_names_and_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = content_hash(tmp_path)
    (tmp_path / "a.txt").write_text("two")
    assert content_hash(tmp_path) != before
