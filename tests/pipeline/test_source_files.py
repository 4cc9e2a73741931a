"""Which files a name stands for, and which of them are trained on."""

import json

import pytest

from mlx_forget.errors import UserError
from mlx_forget.pipeline.source_files import content_hash, find_files, find_splits
from mlx_forget.pipeline.sources import Reading, read_documents


def write(folder, *names):
    """A file for each name, which holds it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}))


def found(folder, **options):
    return {str(file.relative_to(folder)): split for file, split in find_splits(folder, **options)}


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


def test_splits_of_a_purpose_are_read_and_their_test_files_are_not(tmp_path):
    write(tmp_path, "train_sft-00000-of-00002.jsonl", "train_sft-00001-of-00002.jsonl", "test_sft.jsonl", "test/a.jsonl")
    assert set(found(tmp_path)) == {"train_sft-00000-of-00002.jsonl", "train_sft-00001-of-00002.jsonl"}
    assert found(tmp_path, split="test_sft") == {"test_sft.jsonl": None}


def test_splits_of_a_purpose_validate_and_the_outermost_folder_decides(tmp_path):
    write(tmp_path, "train_sft.jsonl", "validation_sft.jsonl", "test_sft.jsonl", "dev_gen.jsonl")
    assert found(tmp_path) == {"train_sft.jsonl": "train", "validation_sft.jsonl": "validation", "dev_gen.jsonl": None}
    write(tmp_path / "b", "train/test-driven.jsonl", "train/test_a.jsonl", "valid/train.jsonl", "test/train.jsonl")
    assert found(tmp_path / "b") == {
        "train/test-driven.jsonl": "train",
        "train/test_a.jsonl": "train",
        "valid/train.jsonl": "validation",
    }


def test_files_about_tests_are_data_where_nothing_is_about_training(tmp_path):
    write(tmp_path, "test_results.jsonl", "notes.jsonl")
    assert set(found(tmp_path)) == {"test_results.jsonl", "notes.jsonl"}


@pytest.mark.parametrize("place", [".", "*.jsonl"])
def test_one_split_of_a_folder_is_read_alone_and_holds_out_a_share(tmp_path, place):
    lines = "\n".join(json.dumps({"text": f"line {i}"}) for i in range(200))
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text(lines.replace("line", name))
    for split, name in (("test", "test"), ("validation", "valid"), ("train", "train")):
        read = list(read_documents(tmp_path / place, Reading(split=split)))
        assert len(read) == 200
        assert all(text.startswith(name) for _, text in read)
        assert {side for side, _ in read} == {"train", "validation"}
    with pytest.raises(UserError, match=r"Unknown split 'dev_sft'.*Known: test, train, valid"):
        find_files(tmp_path / place, split="dev_sft")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("notes.jsonl", {"split": "train"}, "one file, without configurations and splits: leave --config and --split out"),
        ("*.jsonl", {"config": "de"}, "a pattern, without configurations: leave --config out"),
        (".", {"split": "train"}, "no splits by name: leave --split out"),
    ],
)
def test_what_has_no_splits_is_not_asked_for_one(tmp_path, name, options, message):
    write(tmp_path, "notes.jsonl")
    with pytest.raises(UserError, match=message):
        find_files(tmp_path / name, **options)


def card(folder, *splits):
    lines = "".join(f"\n  - split: {split}\n    path: '{path}'" for split, path in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:{lines}\n---\n")


def test_a_file_in_two_splits_of_a_repository_validates(tmp_path):
    write(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl")
    card(tmp_path, ("train", "*.jsonl"), ("validation", "b.jsonl"), ("test_sft", "c.jsonl"))
    assert found(tmp_path) == {"a.jsonl": "train", "b.jsonl": "validation"}
    card(tmp_path, ("validation", "b.jsonl"), ("train", "*.jsonl"), ("test", "c.jsonl"))
    assert found(tmp_path) == {"a.jsonl": "train", "b.jsonl": "validation"}
    assert set(found(tmp_path, split="train")) == {"a.jsonl", "b.jsonl", "c.jsonl"}


def test_the_content_hash_follows_what_a_card_says_of_the_splits(tmp_path):
    write(tmp_path, "a.jsonl", "b.jsonl")
    card(tmp_path, ("train", "*.jsonl"))
    before = content_hash(tmp_path)
    card(tmp_path, ("train", "a.jsonl"), ("validation", "b.jsonl"))
    assert content_hash(tmp_path) != before


def test_a_repository_without_a_train_split_is_read_where_it_has_one_split(tmp_path):
    write(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl")
    card(tmp_path, ("train_sft", "a.jsonl"), ("test_sft", "c.jsonl"))
    assert found(tmp_path) == {"a.jsonl": "train"}
    card(tmp_path, ("train_sft", "a.jsonl"), ("validation", "b.jsonl"), ("test_sft", "c.jsonl"))
    assert found(tmp_path) == {"a.jsonl": "train", "b.jsonl": "validation"}
    card(tmp_path, ("train_sft", "a.jsonl"), ("validation_sft", "b.jsonl"), ("validation_gen", "c.jsonl"))
    assert found(tmp_path) == {"a.jsonl": "train", "b.jsonl": "validation"}
    card(tmp_path, ("validation", "b.jsonl"))
    assert found(tmp_path) == {"b.jsonl": "validation"}
    card(tmp_path, ("en", "b.jsonl"))
    assert found(tmp_path) == {"b.jsonl": None}
    card(tmp_path, ("test", "b.jsonl"))
    with pytest.raises(UserError, match="no train split: choose one with --split: test"):
        find_files(tmp_path)
    card(tmp_path, ("train_sft", "a.jsonl"), ("train_gen", "b.jsonl"), ("test_sft", "c.jsonl"))
    with pytest.raises(UserError, match="no train split: choose one with --split: train_sft, train_gen, test_sft"):
        find_files(tmp_path)
    assert found(tmp_path, split="train_gen") == {"b.jsonl": None}
