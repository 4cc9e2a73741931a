"""Where a text lost most, by groups of tokens: kinds, frequency, novelty, the base's certainty, and position in the window."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.audit.reading import Reading
from mlx_forget.audit.statistics import Estimate, Floats, jackknife

Ids = npt.NDArray[np.int64]

KINDS = ("word", "capitalised word", "inside a word", "number", "punctuation", "white space", "other script", "end of document")
_FREQUENT, _COMMON = 64, 512
_LEAST_DOCUMENTS = 5
_CERTAINTIES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Group:
    """Tokens of one class.

    Args:
        name: the class.
        num_tokens: how many.
        loss_before: mean over them, in nats.
        change: mean loss after minus before, paired; without an interval where fewer than five documents have such tokens.
        share: of the whole change of the text that falls on them; the shares of a division add up to 1. None where nothing changed.
    """

    name: str
    num_tokens: int
    loss_before: float
    change: Estimate
    share: float | None


@dataclass(frozen=True)
class Division:
    """A text divided into classes of tokens."""

    name: str
    groups: tuple[Group, ...]


def divisions(reading: Reading, pieces: Sequence[bytes]) -> tuple[Division, ...]:
    """A text divided by what the label is and by what the base knew; no division looks at the change itself."""
    kind_of = np.array([KINDS.index(kind_of_piece(piece)) for piece in pieces])
    counts = np.bincount(reading.label, minlength=len(pieces))
    rank = np.empty(len(pieces), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(pieces))
    frequency = np.digitize(rank, [_FREQUENT, _COMMON])
    certainty = np.digitize(reading.measures["ref_confidence"], _CERTAINTIES)
    low, middle, high = (f"{value:.0%}" for value in _CERTAINTIES)
    return (
        divide(reading, "kind of token", kind_of[reading.label], KINDS),
        divide(
            reading,
            "how common in this text",
            frequency[reading.label],
            (f"the {_FREQUENT} most common", f"the next {_COMMON - _FREQUENT}", "all rarer ones"),
        ),
        divide(reading, "seen before in its window", reading.seen.astype(np.int64), ("new", "seen before")),
        divide(
            reading,
            "certainty of the base",
            certainty,
            (f"below {low}", f"{low} to {middle}", f"{middle} to {high}", f"{high} and more"),
        ),
    )


def positions(reading: Reading) -> Division:
    """The change against the position in the window, in bins that double."""
    last = int(reading.position.max())
    edges = [0, *(1 << power for power in range(last.bit_length()))]
    names = tuple(str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in zip(edges, [*edges[1:], last + 1], strict=True))
    return divide(reading, "position in the window", np.digitize(reading.position, edges) - 1, names)


def divide(reading: Reading, name: str, group: Ids, names: Sequence[str]) -> Division:
    """The classes that occur, `group` int64[N] being the number of each token's."""
    change = reading.change
    sums = reading.per_group(group, len(names), np.ones(len(group)), reading.measures["ref_nll"], change)
    total = float(change.sum())
    groups = []
    for number, title in enumerate(names):
        own = sums[:, number]
        num, before, own_change = own.sum(axis=0)
        if num:
            estimate = _mean(own[:, [0, 2]])
            groups.append(Group(title, int(num), float(before / num), estimate, float(own_change / total) if total else None))
    return Division(name, tuple(groups))


def _mean(sums: Floats) -> Estimate:
    """The mean over tokens from (count, sum) float64[D, 2], over the documents that have such tokens; few of them give no interval."""
    own = sums[sums[:, 0] > 0]
    if len(own) < _LEAST_DOCUMENTS:
        return Estimate(float(own[:, 1].sum() / own[:, 0].sum()), math.nan, math.nan, math.nan)
    return jackknife(own, lambda s: s[:, 1] / s[:, 0])


def kind_of_piece(piece: bytes) -> str:
    """The kind of a token by the characters that it adds; of those that add none, only the end of a document is ever predicted."""
    if not piece:
        return "end of document"
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "other script"
    core = text.strip()
    if not core:
        return "white space"
    if any(character.isdigit() for character in core):
        return "number"
    if not any(character.isalpha() for character in core):
        return "punctuation"
    if not core.isascii():
        return "other script"
    if core[0].isupper():
        return "capitalised word"
    return "word" if text[0].isspace() else "inside a word"


def shown(piece: bytes) -> str:
    """A token as a person can read it: white space has marks of its own."""
    if not piece:
        return "⟨end⟩"
    text = piece.decode("utf-8", errors="replace")
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "→").replace("\r", "␍")
