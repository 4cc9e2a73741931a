"""Documents to a store: tokenised by all cores, the same bytes for any number of them, in a bounded memory.

This process reads, filters and splits; workers tokenise blocks of documents; the answers come back in order and are written here. After
a kill the same call reads again, which is fast, and tokenises from the last whole shard on.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_forget.errors import UserError
from mlx_forget.pipeline.conversations import Content, Conversation
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


Encoded = tuple[NDArray[np.int32], NDArray[np.uint8] | None]
# Split, source, UTF-8 bytes and content of each document of a block.
_Block = list[tuple[str, int, int, Content]]


def encode(contents: list[Content], vocabulary: Vocabulary, *, num_threads: int | None = None) -> list[Encoded]:
    """(tokens int32[T] without the last EOS, loss mask uint8[T + 1] with it or None where everything is learnt) of each document."""
    texts: list[str] = []
    for content in contents:
        texts.extend([text for _, text in content.turns] if isinstance(content, Conversation) else [content])
    ids = iter(vocabulary.encode_batch(texts, num_threads=num_threads))
    encoded: list[Encoded] = []
    for content in contents:
        if isinstance(content, Conversation):
            encoded.append(_conversation([(role, next(ids)) for role, _ in content.turns], vocabulary))
        else:
            encoded.append((next(ids), None))
    return encoded


def _conversation(turns: list[tuple[str, NDArray[np.int32]]], vocabulary: Vocabulary) -> Encoded:
    tokens: list[Any] = []
    mask: list[Any] = []

    def say(ids: Any, learn: int) -> None:
        tokens.append(np.asarray(ids, np.int32))
        mask.append(np.full(len(tokens[-1]), learn, np.uint8))

    for place, (role, ids) in enumerate(turns):
        if role == "user":
            say(vocabulary.inst_ids, 0)
            say(ids, 0)
            say(vocabulary.end_inst_ids, 0)
        else:
            say(ids, 1)
            if place < len(turns) - 1:
                say([vocabulary.eos_id], 1)
    mask.append(np.full(1, turns[-1][0] == "assistant", np.uint8))
    return np.concatenate(tokens), np.concatenate(mask)


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
    progress(activity, 0.0, 0)

    def skip(document_bytes: int) -> None:
        nonlocal done
        done += document_bytes

    try:
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
            plain = [content.turns if isinstance(content, Conversation) else content for *_, content in block]
            yield json.dumps(plain, ensure_ascii=False).encode()

    entry = "mlx_forget.pipeline.tokenise:worker"
    setup = str(tokenizer_file.absolute()).encode()
    for answer in ordered_map(questions(), entry, num_workers=num_workers, setup=setup):
        yield asked.pop(0), _unpack(answer)


def worker(setup: bytes) -> Callable[[bytes], bytes]:
    """What a worker process does with a block of documents; `setup` is the path of the tokenizer."""
    # Every core has a worker of its own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    vocabulary = load_vocabulary(Path(setup.decode()))

    def work(question: bytes) -> bytes:
        contents: list[Content] = [
            plain if isinstance(plain, str) else Conversation(tuple((role, text) for role, text in plain))
            for plain in json.loads(question)
        ]
        return _pack(encode(contents, vocabulary, num_threads=1))

    return work


def _pack(encoded: list[Encoded]) -> bytes:
    """The number of documents, then for each its length and whether it has a mask, then all tokens, then all masks."""
    head = np.array([[len(ids), mask is not None] for ids, mask in encoded], np.int64)
    masks = [mask.tobytes() for _, mask in encoded if mask is not None]
    return b"".join([len(encoded).to_bytes(8, "little"), head.tobytes(), *(ids.tobytes() for ids, _ in encoded), *masks])


def _unpack(answer: bytes) -> list[Encoded]:
    count = int.from_bytes(answer[:8], "little")
    head = np.frombuffer(answer, np.int64, 2 * count, 8).reshape(count, 2)
    ids_from = 8 + head.nbytes
    ids = np.frombuffer(answer, np.int32, int(head[:, 0].sum()), ids_from)
    masks = np.frombuffer(answer, np.uint8, -1, ids_from + ids.nbytes)
    encoded: list[Encoded] = []
    token, bit = 0, 0
    for size, masked in head.tolist():
        mask = masks[bit : bit + size + 1] if masked else None
        encoded.append((ids[token : token + size], mask))
        token, bit = token + size, bit + (size + 1 if masked else 0)
    return encoded
