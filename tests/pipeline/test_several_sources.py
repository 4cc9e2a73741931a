"""Several sources in one store: none of them validates that is trained on in another."""

import json

import pytest

from mlx_forget.errors import UserError
from mlx_forget.pipeline.catalog import documents_of, new_tokenizer, write_store
from mlx_forget.pipeline.sources import Reading
from mlx_forget.pipeline.tokenizer import train_tokenizer
from mlx_forget.pipeline.vocabularies import load_vocabulary

SHORT = [f"{i}. A note that both files have, about {i * i}." for i in range(300)]
LONG = [f"{i}. " + "A longer note, which only one of them has. " * 160 for i in range(800)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([*SHORT, *LONG], vocab_size=305).save(file)
    return file


@pytest.fixture
def files(tmp_path):
    for name, notes in (("small", SHORT), ("large", [*SHORT, *LONG])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": note}) for note in notes))
    return [str(tmp_path / "small.jsonl"), str(tmp_path / "large.jsonl")]


def prepared(files, tmp_path, tokenizer, **reading):
    store = write_store(tmp_path / "store", [documents_of(file, Reading(**reading)) for file in files], tokenizer)
    decode = load_vocabulary(tokenizer).decode
    return {name: [decode(split.document(i)) for i in range(split.num_documents)] for name, split in store.splits.items()}, store


def test_a_document_of_two_sources_is_in_one_split(files, tmp_path, tokenizer):
    alone = [{text for split, text in documents_of(file).read() if split == "validation"} for file in files]
    assert (alone[0] - alone[1]) & set(SHORT)
    texts, _ = prepared(files, tmp_path, tokenizer)
    assert not set(texts["train"]) & set(texts["validation"])
    assert sum(map(len, texts.values())) == 2 * len(SHORT) + len(LONG)


def test_a_source_with_splits_of_its_own_has_no_say_in_what_others_hold_out(files, tmp_path, tokenizer):
    own = tmp_path / "own"
    own.mkdir()
    for name in ("train", "valid"):
        (own / f"{name}.txt").write_text("".join(f"{name} {note}\n" for note in LONG))
    (alone,) = [{text for split, text in documents_of(files[0]).read() if split == "validation"}]
    texts, _ = prepared([str(own), files[0]], tmp_path, tokenizer)
    assert set(texts["validation"]) & set(SHORT) == alone


@pytest.mark.parametrize("step", [1, -1])
def test_repetitions_are_those_of_all_sources(files, tmp_path, tokenizer, step):
    """Also where nothing is left of the second one."""
    texts, store = prepared(files[::step], tmp_path, tokenizer, once=True)
    assert sorted([*texts["train"], *texts["validation"]]) == sorted([*SHORT, *LONG])
    assert store.skipped == {"repeated": len(SHORT)}


def test_a_new_tokenizer_is_trained_on_what_is_trained_on(files, tmp_path, tokenizer, monkeypatch):
    seen = []

    class Trained:
        def save(self, path):
            pass

    monkeypatch.setattr("mlx_forget.pipeline.catalog.train_tokenizer", lambda texts, **options: seen.extend(texts) or Trained())
    named = [documents_of(file, Reading(once=True)) for file in files]
    new_tokenizer(named, tmp_path / "tokenizer.model", vocab_size=300)
    texts, _ = prepared(files, tmp_path, tokenizer, once=True)
    assert seen == texts["train"]


def test_parts_of_a_builtin_corpus_are_the_whole_of_it():
    whole = list(documents_of("prose").read())
    parts = [list(documents_of("prose", Reading(part=(number, 3))).read()) for number in range(3)]
    assert all(parts)
    assert sorted(document for part in parts for document in part) == sorted(whole)


def test_a_builtin_corpus_has_splits_of_its_own():
    with pytest.raises(UserError, match="leave --config and --split out"):
        documents_of("prose", Reading(split="train"))
