"""Documents of the built-in corpora: passages in the order of their hashes, without near-copies, in splits."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

from mlx_forget.pipeline.near_copies import SeenText
from mlx_forget.pipeline.passages import (
    MAX_DOCUMENT_CHARS,
    MIN_DOCUMENT_CHARS,
    Passage,
    english_passages,
    is_heading,
    pieces,
    without_empty_sections,
)
from mlx_forget.pipeline.python_source import MIN_DOCSTRING_CHARS

Split = Literal["train", "validation"]
# The English of one source file: texts, each in paragraphs.
English = tuple[tuple[Passage, ...], ...]

# From half its marks on, a passage is a copy. Code shares less with prose, and training code with validation.
MAX_SEEN_SHARE = 0.5
MAX_FOREIGN_SHARE = 0.2
_NUM_SMOKE_TOPICS = 20


def topics(*, smoke: bool = False) -> list[English]:
    """The language reference that `help()` shows, as a source per topic."""
    from pydoc_data.topics import topics as texts

    names = sorted(texts)[: _NUM_SMOKE_TOPICS if smoke else None]
    return [(english_passages(texts[name].replace("\r\n", "\n")),) for name in names]


def prose(sources: Iterable[English], *, seen: SeenText) -> Iterator[str]:
    """One document per source file: its English in order, without the paragraphs of earlier documents.

    Args:
        sources: the English of each file, in any order.
        seen: takes the marks of all that is kept.
    """
    short: set[str] = set()

    def is_new(passage: Passage) -> bool:
        if is_heading(passage.text):
            return True
        if len(passage.marks):
            known = seen.share(passage.marks) >= MAX_SEEN_SHARE
            seen.add([] if known else [passage.marks])
        else:
            known = passage.text in short
            short.add(passage.text)
        return not known

    for source in sorted(filter(None, sources), key=_hash_of_english):
        texts = (
            "\n\n".join(without_empty_sections([passage.text for passage in passages if is_new(passage)]))
            for passages in source
        )
        yield from _gather(text for text in texts if len(text) >= MIN_DOCSTRING_CHARS)


def _hash_of_english(source: English) -> str:
    return _hash("\n".join(passage.text for passages in source for passage in passages))


def _gather(texts: Iterable[str]) -> Iterator[str]:
    """Texts joined into documents of at most 20,000 characters; what stays too short is left out."""
    gap = "\n\n\n"
    pending = ""
    for text in texts:
        for piece in pieces(text):
            if pending and len(pending) + len(gap) + len(piece) > MAX_DOCUMENT_CHARS:
                yield pending + "\n"
                pending = ""
            pending += (gap if pending else "") + piece.rstrip("\n")
    if len(pending) >= MIN_DOCUMENT_CHARS:
        yield pending + "\n"


def code(
    candidates: Iterable[Passage], *, prose: SeenText, validation_share: float, max_bytes: int
) -> dict[Split, list[str]]:
    """Pieces of code in the order of their hashes, without copies of each other or of prose, up to the cap.

    A copy of a validation piece would be a leak: those come first, and the bar for the others is higher.
    """
    hashed = sorted(((_hash(piece.text), piece) for piece in candidates), key=lambda entry: entry[0])
    seen, validation = SeenText(), SeenText()
    splits: dict[Split, list[str]] = {"train": [], "validation": []}
    for split, limit in (
        ("validation", max_bytes * validation_share),
        ("train", max_bytes * (1 - validation_share)),
    ):
        assert split in ("train", "validation")
        size = 0
        for digest, piece in hashed:
            if split_of(digest, validation_share=validation_share) != split:
                continue
            if size >= limit:
                break
            if seen.share(piece.marks) >= MAX_SEEN_SHARE or prose.share(piece.marks) >= MAX_FOREIGN_SHARE:
                continue
            if validation.share(piece.marks) >= MAX_FOREIGN_SHARE:
                continue
            seen.add([piece.marks])
            if split == "validation":
                validation.add([piece.marks])
            size += len(piece.text.encode())
            splits[split].append(piece.text)
    return splits


def split(texts: Iterable[str], *, validation_share: float, max_bytes: int) -> dict[Split, list[str]]:
    """Documents by the hash of their text, in its order and up to the cap: any prefix is a random sample."""
    splits: dict[Split, list[str]] = {"train": [], "validation": []}
    size = 0
    for digest, text in sorted((_hash(text), text) for text in texts):
        if size >= max_bytes:
            break
        size += len(text.encode())
        splits[split_of(digest, validation_share=validation_share)].append(text)
    return splits


def split_of(digest: str, *, validation_share: float) -> Split:
    """The split of a document with that sha256. The first digits order the documents, so the last decide."""
    return "validation" if int(digest[-8:], 16) < validation_share * 2**32 else "train"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
