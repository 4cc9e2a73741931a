"""Files to records, in a bounded memory: text, JSON lines, Parquet and Arrow, plain or compressed by gzip or zstd.

What cannot be read is reported with its file, its line and its first characters, and either stops the work or is counted.
"""

import codecs
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlx_forget.errors import UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
KNOWN_FORMATS = f"{', '.join(SUFFIXES)}, and .txt, .md, .jsonl and .json with {' or '.join(COMPRESSIONS)}"

# A text file gives at least 64 documents, so that some of a small one validate, but none longer than this.
_DOCUMENTS_PER_FILE = 64
_CHARS_PER_DOCUMENT = 20_000
# Where a text has no line end, a document ends here at the latest.
_MOST_CHARS_PER_DOCUMENT = 1_000_000
# A JSON line is held in memory several times over.
_MOST_BYTES_PER_LINE = 64_000_000
# The end of a compressed file that breaks off is lost up to here.
_BLOCK = 1 << 16
_BYTE_ORDER_MARK = "\ufeff"
_ROWS_PER_BATCH = 256
_EXCERPT = 80
# Between the elements of an array.
_SEPARATOR = re.compile(r"\s*,?\s*")

_UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError)

Record = tuple[int, Any]


@dataclass
class BadInput:
    """What could not be read: it stops the work, or with `skip` it is counted and left out.

    Args:
        skip: whether to go on.
        counts: how often each reason came up.
        examples: the first few, in full.
    """

    skip: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def restart(self) -> None:
        """Forget what was counted: a new pass begins."""
        self.counts.clear()
        self.examples.clear()

    def report(self, where: str, reason: str, *, excerpt: str = "", kind: str | None = None) -> None:
        """One thing that is wrong.

        Args:
            where: file and line.
            reason: a clause.
            excerpt: how it begins; its first 80 characters are shown.
            kind: what it is counted as; the reason where it is always the same.

        Raises:
            UserError: unless `skip`.
        """
        begins = f" It begins {excerpt[:_EXCERPT]!r}." if excerpt else ""
        if not self.skip:
            raise UserError(f"{where}: {reason}.{begins}")
        self.counts[kind or reason] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{where}: {reason}.{begins}")


def format_of(file: Path) -> str | None:
    """The suffix that tells a file's format, without that of its compression; None where it is unknown."""
    suffixes = file.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        inner = suffixes[-2] if len(suffixes) > 1 else ""
        return inner if inner in (*TEXT_SUFFIXES, ".jsonl", ".json") else None
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def stem_of(file: Path) -> str:
    """A file's name without the suffixes of format and compression."""
    name = file.name.removesuffix(file.suffix) if file.suffix in COMPRESSIONS else file.name
    return Path(name).stem


def read_texts(file: Path, bad: BadInput) -> Iterator[str]:
    """A text file as documents that end at line ends, about 20,000 characters each, fewer where the file is small."""
    try:
        with _open(file) as handle:
            yield from _pieces(_decoded(handle, file, bad))
    except _UNREADABLE as error:
        _report_file(file, error, bad)


def read_records(file: Path, bad: BadInput, *, columns: set[str]) -> Iterator[Record]:
    """The records of a file with their numbers (lines or rows, from 1).

    Args:
        columns: the top-level columns that are read from Parquet and Arrow.
    """
    try:
        if format_of(file) == ".parquet":
            yield from _parquet_rows(file, columns)
        elif format_of(file) == ".arrow":
            yield from _arrow_rows(file, columns)
        else:
            with _open(file) as handle:
                yield from _json_records(handle, file, bad)
    except _UNREADABLE as error:
        _report_file(file, error, bad)


def _report_file(file: Path, error: Exception, bad: BadInput) -> None:
    """A file that cannot be opened, or ends before its end."""
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        bad.report(str(file), f"the compressed file ends too early (truncated {file.suffix[1:]})", kind="truncated file")
        return
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    bad.report(f"Cannot read {file}", reason.rstrip("."), kind="unreadable file")


def _open(file: Path) -> io.BufferedReader:
    """The bytes of a file, decompressed on the way."""
    import gzip

    if file.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(file, "rb"), _BLOCK)
    if file.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")), _BLOCK)
    return file.open("rb")


class _ZstdFile(io.RawIOBase):
    """Arrow's stream as Python's kind of file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _decoded(handle: "io.BufferedReader | _Joined", file: Path, bad: BadInput) -> Iterator[str]:
    """Blocks of text; the rest of a file that is not UTF-8 is bad input."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = 0
    while True:
        try:
            block = handle.read1(_BLOCK)
        except _UNREADABLE as error:
            _report_file(file, error, bad)
            return
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            _report_encoding(str(file), num_bytes - held + error.start, bad)
            return
        if not num_bytes:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        num_bytes += len(block)
        if text:
            yield text
        if not block:
            return


def _report_encoding(where: str, byte: int, bad: BadInput) -> None:
    bad.report(where, f"it is not UTF-8 (byte {byte}): convert it, for example with iconv", kind="not UTF-8")


def _pieces(blocks: Iterator[str]) -> Iterator[str]:
    """Blocks of text cut anew into documents."""
    text = ""
    size: int | None = None
    for block in blocks:
        text += block
        if size is None and len(text) < _CHARS_PER_DOCUMENT * _DOCUMENTS_PER_FILE:
            continue
        size = _CHARS_PER_DOCUMENT
        start = 0
        while (stop := _end_of_piece(text, start, size)) is not None:
            yield text[start:stop]
            start = stop
        text = text[start:]
    size = size or len(text) // _DOCUMENTS_PER_FILE
    start = 0
    while start < len(text):
        stop = _end_of_piece(text, start, size) or len(text)
        yield text[start:stop]
        start = stop


def _end_of_piece(text: str, start: int, size: int) -> int | None:
    """Where the piece that starts here ends; None where that lies beyond the text."""
    newline = text.find("\n", start + size, start + _MOST_CHARS_PER_DOCUMENT)
    if newline >= 0:
        return newline + 1
    return start + _MOST_CHARS_PER_DOCUMENT if len(text) - start > _MOST_CHARS_PER_DOCUMENT else None


def _json_records(handle: io.BufferedReader, file: Path, bad: BadInput) -> Iterator[Record]:
    """JSON lines, or one array of records."""
    number = 0
    while line := handle.readline(_MOST_BYTES_PER_LINE):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.endswith(b"\n") and len(line) == _MOST_BYTES_PER_LINE:
            while (rest := handle.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
            reason = f"a line is longer than {_MOST_BYTES_PER_LINE // 10**6} MB: cut its document into several"
            bad.report(f"{file}, line {number}", reason, excerpt=line[:_EXCERPT].decode("utf-8", "replace"), kind="line too long")
            continue
        if line.isspace():
            continue
        if number == 1 and format_of(file) == ".json" and line.lstrip().startswith(b"["):
            yield from _array(line.lstrip()[1:], handle, file, bad)
            return
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            _report_encoding(f"{file}, line {number}", error.start, bad)
        except (ValueError, RecursionError):
            reason = 'not valid JSON; expected one JSON object with a "text" key'
            bad.report(
                f"{file}, line {number}", reason, excerpt=line[:400].decode("utf-8", "replace").rstrip(), kind="invalid JSON"
            )
        else:
            yield number, record


def _array(start: bytes, handle: io.BufferedReader, file: Path, bad: BadInput) -> Iterator[Record]:
    """The elements of a JSON array of any length, one after the other."""
    decoder = json.JSONDecoder()
    blocks = _decoded(_Joined(start, handle), file, bad)
    text, number, more, enough = "", 0, True, 0
    while more or text:
        read, size = [text], len(text)
        while more and size <= enough:
            block = next(blocks, "")
            more = bool(block)
            read.append(block)
            size += len(block)
        text, position, enough = "".join(read), 0, 0
        while (position := _SEPARATOR.match(text, position).end()) < len(text):  # type: ignore[union-attr]
            if text[position] == "]":
                return
            try:
                record, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                left = len(text) - position
                if more and left < _MOST_BYTES_PER_LINE and not isinstance(error, RecursionError):
                    # Looked at again when there is twice as much of it: at every block, a long element would take hours.
                    enough = min(2 * left, _MOST_BYTES_PER_LINE)
                    break
                bad.report(
                    f"{file}, element {number + 1}", "not valid JSON", excerpt=text[position : position + 400], kind="invalid JSON"
                )
                return
            number += 1
            yield number, record
        text = text[position:]
    bad.report(
        str(file), f"the JSON array ends after element {number}, without ]: the file may be cut short", kind="truncated file"
    )


class _Joined:
    """Bytes that were read already, and the rest of their file."""

    def __init__(self, start: bytes, handle: io.BufferedReader) -> None:
        self._start, self._handle = start, handle

    def read1(self, size: int) -> bytes:
        start, self._start = self._start, b""
        return start or self._handle.read1(size)


def _parquet_rows(file: Path, columns: set[str]) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        chosen = [name for name in parquet.schema_arrow.names if name in columns]
        number = 0
        for batch in parquet.iter_batches(_ROWS_PER_BATCH, columns=chosen or None, use_threads=False):
            for record in batch.to_pylist():
                number += 1
                yield number, record


def _arrow_rows(file: Path, columns: set[str]) -> Iterator[Record]:
    """An Arrow file, or a stream as `datasets` writes it."""
    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches: Callable[[], Iterator[Any]] = lambda: (reader.get_batch(i) for i in range(reader.num_record_batches))  # noqa: E731
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            batches = lambda: iter(reader)  # noqa: E731
        chosen = [name for name in reader.schema.names if name in columns]
        number = 0
        for batch in batches():
            kept = batch.select(chosen) if chosen else batch
            # Offsets that lead out of the file would be followed.
            kept.validate(full=True)
            for start in range(0, kept.num_rows, _ROWS_PER_BATCH):
                for record in kept.slice(start, _ROWS_PER_BATCH).to_pylist():
                    number += 1
                    yield number, record
