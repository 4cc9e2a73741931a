"""The tokenizer: SentencePiece with byte fallback, our reserved ids, and an exact way back.

`decode(encode(text)) == text` for every string of Unicode scalar values. SentencePiece alone does not promise
that: it writes a space as U+2581, so a real U+2581 comes back as a space. Here a real one is encoded by its
three byte pieces, and ids are turned back into bytes by our own table. Reserved ids are control symbols: no
text produces them.
"""

import hashlib
import heapq
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from mlx_forget.errors import UserError

PAD, BOS, EOS, UNK, INST, END_INST = range(6)
DOMAIN_IDS = range(6, 14)
NUM_RESERVED = 14
BYTE_IDS = range(NUM_RESERVED, NUM_RESERVED + 256)
RESERVED_PIECES = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
    "[/INST]",
    *(f"<domain_{i}>" for i in range(len(DOMAIN_IDS))),
)

# SentencePiece's stand-in for a space, and the ids that a real one gets instead.
_SPACE = "\u2581"
_SPACE_IDS = np.array([BYTE_IDS[byte] for byte in _SPACE.encode()], np.int32)
_PROBE = " two  spaces\tand\r\n\n\tlines\u00a0\ufb01 e\u0301 \ufeff "
# 2.5 MB give 0.3% more tokens than 4 MB do, in half the time.
SAMPLE_BYTES = 2_500_000
_CHUNK = 2000


@final
class Tokenizer:
    """Text to int32 ids and back, from the bytes of a SentencePiece model trained here (a `Vocabulary`).

    Args:
        model: the model as `save` writes it.

    Raises:
        UserError: not a SentencePiece model, or one whose reserved ids or whitespace handling are not ours.
    """

    bos_id, eos_id = BOS, EOS
    inst_ids: tuple[int, ...] = (INST,)
    end_inst_ids: tuple[int, ...] = (END_INST,)
    # Conversations are written with the marks above.
    chat_template = None

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = _processor(model)
        self.hash = hashlib.sha256(model).hexdigest()
        self.vocab_size = int(self._processor.get_piece_size())
        self._bytes = _piece_bytes(self._processor)
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError("It changes text: it needs identity normalisation and no dummy prefix.")

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids int32[T] of a text, without BOS or EOS.

        Raises:
            UserError: a lone surrogate, which no UTF-8 text can hold.
        """
        return self.encode_batch([text], num_threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[NDArray[np.int32]]:
        """Ids int32[T] of each text. `num_threads` None uses every core; the result does not depend on it.

        Raises:
            UserError: a lone surrogate, which no UTF-8 text can hold.
        """
        if num_threads is not None and num_threads < 1:
            raise UserError(f"The number of threads must be at least 1, not {num_threads}.")
        parts: list[str] = []
        ends: list[int] = []
        for text in texts:
            _check_scalars(text)
            parts.extend(text.split(_SPACE))
            ends.append(len(parts))
        # As arrays: lists of Python integers would take a third as long again.
        threads = num_threads or os.cpu_count() or 1
        ids: list[NDArray[np.int32]] = self._processor.encode(parts, out_type="numpy", num_threads=threads)
        return [_join(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of ids. Reserved ids are silent; bytes that are no UTF-8 become U+FFFD.

        Raises:
            UserError: an id outside the vocabulary.
        """
        values = ids.tolist() if isinstance(ids, np.ndarray) else ids
        table = self._bytes
        for i in values:
            if not 0 <= i < len(table):
                raise UserError(f"Token id {i} is outside the vocabulary of {len(table)}.")
        return b"".join([table[i] for i in values]).decode("utf-8", errors="replace")

    def piece(self, index: int) -> str:
        """The name of an id."""
        return str(self._processor.id_to_piece(index))

    @property
    def piece_bytes(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes of every id; none for reserved ids."""
        return tuple(self._bytes)

    def save(self, path: Path) -> None:
        """Write the model, aside first: a reader sees all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._model)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read what `save` wrote.

        Raises:
            UserError: no such file, not a SentencePiece model, or reserved ids that are not ours.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"Cannot read the tokenizer {path}: {error.strerror}.") from None
        try:
            return cls(model)
        except UserError as error:
            raise UserError(f"Cannot use the tokenizer {path}: {error}") from None


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    kind: Literal["unigram", "bpe"] = "unigram",
    sample_bytes: int = SAMPLE_BYTES,
) -> Tokenizer:
    """Train on a sample of `sample_bytes`, spread evenly over all texts; equal texts give equal bytes.

    Digits are single tokens; runs of spaces and of newlines can become one.

    Raises:
        UserError: the texts are too small for the vocabulary, or the vocabulary too small for the texts
            (with the bound), or a lone surrogate.
    """
    import sentencepiece

    if kind not in ("unigram", "bpe"):
        raise UserError(f"Unknown kind of tokenizer {kind!r}: it is 'unigram' or 'bpe'.")
    if vocab_size <= NUM_RESERVED:
        raise UserError(f"A vocabulary of {vocab_size} has no room for {BYTE_IDS.stop} reserved ids and bytes: ask for more.")
    sample = _sample(texts, sample_bytes)
    if not any(chunk.strip() for chunk in sample):
        raise UserError("Cannot train a tokenizer: there is no text to train it on.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            pad_piece=RESERVED_PIECES[PAD],
            bos_piece=RESERVED_PIECES[BOS],
            eos_piece=RESERVED_PIECES[EOS],
            unk_piece=RESERVED_PIECES[UNK],
            control_symbols=list(RESERVED_PIECES[INST:]),
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _CHUNK,
            # Twice the time for a million seeds instead of eight per piece, and no fewer tokens.
            seed_sentencepiece_size=8 * vocab_size,
            # Threads add floats up in another order, and the model records their number.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(error, vocab_size) from None
    return Tokenizer(model.getvalue())


def _training_error(error: RuntimeError, vocab_size: int) -> Exception:
    message = str(error)
    if found := re.search(r"too high.*<= (\d+)", message):
        return UserError(
            f"The text is too small for a vocabulary of {vocab_size:,}: the largest that it supports is {int(found[1]):,}."
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"A vocabulary of {vocab_size:,} has no room for {NUM_RESERVED} reserved ids, 256 bytes and "
            f"the characters of the text: the smallest that has is {int(found[1]):,}."
        )
    return error


def _sample(texts: Iterable[str], budget: int) -> list[str]:
    """A uniform draw of chunks, `budget` UTF-8 bytes in all at most, that depends on their order only."""
    heap: list[tuple[int, int, str]] = []
    total = 0
    for index, chunk in enumerate(_chunks(texts)):
        digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest()
        heapq.heappush(heap, (-int.from_bytes(digest, "little"), index, chunk))
        total += len(chunk.encode())
        while total > budget and len(heap) > 1:
            total -= len(heapq.heappop(heap)[2].encode())
    return [chunk for _, _, chunk in sorted(heap, key=lambda entry: entry[1])]


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Texts in pieces of about 2,000 characters, cut after a newline or a space where there is one.

    The trainer drops sentences that hold its own marks (U+2581, U+2585, tab): they become spaces here.
    """
    for text in texts:
        _check_scalars(text)
        clean = text.translate({0x2581: " ", 0x2585: " ", 0x09: " ", 0x00: " "})
        start = 0
        while start < len(clean):
            end = min(start + _CHUNK, len(clean))
            if end < len(clean):
                newline = clean.rfind("\n", start + _CHUNK // 2, end)
                cut = newline if newline > 0 else clean.rfind(" ", start + _CHUNK // 2, end)
                end = cut + 1 if cut > 0 else end
            yield clean[start:end]
            start = end


def _check_scalars(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"Character {error.start} of a text is the lone surrogate U+{ord(text[error.start]):04X}: it is no valid Unicode text."
        ) from None


def _join(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    """The parts with the ids of U+2581 between them."""
    if len(parts) == 1:
        return parts[0]
    joined = [parts[0]]
    for part in islice(parts, 1, None):
        joined += [_SPACE_IDS, part]
    return np.concatenate(joined)


def _processor(model: bytes) -> Any:
    import sentencepiece

    try:
        # An empty model would load, and then complain on stderr at every call.
        processor = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
    except RuntimeError:
        processor = None
    if processor is None or processor.get_piece_size() == 0:
        raise UserError("It is not a SentencePiece model.")
    return processor


def _piece_bytes(processor: Any) -> list[bytes]:
    """The bytes of every id; none for reserved ids."""
    size = processor.get_piece_size()
    wanted = [*RESERVED_PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
    found = [processor.id_to_piece(i) for i in range(min(size, len(wanted)))]
    for i, piece in enumerate(wanted):
        if i >= size or found[i] != piece:
            got = repr(found[i]) if i < size else "nothing"
            raise UserError(f"Its reserved ids are not ours: id {i} is {got} instead of {piece!r}.")
    if any(not processor.is_control(i) for i in range(NUM_RESERVED) if i != UNK) or not all(map(processor.is_byte, BYTE_IDS)):
        raise UserError("Its reserved ids are not ours: they are ordinary pieces, which text could produce.")
    table = [b""] * NUM_RESERVED + [bytes([byte]) for byte in range(256)]
    return table + [processor.id_to_piece(i).replace(_SPACE, " ").encode() for i in range(len(table), size)]
