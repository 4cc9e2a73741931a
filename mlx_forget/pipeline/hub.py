"""Data sets of the Hugging Face Hub, streamed through `datasets`, or read from its cache where HF_HUB_OFFLINE is set."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget.errors import UserError, unknown
from mlx_forget.pipeline.conversations import Content, Conversation
from mlx_forget.pipeline.filters import Filter
from mlx_forget.pipeline.formats import BadInput
from mlx_forget.pipeline.source_files import SPLIT_OF_NAME, SplitName
from mlx_forget.pipeline.sources import Reading, contents_of, digest_of, in_part, split_by, validation_share

PREFIX = "hf:"
# Of a data set whose card does not say its size.
UNKNOWN_BYTES = 10**9
_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?(@[\w./-]+)?$")
# What a file is called: `.jsonl`, not the `.2-1B` of `Llama-3.2-1B` or the `.1` of a revision.
_FILE_ENDING = re.compile(r"\.[A-Za-z]\w*$")


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub.

    Args:
        id: OWNER/NAME.
        config, revision: None takes the default one.
        files: patterns of files to read as records instead of what the data set declares, by split.
    """

    id: str
    config: str | None = None
    revision: str | None = None
    files: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.id + (f":{self.config}" if self.config else "") + (f"@{self.revision}" if self.revision else "")


def parse_id(name: str) -> HubData | None:
    """`hf:OWNER/NAME[:CONFIG][@REVISION]`; without `hf:` too where OWNER is no folder here. None for any other name."""
    plain = name.removeprefix(PREFIX)
    if not _ID.match(plain):
        if name.startswith(PREFIX):
            raise UserError(f"{name} is no id of a data set: write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or hf:OWNER/NAME@REVISION.")
        return None
    if plain == name and (_FILE_ENDING.search(name) or Path(name.split("/")[0]).exists()):
        return None
    rest, _, revision = plain.partition("@")
    identifier, _, config = rest.partition(":")
    return HubData(identifier, config or None, revision or None)


def read_hub(
    data: HubData, reading: Reading, *, bad: BadInput | None = None, keep: Filter | None = None, share: float | None = None
) -> Iterator[tuple[SplitName, Content]]:
    """Each document with its split: the data set's own validation split where it has one, else a share of the training split.

    Args:
        bad, keep, share: as of `read_documents`.

    Raises:
        UserError: no such data set, configuration, split or column; a login is needed; the Hub cannot be reached.
    """
    bad = bad or BadInput()
    keep = keep or Filter(min_chars=reading.min_chars, max_chars=reading.max_chars, once=reading.once)
    splits = _open(data, reading)
    if reading.split is not None:
        if reading.split not in splits:
            raise unknown("split", reading.split, splits)
        splits = {"train": splits[reading.split]}
    splits = {name: rows for name, rows in splits.items() if name in SPLIT_OF_NAME}
    if not splits:
        raise UserError(f"{data} has no train split: choose one with --split.")
    named = len(splits) > 1
    if share is None:
        share = validation_share(_num_bytes(splits.get("train")))
    empty = True
    for name, rows in splits.items():
        columns = [column for column in (rows.column_names or []) if column in reading.fields.columns()]
        chosen = rows.select_columns(columns) if columns else rows
        for content in contents_of(_numbered(chosen, data), reading.fields, bad, where=f"{data}, {name}"):
            text = content.text if isinstance(content, Conversation) else content
            digest = digest_of(text)
            empty = empty and not text.strip()
            if not text.strip() or not in_part(digest, reading.part) or not keep.keeps(text, digest):
                continue
            yield (SPLIT_OF_NAME[name] if named else split_by(digest, share)), content
    if empty:
        raise UserError(f"{data} holds no text.")


def _numbered(rows: Any, data: HubData) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(rows, 1)
    except (OSError, RuntimeError) as error:
        raise _refusal(data, error) from None


def _open(data: HubData, reading: Reading) -> dict[str, Any]:
    """The splits of a data set by name, each an iterable of records."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{data} is on the Hub, and reading it needs `datasets`: pip install 'mlx-forget[hf]'") from None
    config = reading.config or data.config
    files: dict[str, list[str]] = {}
    for split, pattern in data.files:
        files.setdefault(split, []).append(pattern)
    # Streaming needs the network; the cache can only be read whole.
    streaming = not (datasets.config.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE") == "1")
    try:
        opened = datasets.load_dataset(data.id, config, revision=data.revision, data_files=files or None, streaming=streaming)
    except Exception as error:
        raise _refusal(data, error) from None
    return dict(opened)


def _refusal(data: HubData, error: Exception) -> UserError:
    """What `datasets` could not do, as one sentence with the way out."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if "gated" in text.lower() or "Gated" in kind or "401" in text:
        return UserError(f"{data} needs a login: accept its terms on its page on the Hub, then run: hf auth login")
    if kind in ("DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"):
        return UserError(f"{data} does not exist on the Hub, or is private (then run: hf auth login).")
    if "Config name is missing" in text or "BuilderConfig" in text:
        return UserError(f"{data}: {text} Choose one with --config.")
    if isinstance(error, ConnectionError) or "Connect" in kind or "Offline" in kind or "offline" in text:
        return UserError(f"{data} cannot be reached and is not in the cache: {text[:200]} Give a folder with its files instead.")
    return UserError(f"{data} cannot be read ({kind}): {text[:300]}")


def _num_bytes(rows: Any) -> int:
    """The bytes of a split as its card says, or as for a large one."""
    info = getattr(rows, "info", None)
    splits = getattr(info, "splits", None) or {}
    train = splits.get("train")
    return int(train.num_bytes) if train is not None and train.num_bytes else UNKNOWN_BYTES
