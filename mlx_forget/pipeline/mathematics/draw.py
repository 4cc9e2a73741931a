"""Seeded choices whose sequence Python keeps from version to version."""

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

Item = TypeVar("Item")


class Draw:
    """Random choices through `randrange` only, whose sequence Python keeps from version to version."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, stop: int) -> int:
        return self._random.randrange(stop)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self._random.randrange(high - low + 1)

    def nonzero(self, size: int) -> int:
        """An integer in [-size, size] other than 0."""
        value = self.between(1, size)
        return value if self.below(2) else -value

    def number(self, digits: int) -> int:
        """A positive integer with up to `digits` digits, short ones as likely as long ones."""
        return self.between(1, 10 ** self.between(1, digits))

    def decimal(self, digits: int, places: int) -> Fraction:
        """A number with up to `digits` digits before the point and exactly `places` behind it."""
        scale: int = 10**places
        return Fraction(self.number(digits) * scale + self.below(scale), scale) * (1 if self.below(3) else -1)

    def one_of(self, choices: Sequence[Item]) -> Item:
        return choices[self.below(len(choices))]

    def some_of(self, choices: Sequence[Item], count: int) -> list[Item]:
        """`count` different items, in random order."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(count)]
