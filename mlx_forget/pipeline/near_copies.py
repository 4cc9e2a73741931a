"""Near-copies: passages that share most of their five-word sequences with text seen before.

A passage is known by a sample of the hashes of its five-word windows (Broder 1997; the sample is modulo 4).
Words are runs of letters, digits and underscores in lower case, so a change of layout or punctuation does not
hide a copy; a word changed in twenty does not either.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

WINDOW = 5
MIN_WORDS = 8
_SAMPLE = np.uint64(4)
_MIN_MARKS = 3
_WORDS = re.compile(r"\w+")
_MULTIPLIERS = tuple(
    np.uint64(m)
    for m in (
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x27D4EB2F165667C5,
        0x85EBCA77C2B2AE63,
    )
)


def fingerprints(passages: Sequence[str]) -> list[NDArray[np.uint64]]:
    """The marks uint64[n] of each passage, n about a quarter of its words; none below eight words."""
    words = [_WORDS.findall(passage.lower()) for passage in passages]
    codes = np.array([zlib.crc32(word.encode()) for found in words for word in found], np.uint64)
    windows = max(len(codes) - WINDOW + 1, 0)
    hashes = np.zeros(windows, np.uint64)
    for i, multiplier in enumerate(_MULTIPLIERS):
        hashes ^= hashes >> np.uint64(29)
        hashes = hashes * multiplier + codes[i : i + windows]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MULTIPLIERS[0]
    hashes ^= hashes >> np.uint64(29)
    marks = []
    start = 0
    for found in words:
        # Of the windows over all passages, those that lie within this one.
        own = hashes[start : start + len(found) - WINDOW + 1] if len(found) >= MIN_WORDS else hashes[:0]
        sampled = own[own % _SAMPLE == 0]
        marks.append(sampled if len(sampled) >= _MIN_MARKS else np.sort(own)[:_MIN_MARKS])
        start += len(found)
    return marks


@final
class SeenText:
    """What has been seen so far, as a set of marks."""

    def __init__(self) -> None:
        self._marks: set[int] = set()

    def share(self, marks: NDArray[np.uint64]) -> float:
        """The share of a passage's marks that were seen, 0 for a passage too short to have any."""
        if not len(marks):
            return 0.0
        seen = self._marks
        return sum(mark in seen for mark in marks.tolist()) / len(marks)

    def add(self, marks: Iterable[NDArray[np.uint64]]) -> None:
        """Remember passages."""
        for passage in marks:
            self._marks.update(passage.tolist())
