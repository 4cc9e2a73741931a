"""What one source file gives to the built-in corpora: paragraphs of English and pieces of code."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlx_forget.pipeline import python_source
from mlx_forget.pipeline.near_copies import fingerprints

MAX_DOCUMENT_CHARS = 20_000
MIN_DOCUMENT_CHARS = 200

# Stubs and Cython have docstrings; only plain Python gives code too.
Language = Literal["python", "stub", "cython", "cpp"]
LANGUAGES: dict[str, Language] = {
    ".py": "python",
    ".pyi": "stub",
    ".pyx": "cython",
    ".pxi": "cython",
    ".h": "cpp",
    ".hpp": "cpp",
    ".hh": "cpp",
    ".cuh": "cpp",
    ".inl": "cpp",
    ".inc": "cpp",
}


@dataclass(frozen=True)
class SourceFile:
    """A file to read."""

    path: Path
    language: Language
    num_bytes: int


@dataclass(frozen=True)
class Passage:
    """A paragraph of English, or a piece of code, with the marks by which near-copies are found."""

    text: str
    marks: NDArray[np.uint64]


@dataclass(frozen=True)
class Harvest:
    """What one file gave: texts (a docstring or comment each) in paragraphs, and pieces of code."""

    english: tuple[tuple[Passage, ...], ...] = ()
    code: tuple[Passage, ...] = ()


def read_file(file: SourceFile, *, code_share: float) -> Harvest:
    """The harvest of one file; an empty one where it cannot be read, decoded or parsed.

    Args:
        file: what to read.
        code_share: the share of Python files whose code is kept, chosen by the hash of the file.
    """
    try:
        source = file.path.read_bytes()
    except OSError:
        return Harvest()
    if file.language == "cpp":
        return Harvest(code=_mark(_cpp_pieces(source)))
    if file.language == "cython":
        return Harvest(_mark_english(python_source.cython_english(source)))
    parsed = python_source.parse(source)
    if parsed is None:
        return Harvest()
    english = _mark_english(python_source.english(parsed))
    chosen = file.language == "python" and hashlib.sha256(source).digest()[0] < 256 * code_share
    code = python_source.strip(parsed) if chosen else None
    return Harvest(english, _mark(_written_pieces(code)) if code else ())


def english_passages(text: str) -> tuple[Passage, ...]:
    """The paragraphs of a text that are English."""
    return _mark(paragraphs(text))


def _mark(texts: list[str]) -> tuple[Passage, ...]:
    return tuple(map(Passage, texts, fingerprints(texts)))


def _mark_english(texts: list[str]) -> tuple[tuple[Passage, ...], ...]:
    """All texts at once: marks of many paragraphs cost little more than those of one."""
    kept = [found for text in texts if (found := paragraphs(text))]
    passages = iter(_mark([paragraph for found in kept for paragraph in found]))
    return tuple(tuple(islice(passages, len(found))) for found in kept)


_FENCE = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_SESSION = re.compile(r"^\s*(>>>|In \[\d)", re.MULTILINE)
_BLANK = re.compile(r"\n(?:[ \t]*\n)+")
_TAG = re.compile(r"\A\s*(</?\w+>\s*)+\Z|\A\s*\.\. [\w-]+::\s*\Z")
_HEADING = re.compile(r"\A[ \t]*[^\n]{1,60}\n[ \t]*([-=~^])\1{2,}\s*\Z|\A\W*(?:examples?|usage|e\.g\.)\W*\Z", re.IGNORECASE)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a docstring that are English: no doctests, literal blocks, tables or bare tags."""
    kept: list[str] = []
    literal: int | None = None
    for paragraph in _BLANK.split(_FENCE.sub("", text)):
        if not paragraph.strip():
            continue
        if literal is not None and _indent(paragraph) > literal:
            continue
        literal = None
        if _SESSION.search(paragraph):
            continue
        last_line = paragraph.rstrip().rsplit("\n", 1)[-1]
        if last_line.endswith("::"):
            literal = _indent(last_line)
            if last_line.lstrip().startswith(".. "):
                paragraph = paragraph.rstrip()[: -len(last_line)]
        if len(paragraph) >= MIN_DOCUMENT_CHARS and _letter_share(paragraph) < 0.55:
            continue
        if paragraph.strip() and not _TAG.match(paragraph):
            kept.append(paragraph.rstrip().lstrip("\n"))
    return without_empty_sections(kept)


def without_empty_sections(texts: Sequence[str]) -> list[str]:
    """Paragraphs without the headings that nothing follows any more."""
    kept: list[str] = []
    for text in texts:
        if kept and is_heading(text) and is_heading(kept[-1]):
            kept.pop()
        kept.append(text)
    while kept and is_heading(kept[-1]):
        kept.pop()
    return kept


def is_heading(paragraph: str) -> bool:
    """Whether a paragraph only announces what follows: an underlined line, or "Examples:"."""
    return _HEADING.match(paragraph) is not None


def pieces(text: str) -> list[str]:
    """A text cut into pieces of at most 20,000 characters, after a blank line if the second half has one."""
    found = []
    half = MAX_DOCUMENT_CHARS // 2
    while len(text) > MAX_DOCUMENT_CHARS:
        # Before a line that is not indented, so that a function stays whole.
        ends = [half + mark.end() for mark in re.finditer(r"\n\n+(?=\S)", text[half:MAX_DOCUMENT_CHARS])]
        cut = ends[-1] if ends else text.rfind("\n", 0, MAX_DOCUMENT_CHARS) + 1 or MAX_DOCUMENT_CHARS
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text]


def _written_pieces(code: str) -> list[str]:
    """Pieces that are code someone wrote, not tables of data."""
    return [piece for piece in pieces(code) if _is_written(piece)]


def _is_written(code: str) -> bool:
    if len(code) < MIN_DOCUMENT_CHARS:
        return False
    lines = code.splitlines()
    visible = "".join(code.split())
    num_digits = sum(map(visible.count, "0123456789"))
    return (
        len(code) / len(lines) <= 80
        and max(map(len, lines)) <= 500
        and num_digits <= 0.15 * len(visible)
        and _letter_share(code) >= 0.5
    )


def _letter_share(text: str) -> float:
    """The share of letters among the characters that are not whitespace."""
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) / max(1, len(visible))


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


_CPP_COMMENTS = re.compile(r"\A(?:\s*(?:/\*.*?\*/|(?://[^\n]*\n)+))+", re.DOTALL)
_CPP_LICENCE = re.compile(r"copyright|licen[sc]e|all rights reserved|@generated", re.IGNORECASE)


def _cpp_pieces(source: bytes) -> list[str]:
    try:
        text = source.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return []
    head = _CPP_COMMENTS.match(text)
    if head and _CPP_LICENCE.search(head[0]):
        text = text[head.end() :]
    text = re.sub(r"[ \t\f]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
    return _written_pieces(text)
