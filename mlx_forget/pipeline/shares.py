"""Exact shares: of a stream among any number of sources, and of pretraining data along a run.

Both are closed forms in the position, so any place in a stream is found without the places before it. Counts are whole numbers next to
the exact ones: `floor(n p + phase)` for a constant share, the same of the integral for a schedule, and a binary tree of such splits for
several sources, in which every prefix holds each source within 3 rows of its share, whatever their number.
"""

import heapq
import re
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError

Ids = npt.NDArray[np.int64]

_MAX_DENOMINATOR = 10**9
_PHASE_BITS = 32
_LARGE_EXPONENT = re.compile(r"[eE][+-]?[0-9_]{3,}")
_RAMP = re.compile(r"^(?P<first>[^.]*(?:\.\d+)?%?)\.\.(?P<last>.+)$")


def parse_share(text: str | float) -> Fraction:
    """A share p in [0, 1) from `0.01`, `1%`, `1/128` or a float.

    Raises:
        UserError: not a number, or outside [0, 1).
    """
    share = _share(text, "p")
    if not 0 <= share < 1:
        raise UserError(f"p must lie in [0, 1), not {text}: it is the share of rows that are pretraining data (1% is 0.01).")
    return share


def parse_law_share(text: str | float, column: str) -> float:
    """A share in [0, 1], written in the same ways, of a law's column: a law also knows runs of one source alone.

    Raises:
        UserError: not a number, or outside [0, 1].
    """
    share = _share(text, column)
    if not 0 <= share <= 1:
        raise UserError(f"{column} must lie in [0, 1], not {text}: it is a share (1% is 0.01).")
    return float(share)


def _share(text: str | float, name: str) -> Fraction:
    written = str(text).strip()
    share = _number(written)
    if share is None:
        raise UserError(f"{name} must be a share such as 0.01, 1% or 1/128, not {written!r}.")
    return share


def _number(written: str) -> Fraction | None:
    if _LARGE_EXPONENT.search(written):
        # As a fraction it would be as long as its exponent is large.
        return None
    try:
        share = Fraction(written[:-1]) / 100 if written.endswith("%") else Fraction(written)
    except (ValueError, ZeroDivisionError):
        return None
    return share.limit_denominator(_MAX_DENOMINATOR)


@dataclass(frozen=True)
class Stage:
    """A part of a run: from share `first` in a straight line to `last`, until a fraction of the run."""

    first: Fraction
    last: Fraction
    until: Fraction


def parse_stages(text: str | float) -> tuple[Stage, ...]:
    """The stages of p: `1%` is constant, `0..5%` a ramp over the run, `50% until 90%, 5%` two stages; ramps may be stages.

    Raises:
        UserError: not such a text, shares outside [0, 1), or ends that do not rise to the end of the run.
    """
    stages: list[Stage] = []
    parts = [part.strip() for part in str(text).split(",")]
    for place, part in enumerate(parts):
        shares, _, end = (piece.strip() for piece in part.partition(" until "))
        until = _number(end) if end else Fraction(1) if place == len(parts) - 1 else None
        if until is None or not (stages[-1].until if stages else 0) < until <= 1 or (end and place == len(parts) - 1 and until < 1):
            raise UserError(
                f"p is {text!r}: every stage but the last ends `until` a share of the run, such as `50% until 90%, 5%`."
            )
        ramp = _RAMP.match(shares)
        first, last = (ramp["first"], ramp["last"]) if ramp else (shares, shares)
        stages.append(Stage(parse_share(first), parse_share(last), until))
    return tuple(stages)


def constant_share(text: str | float) -> Fraction | None:
    """The share of a p that does not change along the run; None where it does."""
    stages = parse_stages(text)
    return stages[0].first if len(stages) == 1 and stages[0].first == stages[0].last else None


def describe_share(text: str | float) -> str:
    """A p in one spelling, for comparing."""
    stages = parse_stages(text)
    if (share := constant_share(text)) is not None:
        return str(share)
    return ", ".join(f"{stage.first}..{stage.last} until {stage.until}" for stage in stages)


@dataclass(frozen=True)
class ShareSchedule:
    """p along a run of `num_rows` rows; after it, p stays as it ended."""

    stages: tuple[Stage, ...]
    num_rows: int

    def before(self, positions: list[int], phase: int) -> list[int]:
        """Pretraining rows before each of `positions`: floor(integral of p + phase / 2^32)."""
        pieces = self._pieces()
        counts = []
        for position in positions:
            start, constant, slope, bend, denominator = next(piece for piece in reversed(pieces) if piece[0] <= position)
            x = position - start
            exact = constant + x * (slope + bend * x)
            counts.append(((exact << _PHASE_BITS) + phase * denominator) // (denominator << _PHASE_BITS))
        return counts

    def _pieces(self) -> list[tuple[int, int, int, int, int]]:
        """Of each stage: its first row, and the integral from the start as (constant + slope x + bend x^2) / denominator."""
        pieces = []
        start, total = 0, Fraction(0)
        for stage in self.stages:
            stop = int(stage.until * self.num_rows)
            length = max(1, stop - start)
            bend = (stage.last - stage.first) / (2 * length)
            denominator = lcm(total.denominator, stage.first.denominator, bend.denominator)
            pieces.append((start, int(total * denominator), int(stage.first * denominator), int(bend * denominator), denominator))
            x = stop - start
            start, total = stop, total + x * (stage.first + bend * x)
        last = self.stages[-1].last
        denominator = lcm(total.denominator, last.denominator)
        return [*pieces, (start, int(total * denominator), int(last * denominator), 0, denominator)]


@dataclass(frozen=True)
class _Node:
    """A set of sources, split in two: `share` of its rows go left."""

    share: Fraction
    phase: int
    left: "_Node | int"
    right: "_Node | int"


@dataclass(frozen=True)
class Split:
    """A stream shared out to sources by exact shares.

    Args:
        shares: of each source; they are divided by their sum.
        phases: one random number for each source but one, in [0, 2^32).
    """

    shares: tuple[Fraction, ...]
    phases: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.phases) == len(self.shares) - 1
        assert all(share > 0 for share in self.shares)

    def assign(self, index: Ids) -> tuple[Ids, Ids]:
        """For positions int64[n]: the source of each, and how many rows of that source came before, int64[n] each."""
        source, before = np.zeros_like(index), index.copy()
        self._descend(self._tree(), np.arange(len(index)), index, source, before)
        return source, before

    def counts_before(self, position: int) -> list[int]:
        """Rows of each source among the first `position`."""
        counts = [0] * len(self.shares)
        todo: list[tuple[_Node | int, int]] = [(self._tree(), position)]
        while todo:
            node, num = todo.pop()
            if isinstance(node, int):
                counts[node] = num
            else:
                left = _count(num, node)
                todo += [(node.left, left), (node.right, num - left)]
        return counts

    def _descend(self, node: "_Node | int", where: Ids, index: Ids, source: Ids, before: Ids) -> None:
        if isinstance(node, int):
            source[where], before[where] = node, index
            return
        left = _counts(index, node)
        goes_left = _counts(index + 1, node) > left
        self._descend(node.left, where[goes_left], left[goes_left], source, before)
        self._descend(node.right, where[~goes_left], (index - left)[~goes_left], source, before)

    def _tree(self) -> "_Node | int":
        """Huffman's tree: the smallest two are joined first, so that no source is many splits deep for its size."""
        heap: list[tuple[Fraction, int, _Node | int]] = [(share, i, i) for i, share in enumerate(self.shares)]
        heapq.heapify(heap)
        for number, phase in enumerate(self.phases):
            small, _, one = heapq.heappop(heap)
            large, _, two = heapq.heappop(heap)
            total = small + large
            node = _Node((small / total).limit_denominator(_MAX_DENOMINATOR), phase, one, two)
            heapq.heappush(heap, (total, len(self.shares) + number, node))
        return heap[0][2]


def _count(num: int, node: _Node) -> int:
    share = node.share
    return (num * share.numerator + (node.phase * share.denominator >> _PHASE_BITS)) // share.denominator


def _counts(num: Ids, node: _Node) -> Ids:
    share = node.share
    assert not len(num) or int(num.max()) < 2**62 // share.numerator, "positions beyond int64"
    return (num * share.numerator + (node.phase * share.denominator >> _PHASE_BITS)) // share.denominator


def parse_sources(text: str) -> dict[str, Fraction]:
    """The sources of `NAME`, or of `NAME=SHARE,NAME=SHARE`, with their shares, which add up to 1.

    Raises:
        UserError: a share that is none, a name given twice, or shares that do not add up.
    """
    if "=" not in text:
        return {text: Fraction(1)}
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        name, _, written = (piece.strip() for piece in part.rpartition("="))
        share = _number(written)
        if not name or share is None or not 0 < share <= 1:
            raise UserError(f"Sources are NAME=SHARE,NAME=SHARE such as prose=70%,cpp=30%; {part.strip()!r} is not.")
        if name in shares:
            raise UserError(f"The source {name} is given twice.")
        shares[name] = share
    if sum(shares.values()) != 1:
        raise UserError(f"The shares of {', '.join(shares)} add up to {float(sum(shares.values())):g}, not to 1.")
    return shares
