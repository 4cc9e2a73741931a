"""Documents of the built-in corpora: passages in the order of their hashes, without near-copies, split.

The hash of a file decides on the split of all that comes from it: two pieces of one file share too much.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
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


def prose(sources: Iterable[English], *, seen: SeenText) -> Iterator[list[str]]:
    """The documents of each source file: its English in order, without the paragraphs of earlier files.

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
            "\n\n".join(without_empty_sections([passage.text for passage in passages if is_new(passage)])) for passages in source
        )
        yield list(_gather(text for text in texts if len(text) >= MIN_DOCSTRING_CHARS))


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


def code(files: Iterable[Sequence[Passage]], *, prose: SeenText, validation_share: float, max_bytes: int) -> dict[Split, list[str]]:
    """Pieces of code in the order of their hashes, without copies of each other or of prose, up to the cap.

    A copy of a validation piece would be a leak, so the bar is higher there, and in both directions.

    Args:
        files: the pieces of each file, all of which go to one split.
        prose: what is in the prose, empty where that does not matter.
        validation_share: the share of files that validate, and of the cap that is theirs.
        max_bytes: the cap.
    """
    candidates: dict[Split, list[tuple[str, Passage]]] = {"train": [], "validation": []}
    for pieces_of_file in files:
        split = _split_of([piece.text for piece in pieces_of_file], validation_share)
        candidates[split] += [(_hash(piece.text), piece) for piece in pieces_of_file]
    limits: dict[Split, float] = {
        "validation": max_bytes * validation_share,
        "train": max_bytes * (1 - validation_share),
    }
    chosen: dict[Split, list[Passage]] = {"train": [], "validation": []}
    seen: dict[Split, SeenText] = {"train": SeenText(), "validation": SeenText()}
    for split, limit in limits.items():
        size = 0
        for _, piece in sorted(candidates[split], key=lambda entry: entry[0]):
            if size >= limit:
                break
            if seen[split].share(piece.marks) >= MAX_SEEN_SHARE or prose.share(piece.marks) >= MAX_FOREIGN_SHARE:
                continue
            if split == "train" and seen["validation"].share(piece.marks) >= MAX_FOREIGN_SHARE:
                continue
            seen[split].add([piece.marks])
            size += len(piece.text.encode())
            chosen[split].append(piece)
    return {
        "train": [piece.text for piece in chosen["train"]],
        # Small pieces can be in the midst of large ones, which the comparison the other way does not see.
        "validation": [piece.text for piece in chosen["validation"] if seen["train"].share(piece.marks) < MAX_SEEN_SHARE],
    }


def split(sources: Iterable[Sequence[str]], *, validation_share: float, max_bytes: int) -> dict[Split, list[str]]:
    """Documents in the order of their hashes, up to the cap, so that any prefix is a random sample.

    Args:
        sources: the documents of each source, all of which go to one split.
        validation_share: the share of sources that validate.
        max_bytes: the cap.
    """
    placed = sorted(
        (_hash(text), text, where) for texts in sources for where in [_split_of(texts, validation_share)] for text in texts
    )
    splits: dict[Split, list[str]] = {"train": [], "validation": []}
    size = 0
    for _, text, where in placed:
        if size >= max_bytes:
            break
        size += len(text.encode())
        splits[where].append(text)
    return splits


def _split_of(texts: Sequence[str], validation_share: float) -> Split:
    """The split of all that comes from one file, by the hash of its text."""
    return "validation" if int(_hash("\n".join(texts))[:8], 16) < validation_share * 2**32 else "train"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
