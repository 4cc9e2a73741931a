import json

import pytest

from mlx_forget.errors import UserError
from mlx_forget.pipeline.sources import read_documents


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
