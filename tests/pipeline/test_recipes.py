"""Every recipe of a public corpus is read from tiny files of the same schema, by name, offline."""

import gzip
import json
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlx_forget.errors import UserError
from mlx_forget.pipeline import hub, recipes
from mlx_forget.pipeline.catalog import documents_of
from mlx_forget.pipeline.conversations import Conversation, Fields
from mlx_forget.pipeline.hub import HubData, parse_id, read_hub
from mlx_forget.pipeline.sources import Reading

NAMES = recipes.names()


def made_up(schema, i):
    """A record of a schema."""
    if isinstance(schema, dict):
        return {key: made_up(value, i) for key, value in schema.items()}
    if isinstance(schema, list):
        return [made_up(schema[0], i), made_up(schema[0], i)]
    return {"string": f"value {i}", "number": 0.5 * i}[schema]


def records(recipe, num=60):
    """Records as the corpus has them, every second one of another subset where there are subsets."""
    for i in range(num):
        record = made_up(recipe.schema, i)
        for column, value in recipe.fields.where:
            outer, inner = column.split(".")
            record[outer][inner] = value if i % 2 else "Another set"
        if "conversations" in record:
            record["conversations"] = [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": f"question {i}", "weight": 0.0},
                {"from": "gpt", "value": f"answer {i}", "weight": 1.0},
            ]
        if recipe.name == "wikitext-103":
            record["text"] = ["", f" = Article {i} = \n", f"A line of {i}.\n", " = = Part = = \n"][i % 4]
        yield record


def write(folder, recipe):
    """A tiny copy of the corpus, in its own format."""
    rows = list(records(recipe))
    pattern = dict(recipe.files).get("train", "data/train-00000.parquet")
    path = folder / pattern.replace("*", "0")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
            stream.write(text)
    else:
        path.write_text(json.dumps(rows))
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_reads_files_of_its_schema(tmp_path, name):
    recipe = recipes.load(name)
    rows = write(tmp_path, recipe)
    found = [content for _, content in documents_of(name, folder=tmp_path).read()]
    if name == "wikitext-103":
        assert len(found) == 15
        assert found[0] == " = Article 1 = \nA line of 2.\n = = Part = = \n"
    elif recipe.fields.where:
        assert len(found) == len(rows) // 2
    else:
        assert len(found) == len(rows)
    learnt = [isinstance(content, Conversation) for content in found]
    assert all(learnt) if name in ("openhermes", "openorca") else not any(learnt)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_where_its_corpus_is_and_under_which_terms(name):
    recipe = recipes.load(name)
    assert parse_id(f"hf:{recipe.id}") == HubData(recipe.id)
    assert len(recipe.revision) == 40
    assert recipe.licence
    assert recipe.description
    assert recipe.role in ("target", "pretraining")
    assert recipe.fields.columns() & set(recipe.schema)


def test_twelve_domains_of_the_pile_over_its_five_categories():
    categories = Counter(recipes.load(name).category for name in NAMES if name.startswith("pile-"))
    assert sum(categories.values()) == 12
    assert set(categories) == {"academic", "internet", "prose", "dialogue", "misc"}


@pytest.mark.parametrize("pattern", ["../../etc/passwd", "/etc/passwd", "a/../../b"])
def test_a_recipe_whose_files_lead_out_is_refused(tmp_path, pattern):
    path = tmp_path / "x.yaml"
    keys = f"files: {{train: '{pattern}'}}"
    path.write_text(f"description: x\nrole: target\nid: a/b\nrevision: c\nlicence: d\nschema: {{}}\n{keys}\n")
    with pytest.raises(UserError, match="lead out"):
        recipes.read_recipes(path)


@pytest.mark.parametrize(
    "keys, message",
    [
        ("subsets: [a]", "subsets must be a mapping of names to mappings"),
        ("subsets: {a: b}", "subsets must be a mapping of names to mappings"),
        ("files: [train.jsonl]", "files must be a mapping of keys to values"),
        ("subsets: {a: {fields: text}}", "fields must be a mapping of keys to values"),
        ("fields: {where: yes}", "where one of columns to values"),
        ("files: {train: [1]}", "files must be patterns, or lists of them"),
    ],
)
def test_a_recipe_of_another_shape_is_refused(tmp_path, keys, message):
    path = tmp_path / "x.yaml"
    schema = "" if "schema" in keys else "schema: {}\n"
    path.write_text(f"description: x\nrole: target\nid: a/b\nrevision: c\nlicence: d\n{schema}{keys}\n")
    with pytest.raises(UserError, match=message):
        recipes.read_recipes(path)


def test_a_recipe_with_a_wrong_or_missing_key_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("description: x\nrole: target\nid: a/b\nrevision: c\nlicense: d\nschema: {}\n")
    with pytest.raises(UserError, match="unexpected keyword argument 'license'"):
        recipes.read_recipes(path)


@pytest.mark.parametrize("name", ["../figure1", "corpora/pile", "pile"])
def test_names_are_no_paths(name):
    with pytest.raises(UserError, match="Unknown recipe"):
        recipes.load(name)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("hf:a/b", HubData("a/b")),
        ("owner/name:config@main", HubData("owner/name", "config", "main")),
        ("owner/name@refs/pr/1", HubData("owner/name", None, "refs/pr/1")),
        ("meta-llama/Llama-3.2-1B-Instruct", HubData("meta-llama/Llama-3.2-1B-Instruct")),
        ("Qwen/Qwen2.5-0.5B", HubData("Qwen/Qwen2.5-0.5B")),
        ("mistralai/Mistral-7B-v0.1@v1.0", HubData("mistralai/Mistral-7B-v0.1", None, "v1.0")),
        ("notes.txt", None),
        ("owner/notes.txt", None),
        ("owner/notes.jsonl.gz", None),
        ("tests/nothing", None),
        ("a/b/c", None),
    ],
)
def test_names_of_hub_data(name, expected, monkeypatch):
    monkeypatch.chdir(recipes.resources.path("..").resolve())
    assert parse_id(name) == expected


def test_a_name_that_claims_to_be_an_id_and_is_none_is_refused():
    with pytest.raises(UserError, match="no id of a data set"):
        parse_id("hf:notes")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository on disk that `datasets` reads as it reads the Hub's."""
    pytest.importorskip("datasets")
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for split, num in (("train", 200), ("validation", 20), ("test", 10)):
        rows = [{"text": f"{split} {i}", "prompt": "x", "id": i} for i in range(num)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_data_set_is_streamed_with_its_own_validation_split(repository):
    found = list(read_hub(HubData(str(repository)), Reading()))
    assert Counter(split for split, _ in found) == {"train": 200, "validation": 20}
    assert ("validation", "validation 3") in found


def test_one_split_of_a_data_set_validates_on_a_share(repository, monkeypatch):
    monkeypatch.setattr(hub, "_num_bytes", lambda rows: 1000)
    found = list(read_hub(HubData(str(repository)), Reading(split="train", fields=Fields(text="text"))))
    counts = Counter(split for split, _ in found)
    assert sum(counts.values()) == 200
    assert 0 < counts["validation"] < 80
    with pytest.raises(UserError, match="Unknown split 'dev'"):
        list(read_hub(HubData(str(repository)), Reading(split="dev")))


def test_a_column_that_is_not_there_is_named(repository):
    with pytest.raises(UserError, match="expected one JSON object with a"):
        list(read_hub(HubData(str(repository)), Reading(fields=Fields(text="body"))))


class Rows(list):
    """A split of a data set in memory."""

    column_names = None


def broken_off():
    yield {"text": "one"}
    raise ConnectionError("Connection reset by peer")


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"test": Rows([{"text": "x"}])}, "has no train split: choose one with --split"),
        ({"train": Rows([{"text": " "}, {"text": ""}])}, "holds no text"),
        ({"train": Rows()}, "holds no text"),
    ],
)
def test_a_data_set_without_text_to_learn_is_refused(monkeypatch, splits, message):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **keywords: splits)
    with pytest.raises(UserError, match=message):
        list(read_hub(HubData("a/b"), Reading()))


def test_a_connection_that_breaks_off_is_one_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")

    class Streamed:
        column_names = ("text",)

        def select_columns(self, names):
            return broken_off()

    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **keywords: {"train": Streamed()})
    with pytest.raises(UserError, match="a/b cannot be reached and is not in the cache: Connection reset by peer"):
        list(read_hub(HubData("a/b"), Reading()))


def test_files_of_a_recipe_are_asked_for_by_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.update(k) or {"train": Rows([{"text": "x"}])})
    data = HubData("a/b", files=(("train", "x*.gz"), ("train", "y*.gz"), ("validation", "z.gz")))
    assert [text for _, text in read_hub(data, Reading())] == ["x"]
    assert asked["data_files"] == {"train": ["x*.gz", "y*.gz"], "validation": ["z.gz"]}


def test_the_hub_without_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'mlx-forget\[hf\]'"):
        list(read_hub(HubData("a/b"), Reading()))


class _Error(Exception):
    pass


@pytest.mark.parametrize(
    "kind, text, message",
    [
        (
            "DatasetNotFoundError",
            "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.",
            "does not exist on the Hub, or is private",
        ),
        ("DatasetNotFoundError", "Dataset 'a/b' is a gated dataset on the Hub.", "needs a login"),
        ("GatedRepoError", "403", "needs a login"),
        ("ConnectError", "Name or service not known", "cannot be reached"),
        ("OfflineModeIsEnabled", "Cannot reach", "cannot be reached"),
        ("ValueError", "Config name is missing. Please pick one among ['a', 'b']", "--config"),
        ("ArrowInvalid", "Something", "cannot be read"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_a_way_out(monkeypatch, kind, text, message):
    datasets = pytest.importorskip("datasets")

    def refuse(*arguments, **keywords):
        raise type(kind, (_Error,), {})(text)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=message):
        list(read_hub(HubData("a/b"), Reading()))


def test_stores_of_hub_data_are_told_apart_by_configuration_and_revision():
    """Names differ in what comes last, and a store's folder takes the beginning of the key."""
    names = ("hf:wikimedia/wikipedia:20231101.en", "hf:wikimedia/wikipedia:20231101.de", "hf:allenai/tulu-v2.5", "hf:allenai/tulu-v2.6",
             "hf:allenai/tulu@v1.0", "hf:allenai/tulu@v1.1")  # fmt: skip
    keys = {documents_of(name).key[:16] for name in names}
    assert len(keys) == len(names)
    assert all(set(key) <= set("0123456789abcdef") for key in keys)
