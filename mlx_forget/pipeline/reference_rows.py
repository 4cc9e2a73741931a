"""What a frozen reference says about rows, as numbers that travel with a batch: its log-probabilities, whole or its likeliest tokens.

A row of T labels has for each a distribution over V tokens. Either all of its log-probabilities are here, or those of the k likeliest
tokens and the log of the probability that is left (the tail). The KL divergence to a reference of the second kind is that between
distributions in which all other tokens are one: it is exact for those k, never above the whole divergence, and 0 for equal models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError

Ids = npt.NDArray[np.int64]
FULL = "full"
_TOP = "top-"


@dataclass(frozen=True)
class ReferenceRows:
    """Log-probabilities in nats but for a constant of each label; whoever reads them normalises them in float32.

    The constant is their mean under the distribution itself: where the probability is, numbers are near 0, where float16 is finest.

    Args:
        log_probs: float16[n, T, V], or [n, T, k] of the tokens in `top`.
        top: int32[n, T, k], or None where every token is there.
        tail: float32[n, T], the log of the probability of all other tokens but for the same constant, or None.
    """

    log_probs: npt.NDArray[np.float16]
    top: npt.NDArray[np.int32] | None = None
    tail: npt.NDArray[np.float32] | None = None

    def rows(self, index: Ids) -> "ReferenceRows":
        """Some of the rows, int64[m]."""
        return ReferenceRows(*(None if part is None else part[index] for part in (self.log_probs, self.top, self.tail)))  # type: ignore[arg-type]

    @classmethod
    def of(cls, log_probs: npt.NDArray[np.float32], top: int | None) -> "ReferenceRows":
        """Of float32[n, T, V] log-probabilities: all of them, or the `top` likeliest of each label and the rest as one."""
        probability = np.exp(log_probs)
        centre = (probability * log_probs).sum(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
        if top is None:
            return cls((log_probs - centre).astype(np.float16))
        chosen = np.argpartition(log_probs, -top, axis=-1)[..., -top:].astype(np.int32)
        kept = np.take_along_axis(log_probs, chosen, -1)
        with np.errstate(divide="ignore"):
            tail = np.log(_left(probability, chosen))
        return cls((kept - centre).astype(np.float16), chosen, (tail - centre[..., 0]).astype(np.float32))

    @classmethod
    def together(cls, parts: Sequence["ReferenceRows"]) -> "ReferenceRows":
        """Rows of several one after the other."""
        first = parts[0]
        return cls(
            np.concatenate([part.log_probs for part in parts]),
            None if first.top is None else np.concatenate([part.top for part in parts if part.top is not None]),
            None if first.tail is None else np.concatenate([part.tail for part in parts if part.tail is not None]),
        )

    def divergence(self, log_probs: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """KL(reference || model) in nats, float64[n, T], of a model's [n, T, V] log-probabilities; what backends compute."""
        stored = self.log_probs.astype(np.float64)
        if self.top is None or self.tail is None:
            stored -= np.log(np.exp(stored).sum(axis=-1, keepdims=True))
            return np.asarray((np.exp(stored) * (stored - log_probs)).sum(axis=-1))
        tail = self.tail.astype(np.float64)
        norm = np.log(np.exp(stored).sum(axis=-1) + np.exp(tail))
        stored, tail = stored - norm[..., None], tail - norm
        kept = np.exp(stored) * (stored - np.take_along_axis(log_probs, self.top, -1))
        mass, left = np.exp(tail), np.maximum(_left(np.exp(log_probs), self.top), np.finfo(np.float32).tiny)
        return np.asarray(kept.sum(axis=-1) + np.where(mass > 0, mass * (np.where(mass > 0, tail, 0.0) - np.log(left)), 0.0))

    def error(self, log_probs: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What rounding did to float32[n, T, V] log-probabilities: KL(reference || what is kept) and the tail's probability, [n, T]."""
        stored = self.log_probs.astype(np.float64)
        norm = np.exp(stored).sum(axis=-1)
        if self.top is None or self.tail is None:
            exact = log_probs.astype(np.float64)
            return (np.exp(exact) * (exact - stored)).sum(axis=-1) + np.log(norm), np.zeros(norm.shape)
        exact = np.take_along_axis(log_probs, self.top, -1).astype(np.float64)
        mass, tail = _left(np.exp(log_probs), self.top), self.tail.astype(np.float64)
        of_tail = np.where(mass > 0, mass * (np.log(np.maximum(mass, 1e-300)) - np.where(mass > 0, tail, 0.0)), 0.0)
        return (np.exp(exact) * (exact - stored)).sum(axis=-1) + of_tail + np.log(norm + np.exp(tail)), mass


def _left(probability: npt.NDArray[np.floating[Any]], top: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """The probability [n, T] of all tokens but those of `top`, summed, not subtracted from 1: it may be tiny."""
    rest = probability.copy()
    np.put_along_axis(rest, top, 0.0, -1)
    return np.asarray(rest.sum(axis=-1, dtype=np.float64))


def parse_kind(kind: str) -> int | None:
    """How many of the likeliest tokens `full` (None: all) or `top-N` keeps.

    Raises:
        UserError: neither.
    """
    if kind == FULL:
        return None
    count = kind.removeprefix(_TOP)
    if not kind.startswith(_TOP) or not count.isdecimal() or int(count) < 1:
        raise UserError(f"Log-probabilities are kept {FULL}, or of the likeliest tokens such as {_TOP}64; {kind!r} is neither.")
    return int(count)


def row_bytes(kind: str, length: int, vocab_size: int) -> int:
    """Disk and memory that the log-probabilities of a row of `length` labels take."""
    top = parse_kind(kind)
    return length * (2 * vocab_size if top is None else (2 + index_type(vocab_size).itemsize) * min(top, vocab_size) + 4)


def index_type(vocab_size: int) -> "np.dtype[np.uint16] | np.dtype[np.uint32]":
    """The smallest type of token ids on disk."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)
