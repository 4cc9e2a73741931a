"""Documents from what a user has: files of text or records, folders and globs of them, dataset repositories on disk.

A record is one document; a long text file is cut into several at line ends. A folder may hold `train` and `valid` files or subfolders by
name (also `train-00000-of-00004`), or a README.md that names them as the Hub's dataset repositories do; others, and single files, are
split by document hash: 3% validate, more of a small source. `test` files are left out.
"""

import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mlx_forget.errors import UserError, unknown
from mlx_forget.pipeline.conversations import Content, Conversation, Fields, content_of
from mlx_forget.pipeline.filters import Filter
from mlx_forget.pipeline.formats import (
    KNOWN_FORMATS,
    RECORD_SUFFIXES,
    SUFFIXES,
    TEXT_SUFFIXES,
    BadInput,
    format_of,
    read_records,
    read_texts,
    stem_of,
)
from mlx_forget.strict_yaml import parse_yaml

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
__all__ = ["SPLITS", "SUFFIXES", "Reading", "SplitName", "content_hash", "find_files", "read_documents", "split_of"]

# A source validates on about 300 KB of its text where that is between 3% and 20% of it.
_VALIDATION_BYTES = 300_000
_LEAST_SHARE, _MOST_SHARE = 0.03, 0.2
_SPLIT_OF_NAME: dict[str, SplitName] = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
}
# The parts of a split, as the Hub writes them.
_PART_NUMBER = re.compile(r"-\d+(-of-\d+)?(-[0-9a-f]{16})?$")


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
        split: read this split of a dataset repository only, and validate on a share of it.
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


def find_files(path: Path | str, reading: Reading | None = None) -> list[Path]:
    """The files that a path or glob names, sorted; `test` files are left out.

    Raises:
        UserError: nothing there, or nothing in a known format.
    """
    return [file for file, _ in _find(Path(path), reading or Reading())]


def is_glob(name: str | Path) -> bool:
    """Whether a name is a pattern and no file of that very name."""
    return glob.has_magic(str(name)) and not Path(name).exists()


def read_documents(
    path: Path | str, reading: Reading | None = None, *, bad: BadInput | None = None, keep: Filter | None = None
) -> Iterator[tuple[SplitName, Content]]:
    """Each document that a path names with the split it belongs to.

    Args:
        bad: takes what cannot be read; by default that is an error.
        keep: decides on documents and counts those left out; by default made from `reading`.

    Raises:
        UserError: a file that cannot be read (file, line and first characters named), or no text at all.
    """
    reading, bad = reading or Reading(), bad or BadInput()
    keep = keep or Filter(min_chars=reading.min_chars, max_chars=reading.max_chars, once=reading.once)
    found = _find(Path(path), reading)
    by_name = dict(found)
    named = "validation" in by_name.values() and reading.split is None
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
    if not num_kept and keep.dropped:
        raise UserError(f"Every document of {path} was left out: {describe_counts(keep.dropped)}.")


def holds_out_by_name(path: Path) -> bool:
    """Whether files or subfolders say by their names which documents validate."""
    return any(split == "validation" for _, split in _find(path, Reading()))


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


def content_hash(path: Path | str, reading: Reading | None = None) -> str:
    """A hash of the names and bytes of every file that a path names."""
    root = _root(Path(path))
    total = hashlib.sha256()
    for file in find_files(path, reading):
        try:
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"Cannot read {file}: {error.strerror}.") from None
        total.update(f"{file.name if root.is_file() else file.relative_to(root)}\n{digest}\n".encode())
    return total.hexdigest()


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


def _find(path: Path, reading: Reading) -> list[tuple[Path, SplitName | None]]:
    """The files that a path names, sorted, with the split that its name tells."""
    if path.is_file():
        if format_of(path) is None:
            raise UserError(f"{path} has an unknown format; known: {KNOWN_FORMATS}.")
        return [(path, None)]
    if is_glob(path):
        root = _root(path)
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise UserError(f"No file matches {path}.")
        return _with_splits([file for file in files if format_of(file)], path, lambda file: _names(file, root))
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    if (listed := _repository_files(path, reading)) is not None:
        return listed
    files = sorted(file for file in path.rglob("*") if format_of(file) and file.is_file() and not _is_hidden(file, path))
    if any(format_of(file) in RECORD_SUFFIXES for file in files):
        files = [file for file in files if stem_of(file).upper() not in ("README", "LICENSE") and file.name not in _DATASETS_FILES]
    return _with_splits(files, path, lambda file: _names(file, path))


# What `Dataset.save_to_disk` writes beside the data.
_DATASETS_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")


def _with_splits(files: list[Path], path: Path, names_of: Any) -> list[tuple[Path, SplitName | None]]:
    found = []
    for file in files:
        names = names_of(file)
        if "test" not in names:
            found.append((file, next((_SPLIT_OF_NAME[name] for name in names if name in _SPLIT_OF_NAME), None)))
    if not found:
        raise UserError(f"{path} has no files of a known format ({KNOWN_FORMATS}).")
    return found


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _names(file: Path, root: Path) -> tuple[str, ...]:
    """The names that may tell a file's split: its own, and those of the folders between it and the folder that the user named."""
    own = _PART_NUMBER.sub("", stem_of(file))
    return (own,) if file == root else (*file.relative_to(root).parent.parts, own)


def _root(path: Path) -> Path:
    """The folder under which a glob's matches lie; any other path itself."""
    if not is_glob(path):
        return path
    fixed = path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))]
    return Path(*fixed) if fixed else Path(".")


def _repository_files(folder: Path, reading: Reading) -> list[tuple[Path, SplitName | None]] | None:
    """The files of a dataset repository, as the front matter of its README.md lists them; None where it lists none."""
    configs = _repository_configs(folder / "README.md")
    if not configs:
        if reading.config is not None:
            raise UserError(f"{folder} has no configurations (its README.md lists none): leave --config out.")
        return None
    wanted = reading.config or next((name for name, chosen in configs.items() if chosen.get("default")), None)
    wanted = wanted or ("default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else None)
    if wanted is None:
        raise UserError(f"{folder} has several configurations: choose one with --config: {', '.join(configs)}.")
    if wanted not in configs:
        raise unknown("configuration", wanted, configs)
    splits = _data_files(configs[wanted].get("data_files"))
    if reading.split is not None:
        if reading.split not in splits:
            raise unknown("split", reading.split, splits)
        splits = {"train": splits[reading.split]}
    found: list[tuple[Path, SplitName | None]] = []
    for name, patterns in splits.items():
        if name != "test":
            found += [(file, _SPLIT_OF_NAME.get(name)) for pattern in patterns for file in files_below(folder, pattern)]
    if not found:
        raise UserError(f"{folder / 'README.md'} lists no data files of a known format.")
    return sorted(found)


def files_below(folder: Path, pattern: str) -> list[Path]:
    """The files below a folder that match a pattern written by others, sorted.

    Raises:
        UserError: the pattern leads out of the folder.
    """
    if os.path.isabs(pattern) or ".." in Path(pattern).parts:
        raise UserError(f"{folder}: its data files {pattern!r} lead out of it, which is refused.")
    wanted = Path(pattern).parts
    # Links to folders are not followed: two of them can make more paths than there is time for.
    below = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    files = sorted(file for file in below if format_of(file) and _fits(file.relative_to(folder).parts, wanted) and file.is_file())
    home = folder.resolve()
    for file in files:
        if not file.resolve().is_relative_to(home) and not (
            home.parent.name == "snapshots" and home.parents[1] in file.resolve().parents
        ):
            raise UserError(f"{file} is a link that leads out of {folder}, which is refused.")
    return files


def _fits(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether a path is one of a pattern: `**` stands for any folders, and names that begin with a dot must be written out."""
    # Which beginnings of the pattern the parts so far can be.
    ends = {0} | ({1} if wanted[:1] == ("**",) else set())
    for part in parts:
        found = set()
        for end in ends:
            if end and wanted[end - 1] == "**" and not part.startswith("."):
                found.add(end)
            is_hidden = part.startswith(".") and end < len(wanted) and not wanted[end].startswith(".")
            if end < len(wanted) and wanted[end] != "**" and not is_hidden and fnmatch.fnmatchcase(part, wanted[end]):
                found.add(end + 1)
        while more := {end + 1 for end in found if end < len(wanted) and wanted[end] == "**"} - found:
            found |= more
        ends = found
    return len(wanted) in ends


def _repository_configs(readme: Path) -> dict[str, dict[str, Any]]:
    """The configurations in the YAML head of a dataset repository's README.md, by name."""
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    parts = text.split("---\n", 2)
    if not text.startswith("---") or len(parts) < 3:
        return {}
    try:
        configs = parse_yaml(parts[1], str(readme)).get("configs")
    except UserError:
        return {}
    if not isinstance(configs, list):
        return {}
    return {str(c["config_name"]): c for c in configs if isinstance(c, dict) and "config_name" in c and "data_files" in c}


def _data_files(listed: Any) -> dict[str, list[str]]:
    """Patterns by split from the forms that `data_files` may have: a pattern, a list of them, or a list of splits."""
    if isinstance(listed, str):
        listed = [listed]
    splits: dict[str, list[str]] = {}
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict):
            patterns = entry.get("path", [])
            patterns = patterns if isinstance(patterns, list) else [patterns]
            splits.setdefault(str(entry.get("split", "train")), []).extend(str(pattern) for pattern in patterns)
        else:
            splits.setdefault("train", []).append(str(entry))
    return splits
