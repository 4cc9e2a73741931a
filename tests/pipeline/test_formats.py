"""Every format gives the same documents, and what cannot be read is named or counted."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlx_forget.errors import UserError
from mlx_forget.pipeline.conversations import Conversation, Fields
from mlx_forget.pipeline.formats import BadInput
from mlx_forget.pipeline.source_files import find_files
from mlx_forget.pipeline.sources import Reading, read_documents

ROWS = [{"text": f"document {i}, ünï", "id": i, "meta": {"set": "even" if i % 2 == 0 else "odd"}} for i in range(700)]
TEXTS = sorted(row["text"] for row in ROWS)


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd_frame(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write(path):
    table = pa.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=300)
    elif path.name == "stream.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, 123)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif path.name == "array.json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        path.write_bytes({".gz": gzip.compress, ".zst": zstd_frame}.get(path.suffix, bytes)(lines()))
    return path


def texts(path, **options):
    return sorted(content for _, content in read_documents(path, Reading(**options)))


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "array.json", "a.parquet", "a.arrow", "stream.arrow"],
)
def test_every_format_of_records_gives_the_same_documents(tmp_path, name):
    assert texts(write(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".md.zst"])
def test_compressed_text_is_cut_as_plain_text_is(tmp_path, suffix):
    text = "".join(f"{i} wörds and words\n" for i in range(120_000))
    (tmp_path / "plain.txt").write_text(text)
    packed = gzip.compress if suffix.endswith(".gz") else zstd_frame if suffix.endswith(".zst") else bytes
    (tmp_path / f"a{suffix}").write_bytes(packed(text.encode()))
    pieces = [content for _, content in read_documents(tmp_path / f"a{suffix}")]
    assert "".join(pieces) == text
    assert pieces == [content for _, content in read_documents(tmp_path / "plain.txt")]


def test_a_text_without_line_ends_is_cut_in_the_end(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 3_500_000)
    assert [len(content) for _, content in read_documents(tmp_path / "a.txt")] == [1_000_000] * 3 + [500_000]


def test_folders_globs_and_parts_of_splits(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text("# A card\n")
    assert sorted(read_documents(tmp_path)) == [
        ("train", "train-00000-of-00002"),
        ("train", "train-00001-of-00002"),
        ("validation", "validation-00000-of-00001"),
    ]
    assert len(find_files(tmp_path / "train-*.parquet")) == 2
    assert {split for split, _ in read_documents(tmp_path / "*.parquet")} == {"train", "validation"}
    with pytest.raises(UserError, match="No file matches"):
        find_files(tmp_path / "*.jsonl")


def test_a_dataset_repository_is_read_as_its_card_says(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        for split in ("train", "validation", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text(json.dumps({"text": f"{name} {split}"}))
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.*\n  - split: validation\n    path: {name}/validation.*\n"
        for name in ("en", "de")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# A card\n")
    with pytest.raises(UserError, match=r"several configurations.*en, de"):
        list(read_documents(tmp_path))
    assert sorted(read_documents(tmp_path, Reading(config="de"))) == [("train", "de train"), ("validation", "de validation")]
    assert {content for _, content in read_documents(tmp_path, Reading(config="de", split="validation"))} == {"de validation"}
    with pytest.raises(UserError, match="Unknown configuration 'fr'"):
        list(read_documents(tmp_path, Reading(config="fr")))


@pytest.mark.parametrize("pattern", ["../secret.jsonl", "/etc/passwd", "a/../../secret.jsonl"])
def test_data_files_that_lead_out_of_their_folder_are_refused(tmp_path, pattern):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}')
    (tmp_path / "repository").mkdir()
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {pattern}\n---\n"
    (tmp_path / "repository" / "README.md").write_text(card)
    with pytest.raises(UserError, match="lead out"):
        list(read_documents(tmp_path / "repository"))


def test_links_that_lead_out_of_a_repository_are_refused(tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}')
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "a.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "repository" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n")
    with pytest.raises(UserError, match="leads out"):
        list(read_documents(tmp_path / "repository"))


def test_columns_conditions_and_lengths(tmp_path):
    path = write(tmp_path / "a.parquet")
    odd = texts(path, fields=Fields(where=(("meta.set", "odd"),)))
    assert odd == sorted(row["text"] for row in ROWS[1::2])
    assert texts(path, fields=Fields(text="meta.set"))[:2] == ["even", "even"]
    assert texts(path, min_chars=len("document 100, ünï")) == sorted(row["text"] for row in ROWS[100:])
    assert texts(path, max_chars=len("document 1, ünï")) == sorted(row["text"] for row in ROWS[:10])
    with pytest.raises(UserError, match=r"Every document .* was left out: 700 too short"):
        texts(path, min_chars=1000)


def test_exact_repetitions_go(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines() + lines(ROWS[:50]))
    assert len(texts(tmp_path / "a.jsonl")) == 750
    assert texts(tmp_path / "a.jsonl", once=True) == TEXTS


@pytest.mark.parametrize("num_files", [1, 6])
def test_parts_make_up_the_whole(tmp_path, num_files):
    for i in range(num_files):
        (tmp_path / f"{i}.jsonl").write_bytes(lines(ROWS[i::num_files]))
    whole = sorted(read_documents(tmp_path))
    parts = [list(read_documents(tmp_path, Reading(part=(i, 3)))) for i in range(3)]
    assert all(parts)
    assert sorted(document for part in parts for document in part) == whole


def test_articles_are_joined_from_their_lines(tmp_path):
    rows = ["", " = One = \n", "a\n", " = = Section = = \n", "b\n", " = Two = \n", "c\n"]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    found = [content for _, content in read_documents(tmp_path / "a.parquet", Reading(fields=Fields(begins="^ = [^=].* = \n?$")))]
    assert found == [" = One = \na\n = = Section = = \nb\n", " = Two = \nc\n"]


BAD = {
    "invalid JSON": b'{"text": "one"}\n{"text": "tw\n{"text": "three"}\n',
    "missing field": b'{"text": "one"}\n{"words": "two"}\n{"text": "three"}\n',
    "wrong type": b'{"text": "one"}\n{"text": 2}\n{"text": "three"}\n',
    "not an object": b'{"text": "one"}\n[1]\n{"text": "three"}\n',
    "not UTF-8": b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "three"}\n',
    "surrogate": b'{"text": "one"}\n{"text": "\\ud800"}\n{"text": "three"}\n',
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_with_its_beginning_or_counted(tmp_path, kind):
    (tmp_path / "a.jsonl").write_bytes(BAD[kind])
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: "):
        list(read_documents(tmp_path / "a.jsonl"))
    bad = BadInput(skip=True)
    assert sorted(content for _, content in read_documents(tmp_path / "a.jsonl", bad=bad)) == ["one", "three"]
    assert sum(bad.counts.values()) == len(bad.examples) == 1


def test_the_first_eighty_characters_of_a_bad_line_are_shown(tmp_path):
    (tmp_path / "a.jsonl").write_text("x" * 79 + "yz" * 50)
    with pytest.raises(UserError, match=r"begins 'x{79}y'"):
        list(read_documents(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_a_truncated_file_is_named_or_counted(tmp_path, name):
    content = b"".join(b'{"text": "%d"}\n' % (i * 7919 % 100_003) for i in range(60_000))
    packed = gzip.compress(content) if name.endswith("gz") else zstd_frame(content)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=f"{name}.*truncated"):
        list(read_documents(tmp_path / name))
    bad = BadInput(skip=True)
    found = list(read_documents(tmp_path / name, bad=bad))
    assert found
    assert bad.counts["truncated file"] == 1


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_something_else_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else entirely, and long enough to look like it" * 10)
    with pytest.raises(UserError, match=f"Cannot read .*{name}|{name}"):
        list(read_documents(tmp_path / name))


def test_an_array_that_breaks_off_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS)[:-40])
    with pytest.raises(UserError, match="element 700: not valid JSON"):
        list(read_documents(tmp_path / "a.json"))


@pytest.mark.parametrize("end", ["", ",", ",\n  "])
def test_an_array_that_is_cut_between_elements_is_named(tmp_path, end):
    (tmp_path / "a.json").write_text(json.dumps(ROWS)[:-1] + end)
    with pytest.raises(UserError, match="ends after element 700, without ]"):
        list(read_documents(tmp_path / "a.json"))


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye"},
]
TURNS = (("user", "Be brief.\n\nHi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Bye"))


@pytest.mark.parametrize(
    "record, fields",
    [
        ({"messages": MESSAGES}, Fields()),
        ({"conversations": [{"from": m["role"], "value": m["content"]} for m in MESSAGES]}, Fields(messages="conversations")),
    ],
)
def test_conversations_keep_their_turns(tmp_path, record, fields):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert [content.turns for _, content in read_documents(tmp_path / "a.jsonl", Reading(fields=fields))] == [TURNS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = '{"text": "first"}\n{"text": "second"}\n' if name == "a.jsonl" else "first\nsecond\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert "".join(content for _, content in read_documents(tmp_path / name)).replace("\n", "") == "firstsecond"


def test_a_prompt_and_its_completion_are_a_conversation_of_two_turns(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"s": "Be kind.", "q": "Hi", "a": "Hello"}))
    fields = Fields(prompt="q", completion="a", system="s")
    (found,) = [content for _, content in read_documents(tmp_path / "a.jsonl", Reading(fields=fields))]
    assert found == Conversation((("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")))
    assert found.turns == (("user", "Be kind.\n\nHi"), ("assistant", "Hello"))
    assert found.text == "Be kind.\n\nHi\nHello"


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, "must be a list"),
        ({"messages": "hi"}, "must be a list"),
        ({"messages": [{"role": "user"}]}, '"content" must be a string'),
        ({"messages": [{"content": "x"}]}, 'must have "role"'),
        ({"messages": [{"role": "judge", "content": "x"}]}, "unknown role 'judge'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer to learn"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}, "calls a tool"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "x", "weight": 0.0}]}, "not to be learnt"),
        ({"prompt": "x"}, 'or "prompt" and "completion"'),
    ],
)
def test_a_conversation_that_is_none_is_refused(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        list(read_documents(tmp_path / "a.jsonl"))
