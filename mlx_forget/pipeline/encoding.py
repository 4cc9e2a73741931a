"""Documents to token ids and loss masks, in this process or in a worker, which loads no more than that takes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_forget.pipeline.conversations import Content, Conversation
from mlx_forget.pipeline.vocabularies import Vocabulary, load_vocabulary

Encoded = tuple[NDArray[np.int32], NDArray[np.uint8] | None]


def encode(contents: list[Content], vocabulary: Vocabulary, *, num_threads: int | None = None) -> list[Encoded]:
    """(tokens int32[T] without the last EOS, loss mask uint8[T + 1] with it or None where everything is learnt) of each document."""
    template = vocabulary.chat_template
    texts: list[str] = []
    for content in contents:
        if not isinstance(content, Conversation):
            texts.append(content)
        elif template is None:
            texts.extend(text for _, text in content.turns)
    ids = iter(vocabulary.encode_batch(texts, num_threads=num_threads))
    encoded: list[Encoded] = []
    for content in contents:
        if isinstance(content, Conversation) and template is not None:
            encoded.append(template.document(content.messages, bos_id=vocabulary.bos_id, eos_id=vocabulary.eos_id))
        elif isinstance(content, Conversation):
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


def worker(setup: bytes) -> Callable[[bytes], bytes]:
    """What a worker process does with a block of documents; `setup` is the path of the tokenizer."""
    # Every core has a worker of its own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    vocabulary = load_vocabulary(Path(setup.decode()))

    def work(question: bytes) -> bytes:
        return _pack(encode(_unpack_contents(question), vocabulary, num_threads=1))

    return work


def pack_contents(contents: list[Content]) -> bytes:
    """What a worker is asked: the roles of each document, null for plain text, as JSON; the bytes of each text; all texts.

    JSON of the texts themselves would take a third as long as tokenising them.
    """
    roles = [[role for role, _ in content.messages] if isinstance(content, Conversation) else None for content in contents]
    texts: list[bytes] = []
    for content in contents:
        texts.extend([text.encode() for _, text in content.messages] if isinstance(content, Conversation) else [content.encode()])
    head = json.dumps(roles).encode()
    sizes = np.array([len(text) for text in texts], np.int64)
    return b"".join([len(head).to_bytes(8, "little"), len(texts).to_bytes(8, "little"), head, sizes.tobytes(), *texts])


def _unpack_contents(question: bytes) -> list[Content]:
    end = 16 + int.from_bytes(question[:8], "little")
    sizes = np.frombuffer(question, np.int64, int.from_bytes(question[8:16], "little"), end)
    view = memoryview(question)
    stops = (end + sizes.nbytes + np.cumsum(sizes)).tolist()
    starts = [end + sizes.nbytes, *stops]
    texts = (str(view[start:stop], "utf-8") for start, stop in zip(starts, stops, strict=False))
    return [
        next(texts) if roles is None else Conversation(tuple((role, next(texts)) for role in roles))
        for roles in json.loads(view[16:end].tobytes())
    ]


def _pack(encoded: list[Encoded]) -> bytes:
    """The number of documents, then for each its length and whether it has a mask, then all tokens, then all masks."""
    head = np.array([[len(ids), mask is not None] for ids, mask in encoded], np.int64)
    masks = [mask.tobytes() for _, mask in encoded if mask is not None]
    return b"".join([len(encoded).to_bytes(8, "little"), head.tobytes(), *(ids.tobytes() for ids, _ in encoded), *masks])


def unpack(answer: bytes) -> list[Encoded]:
    """What a worker answered."""
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
