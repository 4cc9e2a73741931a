"""Which documents are kept: by length, once only, and none that repeats what another corpus is validated on."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from mlx_forget.pipeline.near_copies import fingerprints

# From half of its marks on, a document is a copy of another, or holds one.
MAX_SHARED = 0.5
_MIN_MERGE = 1 << 16
_WORD = 2**64


@final
class SeenHashes:
    """A set of 64-bit hashes at 8 bytes each: what came lately as a set, the rest as one sorted array."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted = np.empty(0, np.uint64)

    def add(self, value: int) -> bool:
        """Remember a hash; whether it is new."""
        if value in self._recent:
            return False
        word = np.uint64(value)
        place = int(np.searchsorted(self._sorted, word))
        if place < len(self._sorted) and self._sorted[place] == word:
            return False
        self._recent.add(value)
        if len(self._recent) >= max(_MIN_MERGE, len(self._sorted) // 8):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.union1d(self._sorted, recent)
            self._recent.clear()
        return True


@final
class HeldOut:
    """Documents that others must not repeat: a sample of the hashes of their five-word windows (MinHash with a fixed rate).

    A document is a near-copy when half of its marks are those of held-out text, or when it holds half of the marks of one held-out
    document: a long training document that quotes a short validation document leaks all of it.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        marks, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        sizes: list[int] = []
        for text in texts:
            own = np.unique(fingerprints([text])[0])
            marks.append(own)
            owners.append(np.full(len(own), len(sizes), np.int64))
            sizes.append(len(own))
        flat = np.concatenate(marks)
        order = np.argsort(flat, kind="stable")
        self._marks: NDArray[np.uint64] = flat[order]
        self._owners: NDArray[np.int64] = np.concatenate(owners)[order]
        self._sizes = np.maximum(np.array(sizes, np.int64), 1)
        self.key = hashlib.sha256(self._marks.tobytes()).hexdigest()

    def is_copied_in(self, text: str) -> bool:
        """Whether a text is a near-copy of what is held out."""
        own = np.unique(fingerprints([text])[0])
        if not len(own) or not len(self._marks):
            return False
        first, last = np.searchsorted(self._marks, own, "left"), np.searchsorted(self._marks, own, "right")
        found = last > first
        if found.sum() >= MAX_SHARED * len(own):
            return True
        hits = np.concatenate([self._owners[a:b] for a, b in zip(first[found], last[found], strict=True)] or [self._owners[:0]])
        owners, counts = np.unique(hits, return_counts=True)
        return bool((counts >= MAX_SHARED * self._sizes[owners]).any())


@dataclass
class Filter:
    """The documents to keep, and how many were left out for which reason.

    Args:
        min_chars, max_chars: bounds on the characters of a document; None is no bound.
        once: leave out exact repetitions.
        held_out: leave out near-copies of this.
    """

    min_chars: int | None = None
    max_chars: int | None = None
    once: bool = False
    held_out: HeldOut | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    _seen: SeenHashes = field(default_factory=SeenHashes, init=False, repr=False, compare=False)

    def restart(self, seen: SeenHashes | None = None) -> None:
        """Forget what was seen and counted: a new pass begins, or goes on after a source of which `seen` knows."""
        self.dropped.clear()
        self._seen = SeenHashes() if seen is None else seen

    def keeps(self, text: str, digest: int) -> bool:
        """Whether a document is kept; `digest` is a hash of its text, of which 64 bits count."""
        reason = self._reason(text, digest)
        if reason is not None:
            self.dropped[reason] += 1
        return reason is None

    def _reason(self, text: str, digest: int) -> str | None:
        if self.min_chars is not None and len(text) < self.min_chars:
            return "too short"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "too long"
        if self.once and not self._seen.add(digest % _WORD):
            return "repeated"
        if self.held_out is not None and self.held_out.is_copied_in(text):
            return "near-copy of held-out text"
        return None
