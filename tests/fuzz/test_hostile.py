"""Small files that ask for much: sizes that are lies, aliases of aliases, links in circles, pipes. Each is refused, or read at its own size.

Every test runs under a limit of memory and of CPU time far below what the file asks for.
"""

import gzip
import json
import os
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mlx_forget.config import TrainConfig
from mlx_forget.config_layers import from_layers
from mlx_forget.durable_files import sha256_of
from mlx_forget.errors import UserError
from mlx_forget.history import HistoryWriter, read_history
from mlx_forget.pipeline.formats import BadInput, read_records, read_texts
from mlx_forget.pipeline.recipes import read_recipes
from mlx_forget.pipeline.source_files import files_below
from mlx_forget.pipeline.sources import read_documents
from mlx_forget.pipeline.store import open_store
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.pretrained import read_pretrained
from mlx_forget.strict_yaml import read_yaml
from mlx_forget.sweeps.grid import read_recipe
from mlx_forget.tables import read_table
from mlx_forget.weight_files import tensor_names, weight_files
from tests.fuzz.given_files import ROW, SAMPLE, model_folder

GIGABYTE = 1 << 30


@pytest.fixture(autouse=True)
def limits():
    """Two gigabytes more than there is now, and a minute of CPU: what takes more hangs."""
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[5]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 0
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * GIGABYTE, before[1]))
    handler = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, 60)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, handler)
    resource.setrlimit(resource.RLIMIT_DATA, before)


def _too_long(number, frame):
    raise TimeoutError("a minute of CPU time")


def said_by(read):
    """The sentence that a reader refuses with, or None."""
    try:
        read()
    except UserError as error:
        return str(error)


# --- YAML


def aliases_of_aliases(levels=30):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def merges_of_merges(levels=30):
    lines = ["a0: &a0 {k: 1}"] + [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("text", [aliases_of_aliases(), merges_of_merges()])
@pytest.mark.parametrize("read", [read_yaml, read_recipe, read_recipes, lambda path: from_layers(TrainConfig, read_yaml(path))])
def test_aliases_that_stand_for_a_billion_values_are_refused(tmp_path, text, read):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="more than 200,000 values"):
        read(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "? &k [*k]\n: 1"])
def test_an_alias_of_itself_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="a part of itself"):
        read_yaml(tmp_path / "c.yaml")


def test_aliases_as_people_write_them_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("shared: &s {iters: 8, p: 1%}\narms: {a: *s, b: {<<: *s, p: 2%}}\n")
    assert read_yaml(tmp_path / "c.yaml")["arms"] == {"a": {"iters": 8, "p": "1%"}, "b": {"iters": 8, "p": "2%"}}


@pytest.mark.full
def test_eighty_thousand_keys_are_compared_once_each(tmp_path):
    (tmp_path / "c.yaml").write_text("".join(f"k{i}: 1\n" for i in range(80_000)))
    assert len(read_yaml(tmp_path / "c.yaml")) == 80_000


@pytest.mark.parametrize(
    "head",
    ["a: " + "[" * 5000, "configs: 2001-99-99", "configs: [{config_name: a, data_files: [{path: [5, {}]}]}]", aliases_of_aliases()],
)
def test_the_head_of_a_dataset_card_is_read_as_carefully(tmp_path, head):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    (tmp_path / "a.txt").write_text("some words\n")
    assert said_by(lambda: list(read_documents(tmp_path))) in (
        None,
        f"{tmp_path / 'README.md'} lists no data files of a known format.",
    )


# --- paths that climb out, and links


@pytest.mark.parametrize("pattern", ["../*.txt", "/etc/*", "a/../../*.txt", "..", "../secret/**"])
def test_a_recipe_and_a_dataset_card_cannot_climb_out(tmp_path, pattern):
    (tmp_path / "pile.yaml").write_text(
        f"description: d\nrole: r\nid: o/n\nrevision: x\nlicence: l\nschema: {{text: string}}\nfiles: {{train: '{pattern}'}}\n"
    )
    with pytest.raises(UserError, match="lead out"):
        read_recipes(tmp_path / "pile.yaml")
    with pytest.raises(UserError, match="lead out"):
        files_below(tmp_path, pattern)


def test_links_in_circles_are_not_followed_and_links_out_are_refused(tmp_path):
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("x\n")
    for name in ("one", "two", "three"):
        (folder / name).symlink_to(folder)
    assert [file.name for file in files_below(folder, "**/*.txt")] == ["a.txt"]
    assert list(read_documents(folder))
    (tmp_path / "secret.txt").write_text("y\n")
    (folder / "b.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="a link that leads out"):
        files_below(folder, "*.txt")
    (folder / "four").symlink_to(tmp_path)
    assert [file.name for file in files_below(folder, "four/*.txt")] == []


@pytest.mark.parametrize("pattern, found", [
    ("*.txt", ["a.txt"]), ("**/*.txt", ["a.txt", "b.txt", "c.txt"]), ("x/*", ["b.txt"]), ("x/**", ["b.txt", "c.txt"]),
    ("**/y/**/**/c.*", ["c.txt"]), ("?/y/[a-c].txt", ["c.txt"]), (".h/*", ["d.txt"]), ("x", []), ("", []), ("**foo", []),
])  # fmt: skip
def test_patterns_mean_what_they_mean_on_the_hub(tmp_path, pattern, found):
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", ".h/d.txt", "x/.e.txt", "x/other.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("t")
    assert [file.name for file in files_below(tmp_path, pattern)] == found


@pytest.mark.parametrize("kind", ["pipe", "endless"])
@pytest.mark.parametrize("name", ["manifest.json", "train-00000.arrow", "tokenizer.model"])
def test_a_store_of_pipes_and_devices_is_refused(tmp_path, name, kind):
    for file in SAMPLE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"damaged|no ordinary file"):
        load_vocabulary(tmp_path / name) if name == "tokenizer.model" else open_store(tmp_path)


def test_ids_outside_of_the_vocabulary_are_refused(tmp_path):
    for file in SAMPLE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": 3}))
    with pytest.raises(UserError, match=r"outside of its vocabulary|does not match"):
        open_store(tmp_path)


# --- sizes that are lies


def test_a_long_element_of_an_array_is_looked_at_a_few_times_only(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "' + "ab " * 10_000_000 + '"}, {"text": "b"}' + ', {"text": "c"}' * 200_000 + "]")
    found = [len(record["text"]) for _, record in read_records(path, BadInput(), columns=set())]
    assert found == [30_000_000, *[1] * 200_001]


def test_what_unpacks_to_much_is_read_in_pieces(tmp_path):
    """A thousand times as much as the file: 100 MB of one line each."""
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        for _ in range(100):
            file.write(b"\0" * 1_000_000)
    with pa.CompressedOutputStream(pa.OSFile(str(tmp_path / "a.txt.zst"), "wb"), "zstd") as stream:
        for _ in range(100):
            stream.write(b"\0" * 1_000_000)
    for name in ("a.txt.gz", "a.txt.zst"):
        assert (tmp_path / name).stat().st_size < 1_000_000
        assert max(len(text) for text in read_texts(tmp_path / name, BadInput())) <= 1_000_000


def test_a_line_that_never_ends_is_passed_over(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b'{"text": "a"}\n')
        for _ in range(70):
            file.write(b" " * 1_000_000)
    bad = BadInput(skip=True)
    assert len(list(read_records(tmp_path / "a.jsonl.gz", bad, columns=set()))) == 1
    assert bad.counts == {"line too long": 1}


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_safetensors_header_of_another_size_is_refused(tmp_path, size):
    model_folder(tmp_path / "config.json")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", size) + content[8:])
    with pytest.raises(UserError, match=r"safetensors file|cut short"):
        tensor_names(tmp_path / "model.safetensors")


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}, {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]},
    {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}, {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
    {"dtype": 5, "shape": [4], "data_offsets": [0, 16]}, {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}, [], None,
])  # fmt: skip
def test_a_tensor_that_is_not_as_large_as_its_shape_is_refused(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(UserError, match="not a whole safetensors file"):
        tensor_names(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "", 5])
def test_an_index_of_weights_cannot_name_files_elsewhere(tmp_path, name):
    model_folder(tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"outside of the checkpoint|is damaged"):
        weight_files(tmp_path)


@pytest.mark.parametrize("value", ["1e999", "1" + "0" * 400, "-1", "[]", '"x"', "null", "{}"])
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "architectures", "quantization", "num_hidden_layers"])
def test_a_model_of_any_size_is_read_or_refused(tmp_path, key, value):
    model_folder(tmp_path / "config.json")
    content = json.loads((tmp_path / "config.json").read_text())
    text = json.dumps({**content, key: "HERE"}).replace('"HERE"', value)
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in (said_by(lambda: read_pretrained(tmp_path)) or "config.json is read")


def test_arrow_messages_that_ask_for_more_than_there_is_are_refused(tmp_path):
    with HistoryWriter(tmp_path / "h.arrows") as writer:
        writer.append(ROW)
    good = (tmp_path / "h.arrows").read_bytes()
    rows = tmp_path / "t.arrow"
    for place in range(8, len(good) - 8, 8):
        lied = good[:place] + struct.pack("<q", 1 << 45) + good[place + 8 :]
        (tmp_path / "h.arrows").write_bytes(lied)
        rows.write_bytes(lied)
        for read in (lambda: read_history(tmp_path / "h.arrows"), lambda: read_table(rows), lambda: list(read_documents(rows))):
            assert said_by(read) != ""


def test_a_table_of_numbers_without_end_is_read(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"N": 1' + "0" * 400 + ', "D": 1, "loss": NaN, "x": -1' + "0" * 350 + "}\n")
    table = read_table(tmp_path / "t.jsonl")
    assert table.columns["N"].tolist() == [np.inf]
    assert table.columns["x"].tolist() == [-np.inf]
    assert np.isnan(table.columns["loss"]).all()


def test_a_checksum_of_what_never_ends_is_refused():
    with pytest.raises(OSError, match="no ordinary file"):
        sha256_of("/dev/zero")
