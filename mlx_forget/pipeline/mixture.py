"""Which row stands at position k of the training stream: a pure function of (sizes, p, shares, seed, k).

    position k -> source:  pretraining iff floor((k+1) p + phase) > floor(k p + phase), so that every prefix of length n holds
                           within 1 of p n pretraining rows (mode `exact`); or an independent draw (mode `bernoulli`)
    j-th target row    ->  epoch j // n, then a permutation of the n rows keyed by (seed, epoch): no row repeats in an epoch
    j-th pretraining row -> a permutation of the whole pool keyed by seed: no row ever repeats, unless more epochs are allowed

p may follow a schedule (`shares.ShareSchedule`): then its integral stands for k p. Where a side has several sources, its j-th row goes to
one of them by exact shares (`shares.Split`), and is a row of that source by the rules above.

Permutations are Feistel networks over the row numbers, so nothing is stored, and any batch is computed directly: a resumed run, another
rank or another backend needs only k.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.pipeline.shares import ShareSchedule, Split, parse_share

__all__ = ["Member", "Mixture", "Mode", "draw", "parse_share", "permute", "stream_key"]

Mode = Literal["exact", "bernoulli"]
Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = [np.uint64(number * int(_GOLDEN) % 2**64) for number in range(6)]
_BERNOULLI_BLOCK = 1 << 16
# Tables of the round function pay for themselves up to 16 million rows, for many draws of few epochs.
_MOST_TABLE_BITS, _LEAST_FOR_TABLE, _MOST_KEYS_FOR_TABLE = 12, 16, 8

# Streams of independent randomness under one seed.
_STREAM_PHASE, _STREAM_BERNOULLI, _STREAM_TARGET, _STREAM_PRETRAIN = 1, 2, 3, 4
# Each source after the first of a side has streams of its own.
_STREAMS_PER_SOURCE = 1 << 16


def permute(index: Ids, size: int, key: Words | np.uint64) -> Ids:
    """Where a keyed permutation of range(size) sends each of `index` int64[n]; `key` is one uint64 or one for each index."""
    assert not len(index) or int(index.max()) < size, "outside the permuted range"
    half = (max(2, (size - 1).bit_length()) + 1) // 2
    keys = np.asarray(key, np.uint64).reshape(-1)
    if half <= _MOST_TABLE_BITS and len(index) >= _LEAST_FOR_TABLE:
        # A run of draws crosses few epochs: one pass for each, with the round function looked up.
        edges = np.flatnonzero(keys[1:] != keys[:-1]) + 1
        if len(edges) < _MOST_KEYS_FOR_TABLE:
            ends = [0, *edges.tolist(), len(index)]
            parts = [_permute_by_table(index[a:b], size, int(keys[a])) for a, b in pairwise(ends)]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
    return _permute(index, size, np.broadcast_to(keys, index.shape), np.uint64(half))


def _permute(index: Ids, size: int, keys: Words, half: np.uint64) -> Ids:
    """A Feistel network of six rounds on 2 * half bits, walked until the value is in range."""
    mask = np.uint64((1 << int(half)) - 1)
    value = index.astype(np.uint64)
    todo = np.arange(len(value))
    while len(todo):
        left, right = value[todo] >> half, value[todo] & mask
        for round_key in _ROUND_KEYS:
            left, right = right, left ^ (_mix(right + keys[todo] + round_key) & mask)
        value[todo] = (left << half) | right
        todo = todo[value[todo] >= size]
    return value.astype(np.int64)


def _permute_by_table(index: Ids, size: int, key: int) -> Ids:
    """The same with each round's function as a table over all right halves: several times as fast, for small sizes."""
    half = (max(2, (size - 1).bit_length()) + 1) // 2
    tables, mask = _round_tables(key, half), (1 << half) - 1
    value = index.copy()
    part, todo = value, None
    while True:
        left, right = part >> half, part & mask
        for table in tables:
            left, right = right, left ^ table.take(right)
        part = (left << half) | right
        outside = np.flatnonzero(part >= size)
        if todo is None:
            value, todo = part, outside
        else:
            value[todo] = part
            todo = todo[outside]
        if not len(todo):
            return value
        part = value[todo]


@lru_cache(maxsize=64)
def _round_tables(key: int, half: int) -> tuple[Ids, ...]:
    right = np.arange(1 << half, dtype=np.uint64)
    mask = np.uint64((1 << half) - 1)
    with np.errstate(over="ignore"):
        return tuple((_mix(right + np.uint64(key) + round_key) & mask).astype(np.int64) for round_key in _ROUND_KEYS)


def stream_key(seed: int, stream: int, epoch: Ids | int = 0) -> Words:
    """The key of one stream of randomness under a seed, one for each epoch."""
    base = _mix(np.asarray([seed], np.uint64) * _GOLDEN + np.uint64(stream))
    return _mix(base + np.atleast_1d(np.asarray(epoch)).astype(np.uint64) * _GOLDEN)


@dataclass(frozen=True)
class Member:
    """One of several sources of a side: its rows, and its share of the side's rows."""

    num_rows: int
    share: Fraction


def draw(index: Ids, members: tuple[Member, ...], num_rows: int, seed: int, stream: int) -> Ids:
    """The rows of the draws `index` int64[n], which rise, of one side: of a single source, or of `members` by their shares.

    The rows of several sources are numbered one after the other. No row of a source comes again before all of that source have come.
    """
    if not members:
        return _drawn(index, num_rows, seed, stream)
    member, drawn = _split(members, seed, stream).assign(index)
    row = np.empty_like(index)
    first = 0
    for number, one in enumerate(members):
        own = np.flatnonzero(member == number)
        row[own] = _drawn(drawn[own], one.num_rows, seed, stream + _STREAMS_PER_SOURCE * number) + first
        first += one.num_rows
    return row


def _drawn(index: Ids, num_rows: int, seed: int, stream: int) -> Ids:
    """The rows of the draws `index`, which rise, of one source."""
    if not len(index):
        return index
    first, last = int(index[0]) // num_rows, int(index[-1]) // num_rows
    if first == last:
        return permute(index - first * num_rows, num_rows, stream_key(seed, stream, first))
    epoch, within = np.divmod(index, num_rows)
    keys = stream_key(seed, stream, np.arange(first, last + 1))
    return permute(within, num_rows, keys[epoch - first])


def _split(members: tuple[Member, ...], seed: int, stream: int) -> Split:
    phases = [int(stream_key(seed, stream + _STREAMS_PER_SOURCE * i + (1 << 8))[0]) >> 32 for i in range(1, len(members))]
    return Split(tuple(member.share for member in members), tuple(phases))


@dataclass(frozen=True)
class Mixture:
    """The endless mixed stream.

    Args:
        num_target_rows: unique target rows n; they repeat every epoch in a new order.
        num_pretrain_rows: pool of pretraining rows.
        p: share of rows that are pretraining data, constant or along the run.
        seed: orders everything.
        mode: `exact` or `bernoulli` (for a constant p).
        target, pretrain: the sources of a side where it has several; the rows of a side are those of its sources, one after the other.
        pretrain_epochs: how often a pretraining row may be served.
    """

    num_target_rows: int
    num_pretrain_rows: int
    p: Fraction | ShareSchedule
    seed: int
    mode: Mode = "exact"
    target: tuple[Member, ...] = ()
    pretrain: tuple[Member, ...] = ()
    pretrain_epochs: int = 1

    def __post_init__(self) -> None:
        if self.num_target_rows < 1:
            raise UserError("The target data is smaller than one row: give more text or a shorter --max-seq-length.")
        if self.mode == "bernoulli" and isinstance(self.p, ShareSchedule):
            raise UserError("A schedule of p is exact: leave --mixture bernoulli out.")
        for members, num_rows in ((self.target, self.num_target_rows), (self.pretrain, self.num_pretrain_rows)):
            assert not members or sum(member.num_rows for member in members) == num_rows

    def rows(self, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], Ids]:
        """Positions start..stop: source uint8[n] (0 target, 1 pretraining) and the row within that side, int64[n]."""
        before = self.num_pretrain_before(start)
        source = self._is_pretrain(start, stop)
        pretrain_index = before + np.cumsum(source) - source
        target_index = np.arange(start, stop, dtype=np.int64) - pretrain_index
        row = draw(target_index, self.target, self.num_target_rows, self.seed, _STREAM_TARGET)
        injected = np.flatnonzero(source)
        if len(injected):
            row[injected] = draw(pretrain_index[injected], self.pretrain, self.num_pretrain_rows, self.seed, _STREAM_PRETRAIN)
        return source.astype(np.uint8), row

    def num_pretrain_before(self, position: int) -> int:
        """Pretraining rows among the first `position` rows."""
        if isinstance(self.p, ShareSchedule):
            return self.p.before([position], self._schedule_phase())[0]
        if self.mode == "exact":
            return int(position * self.p.numerator + self._phase()) // self.p.denominator
        blocks, rest = divmod(position, _BERNOULLI_BLOCK)
        whole = sum(self._block_count(block) for block in range(blocks))
        return whole + int(self._is_pretrain(position - rest, position).sum())

    def counts_before(self, position: int) -> tuple[list[int], list[int]]:
        """Rows of each target source and of each pretraining source among the first `position` rows."""
        num_pretrain = self.num_pretrain_before(position)
        counts = []
        for members, num, stream in (
            (self.target, position - num_pretrain, _STREAM_TARGET),
            (self.pretrain, num_pretrain, _STREAM_PRETRAIN),
        ):
            counts.append(_split(members, self.seed, stream).counts_before(num) if members else [num])
        return counts[0], counts[1]

    def check_pool(self, num_rows: int, row_length: int) -> None:
        """Refuse a run of `num_rows` rows that would need more pretraining rows than there are.

        Raises:
            UserError: by how many tokens a pool is too small.
        """
        _, counts = self.counts_before(num_rows)
        pools = [member.num_rows for member in self.pretrain] or [self.num_pretrain_rows]
        for needed, pool in zip(counts, pools, strict=True):
            if needed > pool * self.pretrain_epochs:
                missing = (needed - pool * self.pretrain_epochs) * row_length
                never = "never repeated" if self.pretrain_epochs == 1 else f"served at most {self.pretrain_epochs} times"
                raise UserError(
                    f"Pretraining rows are {never}: this run needs {needed:,} of {row_length} tokens and the pool holds "
                    f"{pool:,}, {missing:,} tokens too few. Give more pretraining data, a smaller p or fewer steps."
                )

    def _is_pretrain(self, start: int, stop: int) -> Ids:
        if isinstance(self.p, ShareSchedule):
            counts = np.array(self.p.before(list(range(start, stop + 1)), self._schedule_phase()), np.int64)
            return counts[1:] - counts[:-1]
        position = np.arange(start, stop, dtype=np.int64)
        if self.mode == "bernoulli":
            threshold = np.uint64(self.p.numerator * 2**64 // self.p.denominator)
            draw = _mix(stream_key(self.seed, _STREAM_BERNOULLI) + position.astype(np.uint64) * _GOLDEN)
            return (draw < threshold).astype(np.int64)
        numerator, denominator = self.p.numerator, self.p.denominator
        assert stop < 2**62 // max(numerator, 1), "positions beyond int64"
        phased = position * numerator + self._phase()
        return (phased + numerator) // denominator - phased // denominator

    def _phase(self) -> int:
        assert isinstance(self.p, Fraction)
        return int(stream_key(self.seed, _STREAM_PHASE)[0]) % self.p.denominator

    def _schedule_phase(self) -> int:
        return int(stream_key(self.seed, _STREAM_PHASE)[0]) >> 32

    @lru_cache(maxsize=1 << 16)  # noqa: B019 - keyed by value: the dataclass is frozen and hashable
    def _block_count(self, block: int) -> int:
        return int(self._is_pretrain(block * _BERNOULLI_BLOCK, (block + 1) * _BERNOULLI_BLOCK).sum())


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64: a bijection on uint64 whose output bits depend on all input bits."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
