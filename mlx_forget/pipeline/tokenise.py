"""Documents to a store: tokenised by all cores, the same bytes for any number of them, in a bounded memory.

This process reads, filters and splits; workers tokenise blocks of documents; the answers come back in order and are written here. After
a kill the same call reads again, which is fast, and tokenises from the last whole shard on.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from mlx_forget.errors import UserError
from mlx_forget.pipeline.conversations import Content, Conversation
from mlx_forget.pipeline.encoding import Encoded, encode, pack_contents, unpack
from mlx_forget.pipeline.store import StoreWriter, TokenStore
from mlx_forget.pipeline.vocabularies import Vocabulary, load_vocabulary
from mlx_forget.pipeline.workers import ordered_map

_BLOCK_DOCUMENTS = 2048
_BLOCK_BYTES = 1 << 20
# Below this, starting children costs more than they save.
_MIN_BYTES_FOR_WORKERS = 8_000_000


class Progress(Protocol):
    """Told what is going on, how far it is (0 to 1), and how many bytes of text are done where that is known."""

    def __call__(self, activity: str, fraction: float, num_bytes: int = 0, /) -> None: ...


class Document(NamedTuple):
    """A document on its way into a store."""

    split: str
    content: Content
    source: int = 0


# Split, source, UTF-8 bytes and content of each document of a block.
_Block = list[tuple[str, int, int, Content]]


def tokenise(
    documents: Iterable[Document],
    open_writer: Callable[[Vocabulary], StoreWriter],
    tokenizer_file: Path,
    *,
    activity: str,
    num_bytes: int,
    progress: Progress,
    num_workers: int | None = None,
    close: Callable[[StoreWriter], TokenStore] = StoreWriter.close,
) -> TokenStore:
    """Write documents into a new store.

    Args:
        open_writer: makes the writer once the tokenizer is known; the documents that it has already are not tokenised again.
        activity: what progress is told.
        num_bytes: UTF-8 bytes of all documents, about.
        num_workers: processes; None takes every core, or this process for little text; 0 is this process.
        close: ends the writer.

    Raises:
        RunFailed: a worker died.
    """
    vocabulary = load_vocabulary(tokenizer_file)
    writer = open_writer(vocabulary)
    total = max(1, num_bytes)
    done = 0

    def skip(document_bytes: int) -> None:
        nonlocal done
        done += document_bytes

    try:
        progress(activity, 0.0, 0)
        blocks = _blocks(documents, dict(writer.num_written), skip)
        if num_workers is None:
            num_workers = (os.cpu_count() or 1) if num_bytes >= _MIN_BYTES_FOR_WORKERS else 0
        encoded = _by_workers(blocks, tokenizer_file, num_workers) if num_workers else _here(blocks, vocabulary)
        for block, answers in encoded:
            for (split, source, size, _), (ids, mask) in zip(block, answers, strict=True):
                writer.add(split, ids, size, loss_mask=mask, source=source)
                done += size
            progress(activity, min(0.99, done / total), done)
        if not writer.num_documents:
            raise UserError(f"Nothing to write: {activity} gave no document.")
        store = close(writer)
        progress(activity, 1.0, done)
        return store
    finally:
        writer.abandon()


def _blocks(documents: Iterable[Document], written: dict[str, int], skip: Callable[[int], None]) -> Iterator[_Block]:
    """Documents in blocks of about a megabyte, without those that are written already."""
    block: _Block = []
    size = 0
    for split, content, source in documents:
        text = content.text if isinstance(content, Conversation) else content
        num_bytes = len(text.encode())
        if written.get(split, 0):
            written[split] -= 1
            skip(num_bytes)
            continue
        block.append((split, source, num_bytes, content))
        size += num_bytes
        if size >= _BLOCK_BYTES or len(block) >= _BLOCK_DOCUMENTS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _here(blocks: Iterator[_Block], vocabulary: Vocabulary) -> Iterator[tuple[_Block, list[Encoded]]]:
    for block in blocks:
        yield block, encode([content for *_, content in block], vocabulary)


def _by_workers(blocks: Iterator[_Block], tokenizer_file: Path, num_workers: int) -> Iterator[tuple[_Block, list[Encoded]]]:
    asked: list[_Block] = []

    def questions() -> Iterator[bytes]:
        for block in blocks:
            asked.append([(split, source, size, "") for split, source, size, _ in block])
            yield pack_contents([content for *_, content in block])

    entry = "mlx_forget.pipeline.encoding:worker"
    setup = str(tokenizer_file.absolute()).encode()
    for answer in ordered_map(questions(), entry, num_workers=num_workers, setup=setup):
        yield asked.pop(0), unpack(answer)
