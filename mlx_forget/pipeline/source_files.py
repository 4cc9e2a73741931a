"""The files that a user names, and the split that each belongs to: one file, a folder, a glob, a dataset repository on disk.

A folder may hold `train` and `valid` files or subfolders by name (also `train-00000-of-00004`), or a README.md that names them as the Hub's
dataset repositories do. `test` files are left out.
"""

import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mlx_forget.errors import UserError, unknown
from mlx_forget.pipeline.formats import KNOWN_FORMATS, RECORD_SUFFIXES, format_of, stem_of
from mlx_forget.strict_yaml import parse_yaml

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
SPLIT_OF_NAME: dict[str, SplitName] = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
}
# None is what no name tells.
Found = list[tuple[Path, SplitName | None]]

# The parts of a split, as the Hub writes them.
_PART_NUMBER = re.compile(r"-\d+(-of-\d+)?(-[0-9a-f]{16})?$")
# A split, or one of a purpose, such as `train_sft` beside `test_sft`.
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(|[_.-].*)")
# What `Dataset.save_to_disk` writes beside the data.
_DATASETS_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")


def find_files(path: Path | str, *, config: str | None = None, split: str | None = None) -> list[Path]:
    """The files that a path or glob names, sorted, as `find_splits` does."""
    return [file for file, _ in find_splits(path, config=config, split=split)]


def is_glob(name: str | Path) -> bool:
    """Whether a name is a pattern and no file of that very name."""
    return glob.has_magic(str(name)) and not Path(name).exists()


def holds_out_by_name(path: Path) -> bool:
    """Whether files or subfolders say by their names which documents validate."""
    return any(split == "validation" for _, split in find_splits(path))


def content_hash(path: Path | str, *, config: str | None = None, split: str | None = None) -> str:
    """A hash of the names and bytes of every file that a path names, and of the splits that they are."""
    root = _root(Path(path))
    total = hashlib.sha256()
    for file, role in find_splits(path, config=config, split=split):
        try:
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"Cannot read {file}: {error.strerror}.") from None
        total.update(f"{file.name if root.is_file() else file.relative_to(root)}\n{digest}\n{role or ''}".encode())
    return total.hexdigest()


def find_splits(path: Path | str, *, config: str | None = None, split: str | None = None) -> Found:
    """The files that a path or glob names, sorted, each with the split that its name or its repository tells.

    Args:
        config: the configuration of a dataset repository.
        split: this split alone, which then has no validation part of its own.

    Raises:
        UserError: nothing there, nothing in a known format, or no such configuration or split.
    """
    path = Path(path)
    if path.is_file():
        if format_of(path) is None:
            raise UserError(f"{path} has an unknown format; known: {KNOWN_FORMATS}.")
        if config is not None or split is not None:
            raise UserError(f"{path} is one file, without configurations and splits: leave --config and --split out.")
        return [(path, None)]
    if is_glob(path):
        root = _root(path)
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise UserError(f"No file matches {path}.")
        if config is not None:
            raise UserError(f"{path} is a pattern, without configurations: leave --config out.")
        return _by_names([file for file in files if format_of(file)], path, split, lambda file: _names(file, root))
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    if (listed := _repository_files(path, config, split)) is not None:
        return listed
    files = sorted(file for file in path.rglob("*") if format_of(file) and file.is_file() and not _is_hidden(file, path))
    if any(format_of(file) in RECORD_SUFFIXES for file in files):
        files = [file for file in files if stem_of(file).upper() not in ("README", "LICENSE") and file.name not in _DATASETS_FILES]
    return _by_names(files, path, split, lambda file: _names(file, path))


def _by_names(files: list[Path], path: Path, split: str | None, names_of: Callable[[Path], tuple[str, ...]]) -> Found:
    if not files:
        raise UserError(f"{path} has no files of a known format ({KNOWN_FORMATS}).")
    names = {file: names_of(file) for file in files}
    if split is not None:
        chosen = [file for file in files if any(_is_split(name, split) for name in names[file])]
        if not chosen:
            there = {name for own in names.values() for name in own if _SPLIT.fullmatch(name)}
            raise unknown("split", split, there) if there else UserError(f"{path} has no splits by name: leave --split out.")
        return [(file, None) for file in chosen]
    roles = _roles({name for own in names.values() for name in own})
    # The outermost folder that is a split decides.
    role_of = {file: next((roles[name] for name in names[file] if name in roles), None) for file in files}
    found: Found = [(file, role) for file, role in role_of.items() if role != "test"]
    if not found:
        raise UserError(f"{path} has test files only: give --split test to train on them.")
    return found


def _roles(names: set[str]) -> dict[str, SplitName | Literal["test"]]:
    """What each name that is a split stands for. `test-driven-development` is none where there is no `train-driven-development`."""
    matches = {name: _SPLIT.fullmatch(name) for name in names}
    return {
        name: SPLIT_OF_NAME.get(match[1], "test")
        for name, match in matches.items()
        if match is not None and (not match[2] or f"train{match[2]}" in names)
    }


def _is_split(name: str, asked: str) -> bool:
    """Whether the name of a file or folder is that of a split, under any of its common names."""
    return name == asked or (asked in SPLIT_OF_NAME and SPLIT_OF_NAME.get(name) == SPLIT_OF_NAME[asked])


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


def _repository_files(folder: Path, config: str | None, split: str | None) -> Found | None:
    """The files of a dataset repository, as the front matter of its README.md lists them; None where it lists none."""
    configs = _repository_configs(folder / "README.md")
    if not configs:
        if config is not None:
            raise UserError(f"{folder} has no configurations (its README.md lists none): leave --config out.")
        return None
    wanted = config or next((name for name, chosen in configs.items() if chosen.get("default")), None)
    wanted = wanted or ("default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else None)
    if wanted is None:
        raise UserError(f"{folder} has several configurations: choose one with --config: {', '.join(configs)}.")
    if wanted not in configs:
        raise unknown("configuration", wanted, configs)
    splits = {
        name: [file for pattern in patterns for file in files_below(folder, pattern)]
        for name, patterns in _data_files(configs[wanted].get("data_files")).items()
    }
    found: dict[Path, SplitName | None] = {}
    for name, split_name in _chosen_splits(list(splits), split, folder).items():
        # What validates is not trained on, though both patterns match it.
        found.update((file, split_name) for file in splits[name] if found.get(file) != "validation")
    if split is None:
        tests = {
            file for name, files in splits.items() if (match := _SPLIT.fullmatch(name)) and match[1] == "test" for file in files
        }
        found = {file: split_name for file, split_name in found.items() if file not in tests}
    if not found:
        raise UserError(f"{folder / 'README.md'} lists no data files of a known format.")
    return sorted(found.items(), key=lambda one: one[0])


def _chosen_splits(names: list[str], asked: str | None, folder: Path) -> dict[str, SplitName | None]:
    """The splits of a repository to read, with what they are."""
    if asked is not None:
        if asked not in names:
            raise unknown("split", asked, names)
        return {asked: None}
    matches = {name: _SPLIT.fullmatch(name) for name in names}
    # (kind, purpose): of a card every name is a split.
    kinds = {name: (SPLIT_OF_NAME.get(match[1], "test"), match[2]) if match else (None, "") for name, match in matches.items()}
    trained = [name for name in names if name == "train"] or [name for name in names if kinds[name][0] == "train"]
    trained = trained or [name for name in names if kinds[name][0] is None]
    held_out = [name for name in names if kinds[name][0] == "validation"]
    if len(trained) > 1 or (names and not trained and not held_out):
        raise UserError(f"{folder} has no train split: choose one with --split: {', '.join(names)}.")
    purposes = {"", *(kinds[name][1] for name in trained)}
    return {name: "train" if kinds[name][0] == "train" else None for name in trained} | {
        name: "validation" for name in held_out if kinds[name][1] in purposes
    }


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
