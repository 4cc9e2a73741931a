"""Any tokenizer behind one interface, and no store with another's."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from mlx_forget.errors import UserError
from mlx_forget.pipeline.catalog import documents_of, new_tokenizer, resolve_store, write_store
from mlx_forget.pipeline.conversations import Conversation
from mlx_forget.pipeline.encoding import encode
from mlx_forget.pipeline.tokenizer import Tokenizer
from mlx_forget.pipeline.vocabularies import JSON_FILE, find_tokenizer, load_vocabulary, tokenizer_in

SAMPLE = Path(__file__).parent / "samples" / "store-v1" / "tokenizer.model"
TEXT = "".join(f"{i}. A note about the number {i}, and about {i * i}.\n" for i in range(600))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as the Hub has them: tokenizer.json and tokenizer_config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hf")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|start|>", "<|stop|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.save(str(folder / JSON_FILE))
    names = {"bos_token": {"content": "<|start|>"}, "eos_token": "<|stop|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory):
    """A SentencePiece model that was trained elsewhere."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=90, hard_vocab_limit=False, minloglevel=2
    )
    path = tmp_path_factory.mktemp("sp") / "foreign.model"
    path.write_bytes(model.getvalue())
    return path


def test_a_tokenizer_json_knows_its_special_ids_from_the_files_beside_it(folder):
    vocabulary = load_vocabulary(find_tokenizer(str(folder)))
    assert (vocabulary.bos_id, vocabulary.eos_id) == (0, 1)
    assert vocabulary.vocab_size <= 400
    (ids,) = vocabulary.encode_batch(["A note <|stop|> about"])
    assert vocabulary.decode(ids) == "A note <|stop|> about"
    assert 1 not in ids.tolist()
    assert find_tokenizer(str(folder)) == find_tokenizer(str(folder / JSON_FILE))


def test_a_bare_tokenizer_json_without_a_known_end_is_refused(folder, tmp_path):
    (tmp_path / JSON_FILE).write_bytes((folder / JSON_FILE).read_bytes())
    with pytest.raises(UserError, match="does not say which id ends a document"):
        load_vocabulary(find_tokenizer(str(tmp_path)))


def test_a_tokenizer_json_with_common_names_needs_no_file_beside_it(folder, tmp_path):
    text = (folder / JSON_FILE).read_text().replace("<|start|>", "<s>").replace("<|stop|>", "</s>")
    (tmp_path / JSON_FILE).write_text(text)
    vocabulary = load_vocabulary(find_tokenizer(str(tmp_path / JSON_FILE)))
    assert (vocabulary.bos_id, vocabulary.eos_id) == (0, 1)


def test_a_foreign_sentencepiece_model_is_used_with_its_own_ids(foreign_model):
    vocabulary = load_vocabulary(foreign_model)
    assert (vocabulary.bos_id, vocabulary.eos_id) == (1, 2)
    (ids,) = vocabulary.encode_batch(["A note about the number 7"])
    assert vocabulary.decode(ids) == "A note about the number 7"


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_stores_of_any_tokenizer_carry_it(folder, foreign_model, tmp_path, kind):
    file = find_tokenizer(str(folder if kind == "json" else foreign_model))
    rows = [{"text": "A note about the number 1"}, {"prompt": "the number", "completion": "about 2"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    store = write_store(tmp_path / "s", [documents_of(str(tmp_path / "a.jsonl"))], file, num_workers=2)
    vocabulary = load_vocabulary(tokenizer_in(tmp_path / "s"))
    assert store.tokenizer_hash == vocabulary.hash
    assert store.eos_id == vocabulary.eos_id
    found = [vocabulary.decode(s.document(i)) for s in store.splits.values() for i in range(s.num_documents)]
    assert any("A note about the number 1" in text for text in found)
    assert any("the number" in text and text.endswith("about 2") for text in found)


def test_only_answers_are_learnt_with_a_foreign_tokenizer_too(folder):
    vocabulary = load_vocabulary(find_tokenizer(str(folder)))
    turns = (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    ((ids, mask),) = encode([Conversation(turns)], vocabulary)
    learnt = np.append(ids, vocabulary.eos_id)[mask == 1]
    two, four = vocabulary.encode_batch(["two", "four"])
    assert learnt.tolist() == [*two, vocabulary.eos_id, *four, vocabulary.eos_id]


def test_a_store_of_another_tokenizer_is_refused(folder, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    write_store(tmp_path / "s", [documents_of(str(tmp_path / "a.txt"))], SAMPLE)
    with pytest.raises(UserError, match="made with another tokenizer"):
        resolve_store(str(tmp_path / "s"), find_tokenizer(str(folder)))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_new_tokenizer_is_trained_on_training_documents_only(tmp_path, kind):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text(TEXT)
    (tmp_path / "data" / "valid.txt").write_text("ΩΩΩ" * 50)
    new_tokenizer([documents_of(str(tmp_path / "data"))], tmp_path / "t.model", vocab_size=298, kind=kind)
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    assert tokenizer.vocab_size == 298
    # Never seen: its bytes.
    assert len(tokenizer.encode("Ω")) == 2


@pytest.mark.parametrize(
    "content, message", [(b"", "not a SentencePiece"), (b"{}", "not a tokenizer.json"), (b"{", "not a tokenizer.json")]
)
def test_what_is_no_tokenizer_is_refused(tmp_path, content, message):
    if content:
        pytest.importorskip("tokenizers")
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_vocabulary(find_tokenizer(str(tmp_path / "x.model")))


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="There is no tokenizer"):
        find_tokenizer(str(tmp_path / "none.model"))
    with pytest.raises(UserError, match=r"has no tokenizer\.model"):
        find_tokenizer(str(tmp_path))


def test_the_bytes_of_pieces_join_to_the_text(folder, foreign_model):
    text = "12. A note about naïve — things,\tand more"
    vocabulary = load_vocabulary(find_tokenizer(str(folder)))
    assert b"".join(vocabulary.piece_bytes[i] for i in vocabulary.encode(text)).decode() == text
    assert vocabulary.piece_bytes[0] == vocabulary.piece_bytes[1] == b""
    foreign = load_vocabulary(foreign_model)
    pieces = foreign.piece_bytes
    # This one puts a space before every text.
    assert b"".join(pieces[i] for i in foreign.encode("A note about the number 12")).decode() == " A note about the number 12"
    assert pieces[foreign.eos_id] == b""


@pytest.mark.parametrize(
    "decoder, pieces",
    [("WordPiece", {"note": b" note", "##s": b"s"}), ("ByteFallback", {"\u2581note": b" note", "<0x0A>": b"\n", "s": b"s"})],
)
def test_the_bytes_of_pieces_of_other_kinds_of_tokenizer_json(tmp_path, decoder, pieces):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{piece: 3 + i for i, piece in enumerate(pieces)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.add_special_tokens(["<s>", "</s>", "<unk>"])
    made.decoder = tokenizers.decoders.Sequence([getattr(tokenizers.decoders, decoder)()])
    made.save(str(tmp_path / JSON_FILE))
    assert load_vocabulary(tmp_path / JSON_FILE).piece_bytes == (b"", b"", b"", *pieces.values())
