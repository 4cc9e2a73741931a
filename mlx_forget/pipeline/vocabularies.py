"""Any tokenizer behind one interface: ours, another SentencePiece model, a `tokenizer.json`, or those of a folder or a Hub id.

A SentencePiece model is one file, and its hash is that of the file. A `tokenizer.json` does not say which of its ids begin and end a
document: that is in the `tokenizer_config.json` beside it, which travels with it and is part of the hash.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from mlx_forget.durable_files import read_bytes, read_object
from mlx_forget.errors import UserError
from mlx_forget.pipeline.chat_template import TEMPLATE_FILE, ChatTemplate
from mlx_forget.pipeline.tokenizer import Tokenizer

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"

_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# What travels with a tokenizer.json, for whoever loads the copy.
_COMPANIONS = (*_CONFIG_FILES, TEMPLATE_FILE, "added_tokens.json", "vocab.json", "merges.txt")
# Where a piece stands for bytes: U+2581 for a space, <0x0A> for one byte.
_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KNOWN_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "[CLS]")
_KNOWN_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "[SEP]")


def _byte_of() -> dict[str, bytes]:
    """The byte that each character of a byte-level piece stands for: itself where it is printable, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


class Vocabulary(Protocol):
    """What the pipeline asks of a tokenizer.

    Attributes:
        hash: sha256 of the file, and of what it does not say itself.
        vocab_size: ids are below it.
        bos_id, eos_id: stand before every row and after every document.
        inst_ids, end_inst_ids: stand around every question of a conversation.
    piece_bytes: the UTF-8 bytes that every id adds to a text; none for special ids.
    """

    hash: str
    vocab_size: int
    bos_id: int
    eos_id: int
    inst_ids: tuple[int, ...]
    end_inst_ids: tuple[int, ...]

    @property
    def chat_template(self) -> ChatTemplate | None:
        """How conversations are written instead, where the tokenizer says so."""

    @property
    def piece_bytes(self) -> tuple[bytes, ...]: ...

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids int32[T] of a text, without special ones."""

    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[NDArray[np.int32]]:
        """Ids int32[T] of each text, without special ones."""

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of ids, without special ones."""

    def piece(self, index: int) -> str:
        """The name of an id."""


@final
class SentencePieceVocabulary:
    """A SentencePiece model that was not trained here: its own special ids, its own way with spaces."""

    chat_template: ChatTemplate | None = None

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, UnicodeDecodeError):
            raise UserError("It is not a SentencePiece model.") from None
        self.hash = hashlib.sha256(model).hexdigest()
        self.vocab_size = int(self._processor.get_piece_size())
        self.eos_id = int(self._processor.eos_id())
        self.bos_id = int(self._processor.bos_id()) if self._processor.bos_id() >= 0 else self.eos_id
        if self.eos_id < 0:
            raise UserError("It has no id that ends a document (eos_id is -1).")
        self.inst_ids = tuple(self._processor.encode("[INST]"))
        self.end_inst_ids = tuple(self._processor.encode("[/INST]"))

    @property
    def piece_bytes(self) -> tuple[bytes, ...]:
        processor = self._processor
        silent = {i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i)}
        return tuple(b"" if i in silent else _spaced_bytes(str(processor.id_to_piece(i))) for i in range(self.vocab_size))

    def encode(self, text: str) -> NDArray[np.int32]:
        return self.encode_batch([text], num_threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[NDArray[np.int32]]:
        threads = num_threads or os.cpu_count() or 1
        ids: list[NDArray[np.int32]] = self._processor.encode(list(texts), out_type="numpy", num_threads=threads)
        return ids

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        return str(self._processor.decode([int(i) for i in ids]))

    def piece(self, index: int) -> str:
        return str(self._processor.id_to_piece(index))


@final
class JsonVocabulary:
    """A `tokenizer.json` of the `tokenizers` library. No text gives special ids.

    Args:
        content: the file.
        folder: where the files are that name its special tokens.
    """

    def __init__(self, content: bytes, folder: Path) -> None:
        try:
            from tokenizers import Tokenizer as Encoder
        except ImportError:
            raise UserError("It is a tokenizer.json, which needs `tokenizers`: pip install 'mlx-forget[hf]'") from None
        try:
            self._encoder = Encoder.from_str(content.decode())
        except Exception as error:
            raise UserError(f"It is not a tokenizer.json that the installed `tokenizers` reads: {error}.") from None
        try:
            # `tokenizers` reads some texts that are no JSON.
            self._decoders = _decoders(json.loads(content).get("decoder"))
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"It is no JSON, or of another form ({type(error).__name__}).") from None
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._encoder.encode_special_tokens = True
        self.vocab_size = max(self._encoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_id = self._id(_special_token(folder, "eos_token"), _KNOWN_EOS, "ends")
        self.bos_id = self._id(_special_token(folder, "bos_token"), _KNOWN_BOS, "begins", otherwise=self.eos_id)
        self.special_tokens = {"bos_token": self.piece(self.bos_id), "eos_token": self.piece(self.eos_id)}
        self.content_hash = hashlib.sha256(content).hexdigest()
        self.hash = hashlib.sha256(content + json.dumps(self.special_tokens).encode()).hexdigest()
        self.inst_ids, self.end_inst_ids = self._marks("[INST]"), self._marks("[/INST]")
        self.chat_template = ChatTemplate.find(content, folder)

    @property
    def piece_bytes(self) -> tuple[bytes, ...]:
        added = self._encoder.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for piece, index in self._encoder.get_vocab(with_added_tokens=True).items():
            if index in added:
                table[index] = b"" if added[index].special else added[index].content.encode()
            elif "ByteLevel" in self._decoders:
                table[index] = b"".join(_BYTE_OF.get(character, character.encode()) for character in piece)
            elif "WordPiece" in self._decoders:
                table[index] = piece[2:].encode() if piece.startswith("##") else b" " + piece.encode()
            else:
                table[index] = _spaced_bytes(piece)
        return tuple(table)

    def encode(self, text: str) -> NDArray[np.int32]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[NDArray[np.int32]]:
        encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        return str(self._encoder.decode([int(i) for i in ids], skip_special_tokens=True))

    def _id(self, given: str | None, known: Sequence[str], what: str, *, otherwise: int | None = None) -> int:
        for piece in [given] if given else known:
            found = self._encoder.token_to_id(piece)
            if found is not None:
                return int(found)
        if otherwise is not None:
            return otherwise
        raise UserError(f"It does not say which id {what} a document: give the folder that also holds its tokenizer_config.json.")

    def piece(self, index: int) -> str:
        return str(self._encoder.id_to_token(index))

    def _marks(self, text: str) -> tuple[int, ...]:
        own = self._encoder.token_to_id(text)
        try:
            return (int(own),) if own is not None else tuple(self._encoder.encode(text, add_special_tokens=False).ids)
        except Exception as error:
            raise UserError(f"It encodes no text: {error}.") from None


def load_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer in a file, whatever its kind.

    Raises:
        UserError: no such file, or none that can be used (why).
    """
    try:
        content = read_bytes(path)
    except OSError as error:
        raise UserError(f"Cannot read the tokenizer {path}: {error.strerror}.") from None
    try:
        if _is_json(content):
            return JsonVocabulary(content, path.parent)
        try:
            return Tokenizer(content)
        except UserError as error:
            if "not a SentencePiece" in str(error):
                raise
            return SentencePieceVocabulary(content)
    except UserError as error:
        raise UserError(f"Cannot use the tokenizer {path}: {error}") from None


def marked_text(vocabulary: Vocabulary, ids: NDArray[np.integer[Any]]) -> str:
    """The text of ids with special ones by their names, such as the marks between the turns of a conversation."""
    silent = np.array([not piece for piece in vocabulary.piece_bytes])
    parts: list[str] = []
    start = 0
    for place in [*silent[ids].nonzero()[0].tolist(), len(ids)]:
        parts.append(vocabulary.decode(ids[start:place]))
        if place < len(ids):
            parts.append(vocabulary.piece(int(ids[place])))
        start = place + 1
    return "".join(parts)


def same_pieces(first: Vocabulary, second: Vocabulary) -> bool:
    """Whether two tokenizers give text the same ids, whatever they begin and end documents with."""
    if isinstance(first, JsonVocabulary) and isinstance(second, JsonVocabulary):
        return first.content_hash == second.content_hash
    return first.hash == second.hash


def file_name(tokenizer: Path) -> str:
    """The name that a tokenizer file has in a store or checkpoint."""
    with tokenizer.open("rb") as file:
        return JSON_FILE if _is_json(file.read(64)) else SENTENCEPIECE_FILE


def tokenizer_in(folder: Path) -> Path:
    """The tokenizer file of a store or checkpoint."""
    return folder / JSON_FILE if (folder / JSON_FILE).is_file() else folder / SENTENCEPIECE_FILE


def special_ids(tokenizer: Path) -> tuple[int, int]:
    """(bos, eos) of a tokenizer file."""
    vocabulary = load_vocabulary(tokenizer)
    return vocabulary.bos_id, vocabulary.eos_id


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Put a tokenizer into a store or checkpoint, under the name that `tokenizer_in` finds."""
    name = file_name(tokenizer)
    shutil.copyfile(tokenizer, folder / name)
    if name == JSON_FILE and (tokenizer.parent / _CONFIG_FILES[0]).is_file():
        for companion in _COMPANIONS:
            if (tokenizer.parent / companion).is_file():
                shutil.copyfile(tokenizer.parent / companion, folder / companion)
    elif name == JSON_FILE:
        vocabulary = load_vocabulary(tokenizer)
        assert isinstance(vocabulary, JsonVocabulary)
        config = {**vocabulary.special_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
        if vocabulary.chat_template is not None:
            config = {**vocabulary.chat_template.special_tokens, **config, "chat_template": vocabulary.chat_template.source}
        (folder / _CONFIG_FILES[0]).write_text(json.dumps(config, indent=1), encoding="utf-8")


def find_tokenizer(name: str) -> Path:
    """The tokenizer file that a user means: a file, a folder that has one, or a Hub id (`hf:OWNER/NAME`).

    Raises:
        UserError: nothing there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = tokenizer_in(path)
        if not found.is_file():
            raise UserError(f"{path} has no {SENTENCEPIECE_FILE} and no {JSON_FILE}.")
        return found
    if path.exists():
        return path
    # Not for worker processes, which only load.
    from mlx_forget.pipeline.hub import parse_id

    hub = parse_id(name)
    if hub is None:
        raise UserError(f"There is no tokenizer {name}.")
    return _download(hub.id, hub.revision)


def _spaced_bytes(piece: str) -> bytes:
    found = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(found[1]) if found else piece.replace(_SPACE, " ").encode()


def _decoders(decoder: dict[str, Any] | None) -> set[str]:
    """The kinds of decoder in a tokenizer.json."""
    if decoder is None:
        return set()
    return {str(decoder.get("type"))}.union(*(_decoders(one) for one in decoder.get("decoders", ())))


def _special_token(folder: Path, key: str) -> str | None:
    """A special token as the files beside a tokenizer.json name it."""
    for name in _CONFIG_FILES:
        try:
            value = read_object(folder / name).get(key)
        except (OSError, ValueError):
            continue
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            return token
    return None


def _download(identifier: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"{identifier} is on the Hub, and reading it needs `huggingface_hub`: pip install 'mlx-forget[hf]'"
        ) from None
    found = {}
    problem: Exception | None = None
    for name in (*_CONFIG_FILES, TEMPLATE_FILE, JSON_FILE, SENTENCEPIECE_FILE):
        if name == SENTENCEPIECE_FILE and JSON_FILE in found:
            break
        try:
            found[name] = Path(hf_hub_download(identifier, name, revision=revision))
        except Exception as error:
            problem = error
    path = found.get(JSON_FILE) or found.get(SENTENCEPIECE_FILE)
    if path is None:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(f"No tokenizer of {identifier} can be had from the Hub or its cache: {reason}")
    return path


def _is_json(start: bytes) -> bool:
    return start.lstrip()[:1] == b"{"
