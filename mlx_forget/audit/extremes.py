"""The tokens and the documents that a text forgot and gained most.

Extremes of many noisy values are partly chance: tokens are ranked by the end of their interval that is nearer to nothing, and every row
carries its uncertainty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget.audit.groups import shown
from mlx_forget.audit.reading import Reading
from mlx_forget.audit.statistics import Floats, t_quantile

_LEAST_TOKENS = 16
_LEAST_DOCUMENTS = 5
_PASSAGE = 48


@dataclass(frozen=True)
class Token:
    """A vocabulary entry as a label.

    Args:
        token: its text, with marks for white space.
        num_tokens, num_documents: how often it was to be predicted, and in how many documents.
        loss_before, loss_after: means, in nats.
        change: after minus before.
        stderr: of the change, over documents.
    """

    id: int
    token: str
    num_tokens: int
    num_documents: int
    loss_before: float
    loss_after: float
    change: float
    stderr: float


@dataclass(frozen=True)
class Document:
    """A document and the passage in which it changed most.

    Args:
        index: its number among those that were read.
        num_tokens: its labels.
        loss_before, loss_after, change: means, in nats.
        start: the first label of the passage.
        passage: text and change of each of its tokens.
    """

    index: int
    num_tokens: int
    loss_before: float
    loss_after: float
    change: float
    start: int
    passage: tuple[tuple[str, float], ...]


def tokens(reading: Reading, pieces: Sequence[bytes], most: int) -> tuple[tuple[Token, ...], tuple[Token, ...]]:
    """At most `most` tokens whose loss rose, and as many whose loss fell; both surely, by their own 95% intervals."""
    size = len(pieces)
    keys, inverse = np.unique(reading.document * size + reading.label, return_inverse=True)
    change = reading.change
    label = keys % size
    counts, changes = np.bincount(inverse).astype(np.float64), np.bincount(inverse, weights=change)
    num = np.bincount(label, weights=counts, minlength=size)
    documents = np.bincount(label, minlength=size)
    mean = _over(np.bincount(label, weights=changes, minlength=size), num)
    residual = changes - mean[label] * counts
    spread = np.bincount(label, weights=residual**2, minlength=size)
    stderr = np.sqrt(spread * _over(documents, documents - 1)) / np.maximum(num, 1)
    before = _over(np.bincount(reading.label, weights=reading.measures["ref_nll"], minlength=size), num)
    enough = np.flatnonzero((num >= _LEAST_TOKENS) & (documents >= _LEAST_DOCUMENTS))
    half = np.zeros(size)
    half[enough] = [t_quantile(int(documents[i]) - 1) * stderr[i] for i in enough]

    def listed(sign: int) -> tuple[Token, ...]:
        bound = sign * mean[enough] - half[enough]
        order = enough[np.argsort(-bound, kind="stable")][: min(most, int((bound > 0).sum()))]
        return tuple(
            Token(
                id=int(i),
                token=shown(pieces[i]),
                num_tokens=int(num[i]),
                num_documents=int(documents[i]),
                loss_before=float(before[i]),
                loss_after=float(before[i] + mean[i]),
                change=float(mean[i]),
                stderr=float(stderr[i]),
            )
            for i in order
        )

    return listed(+1), listed(-1)


def documents(reading: Reading, pieces: Sequence[bytes], most: int) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """At most `most` documents whose mean loss rose most, and as many whose loss fell; very short ones are passed over."""
    sums = reading.per_document(np.ones(len(reading.label)), reading.measures["ref_nll"], reading.change)
    means = sums[:, 1:] / sums[:, :1]
    long_enough = np.flatnonzero(sums[:, 0] >= _LEAST_TOKENS)

    def listed(sign: int) -> tuple[Document, ...]:
        order = long_enough[np.argsort(-sign * means[long_enough, 1], kind="stable")][:most]
        chosen = []
        for i in order.tolist():
            before, change = float(means[i, 0]), float(means[i, 1])
            if sign * change <= 0:
                break
            start, passage = _passage(reading, pieces, i, sign)
            chosen.append(Document(i, int(sums[i, 0]), before, before + change, change, start, passage))
        return tuple(chosen)

    return listed(+1), listed(-1)


def _passage(reading: Reading, pieces: Sequence[bytes], index: int, sign: int) -> tuple[int, tuple[tuple[str, float], ...]]:
    """The stretch of a document with the largest change of that sign."""
    first, last = np.searchsorted(reading.document, [index, index + 1])
    change, label = reading.change[first:last], reading.label[first:last]
    totals = np.convolve(sign * change, np.ones(min(_PASSAGE, len(change))), mode="valid")
    start = int(totals.argmax())
    rows = slice(start, start + _PASSAGE)
    texts = [pieces[i].decode("utf-8", errors="replace") or shown(pieces[i]) for i in label[rows].tolist()]
    return start, tuple(zip(texts, change[rows].tolist(), strict=True))


def _over(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Floats:
    """a / b, 0 where b is 0."""
    result: Floats = np.divide(a, b, out=np.zeros(len(b)), where=b > 0)
    return result
