"""Documents from what a user has: files of text or records, folders and globs of them, dataset repositories on disk.

A record is one document; a long text file is cut into several at line ends. Where names do not tell what validates (see `source_files`),
it is split by document hash: 3% validate, more of a small source.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_forget.errors import UserError
from mlx_forget.pipeline.conversations import Content, Conversation, Fields, content_of
from mlx_forget.pipeline.filters import Filter
from mlx_forget.pipeline.formats import TEXT_SUFFIXES, BadInput, format_of, read_records, read_texts
from mlx_forget.pipeline.source_files import SplitName, find_splits

# A source validates on about 300 KB of its text where that is between 3% and 20% of it.
_VALIDATION_BYTES = 300_000
_LEAST_SHARE, _MOST_SHARE = 0.03, 0.2


@dataclass(frozen=True)
class Reading:
    """How documents are read and which are kept.

    Args:
        fields: the columns of records.
        min_chars, max_chars: leave out shorter and longer documents.
        once: leave out exact repetitions.
        part: (i, n) reads the i-th of n parts of the source, from 0: every n-th file, or where there are fewer files than parts, the
            documents whose hash falls there.
        config: the configuration of a dataset repository.
        split: read this split of a dataset repository or of a folder only, and validate on a share of it.
    """

    fields: Fields = field(default_factory=Fields)
    min_chars: int | None = None
    max_chars: int | None = None
    once: bool = False
    part: tuple[int, int] | None = None
    config: str | None = None
    split: str | None = None

    def key(self, content: str, *, whole: bool = False) -> str:
        """A hash of content and of how it is read; of the content alone where it is read as ever."""
        reading = replace(self, part=None) if whole else self
        return content if reading == Reading() else hashlib.sha256(f"{content} {reading}".encode()).hexdigest()


def read_documents(
    path: Path | str,
    reading: Reading | None = None,
    *,
    bad: BadInput | None = None,
    keep: Filter | None = None,
    share: float | None = None,
) -> Iterator[tuple[SplitName, Content]]:
    """Each document that a path names with the split it belongs to.

    Args:
        bad: takes what cannot be read; by default that is an error.
        keep: decides on documents and counts those left out; by default made from `reading`.
        share: of the documents that validate where names do not tell; by default as the size of the files asks for.

    Raises:
        UserError: a file that cannot be read (file, line and first characters named), or no text at all.
    """
    reading, bad = reading or Reading(), bad or BadInput()
    keep = keep or Filter(min_chars=reading.min_chars, max_chars=reading.max_chars, once=reading.once)
    found = find_splits(path, config=reading.config, split=reading.split)
    by_name = dict(found)
    named = "validation" in by_name.values()
    if share is None:
        share = validation_share(sum(file.stat().st_size for file in by_name))
    files = [file for file, _ in found]
    by_file = reading.part is not None and len(files) >= reading.part[1]
    if by_file and reading.part is not None:
        files = files[reading.part[0] :: reading.part[1]]
    empty, num_kept = True, 0
    for file in files:
        for content in _contents(file, reading.fields, bad):
            text = content.text if isinstance(content, Conversation) else content
            empty = empty and not text.strip()
            digest = digest_of(text)
            if not text.strip() or not (by_file or in_part(digest, reading.part)) or not keep.keeps(text, digest):
                continue
            num_kept += 1
            yield (by_name.get(file) or "train") if named else split_by(digest, share), content
    if empty:
        raise UserError(f"{path} holds no text{_that_could_be_read(bad)}.")
    # What is repeated may stand in another source.
    if not num_kept and keep.dropped and not keep.dropped["repeated"]:
        raise UserError(f"Every document of {path} was left out: {describe_counts(keep.dropped)}.")


def validation_share(num_bytes: int) -> float:
    """The share of documents that validate, for a source of that size."""
    return min(_MOST_SHARE, max(_LEAST_SHARE, _VALIDATION_BYTES / max(1, num_bytes)))


def digest_of(text: str) -> int:
    """256 bits that stand for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def split_by(digest: int, validation_share: float) -> SplitName:
    """The split of a document from its digest, of which the first 64 bits decide."""
    return "validation" if (digest >> 192) / 2**64 < validation_share else "train"


def split_of(text: str, validation_share: float) -> SplitName:
    """The split of a document, from its content and the share of documents that validate."""
    return split_by(digest_of(text), validation_share)


def in_part(digest: int, part: tuple[int, int] | None) -> bool:
    """Whether a document belongs to a part; bits decide that have no say in split and repetition."""
    return part is None or (digest >> 64) % 2**64 % part[1] == part[0]


def describe_counts(counts: Any) -> str:
    """Counts as `3 too short, 1 repeated`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())


def _that_could_be_read(bad: BadInput) -> str:
    return f" that could be read ({describe_counts(bad.counts)})" if bad.counts else ""


def _contents(file: Path, fields: Fields, bad: BadInput) -> Iterator[Content]:
    if format_of(file) in TEXT_SUFFIXES:
        yield from read_texts(file, bad)
    else:
        yield from contents_of(read_records(file, bad, columns=fields.columns()), fields, bad, where=str(file))


def contents_of(records: Iterable[tuple[int, Any]], fields: Fields, bad: BadInput, *, where: str) -> Iterator[Content]:
    """The documents in numbered records."""
    contents = _of_records(records, fields, bad, where)
    return contents if fields.begins is None else _joined(contents, re.compile(fields.begins))


def _joined(contents: Iterator[Content], begins: re.Pattern[str]) -> Iterator[Content]:
    """Texts joined until the next one that begins a document."""
    parts: list[str] = []
    for content in contents:
        if isinstance(content, Conversation):
            yield content
            continue
        if parts and begins.match(content):
            yield "".join(parts)
            parts = []
        parts.append(content)
    if parts:
        yield "".join(parts)


def _of_records(records: Iterable[tuple[int, Any]], fields: Fields, bad: BadInput, where: str) -> Iterator[Content]:
    for number, record in records:
        try:
            content = content_of(record, fields)
            if content is not None:
                (content.text if isinstance(content, Conversation) else content).encode()
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(error.object[error.start]):04X}"
            bad.report(f"{where}, line {number}", f"character {error.start} is the lone surrogate {surrogate}", kind="not UTF-8")
        except ValueError as error:
            bad.report(f"{where}, line {number}", str(error), excerpt=str(record), kind="missing or wrong field")
        else:
            if content is not None:
                yield content
