"""Which row stands at position k of the training stream: a pure function of (sizes, p, seed, k).

    position k -> source:  pretraining iff floor((k+1) p + phase) > floor(k p + phase), so that every prefix of length n holds
                           within 1 of p n pretraining rows (mode `exact`); or an independent draw (mode `bernoulli`)
    j-th target row    ->  epoch j // n, then a permutation of the n rows keyed by (seed, epoch): no row repeats in an epoch
    j-th pretraining row -> a permutation of the whole pool keyed by seed: no row ever repeats

Permutations are Feistel networks over the row numbers, so nothing is stored, and any batch is computed directly: a resumed run, another
rank or another backend needs only k.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError

Mode = Literal["exact", "bernoulli"]
Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_MAX_DENOMINATOR = 10**9
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = [np.uint64(number * int(_GOLDEN) % 2**64) for number in range(6)]
_BERNOULLI_BLOCK = 1 << 16

# Streams of independent randomness under one seed.
_STREAM_PHASE, _STREAM_BERNOULLI, _STREAM_TARGET, _STREAM_PRETRAIN = 1, 2, 3, 4


def parse_share(text: str | float) -> Fraction:
    """A share p in [0, 1) from `0.01`, `1%`, `1/128` or a float.

    Raises:
        UserError: not a number, or outside [0, 1).
    """
    written = str(text).strip()
    try:
        share = Fraction(written[:-1]) / 100 if written.endswith("%") else Fraction(written)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"p must be a share such as 0.01, 1% or 1/128, not {written!r}.") from None
    if not 0 <= share < 1:
        raise UserError(f"p must lie in [0, 1), not {written}: it is the share of rows that are pretraining data (1% is 0.01).")
    return share.limit_denominator(_MAX_DENOMINATOR)


def permute(index: Ids, size: int, key: Words | np.uint64) -> Ids:
    """Where a keyed permutation of range(size) sends each of `index` int64[n]; `key` is one uint64 or one for each index."""
    assert not len(index) or int(index.max()) < size, "outside the permuted range"
    bits = max(2, (size - 1).bit_length())
    half = np.uint64((bits + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    value = index.astype(np.uint64)
    todo = np.arange(len(value))
    while len(todo):
        left, right = value[todo] >> half, value[todo] & mask
        for round_key in _ROUND_KEYS:
            left, right = right, left ^ (_mix(right + keys[todo] + round_key) & mask)
        value[todo] = (left << half) | right
        todo = todo[value[todo] >= size]
    return value.astype(np.int64)


def stream_key(seed: int, stream: int, epoch: Ids | int = 0) -> Words:
    """The key of one stream of randomness under a seed, one for each epoch."""
    base = _mix(np.asarray([seed], np.uint64) * _GOLDEN + np.uint64(stream))
    return _mix(base + np.atleast_1d(np.asarray(epoch)).astype(np.uint64) * _GOLDEN)


@dataclass(frozen=True)
class Mixture:
    """The endless mixed stream.

    Args:
        num_target_rows: unique target rows n; they repeat every epoch in a new order.
        num_pretrain_rows: pool of pretraining rows, each served at most once.
        p: share of rows that are pretraining data.
        seed: orders everything.
        mode: `exact` or `bernoulli`.
    """

    num_target_rows: int
    num_pretrain_rows: int
    p: Fraction
    seed: int
    mode: Mode = "exact"

    def __post_init__(self) -> None:
        if self.num_target_rows < 1:
            raise UserError("The target data is smaller than one row: give more text or a shorter --max-seq-length.")

    def rows(self, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], Ids]:
        """Positions start..stop: source uint8[n] (0 target, 1 pretraining) and the row within that source, int64[n]."""
        before = self.num_pretrain_before(start)
        source = self._is_pretrain(start, stop)
        pretrain_index = before + np.cumsum(source) - source
        target_index = np.arange(start, stop, dtype=np.int64) - pretrain_index
        epoch, within = np.divmod(target_index, self.num_target_rows)
        row = permute(within, self.num_target_rows, stream_key(self.seed, _STREAM_TARGET, epoch))
        injected = np.flatnonzero(source)
        if len(injected):
            key = stream_key(self.seed, _STREAM_PRETRAIN)
            row[injected] = permute(pretrain_index[injected], self.num_pretrain_rows, key)
        return source.astype(np.uint8), row

    def num_pretrain_before(self, position: int) -> int:
        """Pretraining rows among the first `position` rows."""
        if self.mode == "exact":
            return int(position * self.p.numerator + self._phase()) // self.p.denominator
        blocks, rest = divmod(position, _BERNOULLI_BLOCK)
        whole = sum(self._block_count(block) for block in range(blocks))
        return whole + int(self._is_pretrain(position - rest, position).sum())

    def check_pool(self, num_rows: int, row_length: int) -> None:
        """Refuse a run of `num_rows` rows that would need more pretraining rows than there are.

        Raises:
            UserError: by how many tokens the pool is too small.
        """
        needed = self.num_pretrain_before(num_rows)
        if needed > self.num_pretrain_rows:
            missing = (needed - self.num_pretrain_rows) * row_length
            raise UserError(
                f"Pretraining rows are never repeated: this run needs {needed:,} of {row_length} tokens and the pool holds "
                f"{self.num_pretrain_rows:,}, {missing:,} tokens too few. Give more pretraining data, a smaller p or fewer steps."
            )

    def _is_pretrain(self, start: int, stop: int) -> Ids:
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
        return int(stream_key(self.seed, _STREAM_PHASE)[0]) % self.p.denominator

    @lru_cache(maxsize=1 << 16)  # noqa: B019 - keyed by value: the dataclass is frozen and hashable
    def _block_count(self, block: int) -> int:
        return int(self._is_pretrain(block * _BERNOULLI_BLOCK, (block + 1) * _BERNOULLI_BLOCK).sum())


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64: a bijection on uint64 whose output bits depend on all input bits."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
