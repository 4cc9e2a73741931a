"""Documents from what a user has: text files, JSON lines, and folders of them.

A `.jsonl` line is one document (key `text`); a long text file is cut into several at line ends. A folder may hold `train` and `valid`
files or subfolders by name; others, and single files, are split by document hash: 3% validate, more of a small source.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mlx_forget.errors import UserError

SplitName = Literal["train", "validation"]
SUFFIXES = (".txt", ".md", ".jsonl")

# A source validates on about 300 KB of its text where that is between 3% and 20% of it.
_VALIDATION_BYTES = 300_000
_LEAST_SHARE, _MOST_SHARE = 0.03, 0.2
# A text file gives at least 64 documents, so that some of a small one validate, but none longer than this.
_DOCUMENTS_PER_FILE = 64
_CHARS_PER_DOCUMENT = 20_000
_SPLIT_OF_NAME: dict[str, SplitName] = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
}


def find_files(path: Path) -> list[Path]:
    """The text files that a path names, sorted; `test` files are left out.

    Raises:
        UserError: nothing there, or nothing in a known format.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path} has an unknown format; known: {', '.join(SUFFIXES)}.")
        return [path]
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    files = sorted(
        file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file() and "test" not in _names(file, path)
    )
    if not files:
        raise UserError(f"{path} has no files of a known format ({', '.join(SUFFIXES)}).")
    return files


def read_documents(path: Path) -> Iterator[tuple[SplitName, str]]:
    """Each document of a file or folder with the split it belongs to.

    Raises:
        UserError: a file that is not UTF-8 or not JSON lines with `text` (file and line named), or no text at all.
    """
    files = find_files(path)
    by_name = {file: split for file in files for name in _names(file, path) if (split := _SPLIT_OF_NAME.get(name))}
    named = "validation" in by_name.values()
    share = min(_MOST_SHARE, max(_LEAST_SHARE, _VALIDATION_BYTES / max(1, sum(file.stat().st_size for file in files))))
    empty = True
    for file in files:
        for text in _read_file(file):
            if not text.strip():
                continue
            empty = False
            yield (by_name.get(file, "train") if named else split_of(text, share)), text
    if empty:
        raise UserError(f"{path} holds no text.")


def holds_out_by_name(path: Path) -> bool:
    """Whether files or subfolders say by their names which documents validate."""
    return any(_SPLIT_OF_NAME.get(name) == "validation" for file in find_files(path) for name in _names(file, path))


def split_of(text: str, validation_share: float) -> SplitName:
    """The split of a document, from its content and the share of documents that validate."""
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "validation" if draw < validation_share else "train"


def content_hash(path: Path) -> str:
    """A hash of the names and bytes of every file that a path names."""
    total = hashlib.sha256()
    for file in find_files(path):
        try:
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"Cannot read {file}: {error.strerror}.") from None
        total.update(f"{file.name if path.is_file() else file.relative_to(path)}\n{digest}\n".encode())
    return total.hexdigest()


def _names(file: Path, root: Path) -> tuple[str, ...]:
    """The names that may tell a file's split: its own, and those of the folders between it and the folder that the user named."""
    return (file.stem,) if file == root else (*file.relative_to(root).parent.parts, file.stem)


def _read_file(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", newline="") as handle:
            if file.suffix == ".jsonl":
                for number, line in enumerate(handle, 1):
                    if line.strip():
                        yield _text_of(line, file, number)
            else:
                yield from _pieces(handle.read())
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): convert it, for example with iconv.") from None
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}.") from None


def _text_of(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{file}, line {number}: expected one JSON object with a "text" key.') from None
    if not isinstance(text, str):
        raise UserError(f'{file}, line {number}: "text" must be a string.')
    return text


def _pieces(text: str) -> Iterator[str]:
    """A text as documents that end at line ends."""
    size, start = min(_CHARS_PER_DOCUMENT, len(text) // _DOCUMENTS_PER_FILE), 0
    while start < len(text):
        stop = text.find("\n", start + size)
        stop = len(text) if stop < 0 else stop + 1
        yield text[start:stop]
        start = stop
