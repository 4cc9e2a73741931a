"""The tokenizer: an exact way back, reserved ids that no text produces, and a deterministic training."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_forget.errors import UserError
from mlx_forget.pipeline import tokenizer as tokenizer_module
from mlx_forget.pipeline.tokenizer import (
    BOS,
    BYTE_IDS,
    DOMAIN_IDS,
    END_INST,
    EOS,
    INST,
    NUM_RESERVED,
    PAD,
    UNK,
    Tokenizer,
    train_tokenizer,
)

Kind = Literal["unigram", "bpe"]
KINDS: list[Kind] = ["unigram", "bpe"]
TEXTS = [
    "def area(width, height):\n    if width > 0:\n        return width * height\n    return 0\n\n\n" * 3,
    "The quick brown fox jumps over the lazy dog.\n\nForgetting is measured in nats per token.\n" * 3,
    "Every run starts with the beginning; the end of a document is another matter entirely.\n" * 3,
    Path(os.__file__).read_text()[:40_000],
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=700, kind=request.param)


HARD = [
    "",
    " ",
    "\u2581",
    " \u2581 \u2581\u2581",
    "\0",
    "a\0b",
    "\r\n",
    "\ufeffstart",
    "e\u0301 \u1100\u1161",
    "[INST] hi [/INST]",
    "<0x41>",
    "<s></s><pad><unk><domain_0>",
    "\u2585\u2047",
    "  leading and trailing  ",
    "\n\n    indented\n\ttab\n",
    "\U0001f9d1\u200d\U0001f680\U0010ffff\ud7ff\ue000",
    "\ufb01 \u00bd \u2460 \u3000",
]


def scalars() -> st.SearchStrategy[str]:
    pieces = ["\u2581", "  ", "\n", "\t", "\0", "def ", "the", "[INST]", "<0x41>", "\u00e9"]
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
    return anything | st.lists(st.sampled_from(pieces), max_size=60).map("".join)


@given(text=scalars())
@example(text="\u2581")
def test_decoding_gives_back_every_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert not len(ids) or (ids.min() >= NUM_RESERVED and ids.max() < tokenizer.vocab_size)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back_and_never_produce_reserved_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (ids >= NUM_RESERVED).all()


@given(texts=st.lists(scalars(), max_size=8), num_threads=st.sampled_from([1, 3, None]))
def test_a_batch_equals_its_texts_one_by_one(tokenizer: Tokenizer, texts: list[str], num_threads: int | None) -> None:
    batch = tokenizer.encode_batch([*texts, *HARD], num_threads=num_threads)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in [*texts, *HARD]]


def test_lone_surrogates_are_refused_in_one_sentence(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"Character 3 .* lone surrogate U\+D800"):
        tokenizer.encode("abc\ud800")
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode_batch(["fine", "\udfff"], num_threads=2)
    with pytest.raises(UserError, match="lone surrogate"):
        train_tokenizer(["\ud800"], vocab_size=400)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"kind": "words"}, "Unknown kind of tokenizer 'words'"),
        ({"vocab_size": 14}, "A vocabulary of 14 has no room for"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(keywords, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        train_tokenizer(["some text"], **{"vocab_size": 400, **keywords})


def test_no_threads_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="must be at least 1, not 0"):
        tokenizer.encode_batch(["a"], num_threads=0)


def test_reserved_ids_are_where_the_pipeline_expects_them(tokenizer: Tokenizer) -> None:
    assert (PAD, BOS, EOS, UNK, INST, END_INST) == (0, 1, 2, 3, 4, 5)
    assert list(DOMAIN_IDS) == list(range(6, 14))
    assert tokenizer.vocab_size == 700
    assert tokenizer.encode("\u0007").tolist() == [BYTE_IDS[7]]
    assert tokenizer.decode([BOS, *tokenizer.encode("hi"), EOS, PAD, *DOMAIN_IDS]) == "hi"


def test_decode_survives_what_a_model_may_sample(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([BYTE_IDS[0xE2], BYTE_IDS[0x96]]) == "\ufffd"
    for outside in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match="outside the vocabulary"):
            tokenizer.decode([outside])


def test_indentation_and_blank_lines_become_single_tokens() -> None:
    code = train_tokenizer(TEXTS, vocab_size=1200)
    assert len(code.encode("        ")) == 1
    assert len(code.encode("\n\n\n")) == 1
    assert len(code.encode("2026")) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_equal_texts_give_equal_models(kind: Kind) -> None:
    first = train_tokenizer(iter(TEXTS), vocab_size=500, kind=kind)
    # Beside work in other threads, which would perturb a sum over threads.
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(train_tokenizer, TEXTS, vocab_size=500, kind=kind)
        first.encode_batch(TEXTS * 20, num_threads=2)
    assert other.result().hash == first.hash
    assert train_tokenizer(TEXTS[1:], vocab_size=500, kind=kind).hash != first.hash


def test_the_sample_is_bounded_and_spread_over_the_texts() -> None:
    texts = [f"{i} " * 400 + "\n" for i in range(1000)]
    sample = tokenizer_module._sample(texts, 100_000)
    assert 90_000 < sum(len(chunk.encode()) for chunk in sample) <= 100_000
    sources = [int(chunk.split()[0]) for chunk in sample]
    assert sources == sorted(sources)
    assert min(sources) < 100
    assert max(sources) > 900
    assert "".join(tokenizer_module._sample(texts, 10**9)) == "".join(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_too_large_a_vocabulary_is_refused_with_one_that_works(kind: Kind) -> None:
    texts = ["a few words, and a few more words; not a book.\n" * 5]
    with pytest.raises(UserError, match=r"too small for a vocabulary of 5,000: the largest that it supports is (\d+)") as error:
        train_tokenizer(texts, vocab_size=5000, kind=kind)
    largest = int(str(error.value).rstrip(".").split()[-1])
    assert train_tokenizer(texts, vocab_size=largest, kind=kind).vocab_size == largest


def test_too_small_a_vocabulary_is_refused_with_one_that_works() -> None:
    with pytest.raises(UserError, match="the smallest that has is"):
        train_tokenizer(TEXTS, vocab_size=100)


@pytest.mark.parametrize("texts", [[], [""], ["  \n"]])
def test_nothing_to_train_on_is_refused(texts: list[str]) -> None:
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(texts, vocab_size=400)


def test_saving_and_loading_keeps_ids_and_hash(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "store" / "tokenizer.model"
    tokenizer.save(path)
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\0" * 100, b"\x0a\x00"])
def test_a_file_that_is_no_model_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match="Cannot use the tokenizer") as error:
        Tokenizer.load(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read the tokenizer .*No such file"):
        Tokenizer.load(tmp_path / "none.model")


def test_a_model_with_other_reserved_ids_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "foreign"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[3].splitlines()),
        model_prefix=str(prefix),
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="reserved ids are not ours: id 0 is '<unk>' instead of '<pad>'"):
        Tokenizer.load(prefix.with_suffix(".model"))
