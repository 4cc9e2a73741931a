"""How questions and answers write numbers and polynomials, and the arithmetic that goes with it."""

import math
from fractions import Fraction


def prime_factors(number: int) -> list[int]:
    """The prime factors of a number from 2 on, with repetition, in ascending order."""
    factors, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return [*factors, number] if number > 1 else factors


def in_base(number: int, base: int) -> str:
    """A positive integer in base 2 to 16, in lower case."""
    digits = ""
    while number:
        number, digit = divmod(number, base)
        digits = "0123456789abcdef"[digit] + digits
    return digits


def in_decimal(value: Fraction, places: int | None = None) -> str:
    """A fraction whose decimal expansion ends, with `places` digits behind the point, or as few as do."""
    wanted = places
    if wanted is None:
        wanted = 0
        while (value * 10**wanted).denominator != 1:
            wanted += 1
    scaled = value * 10**wanted
    assert scaled.denominator == 1
    digits = str(abs(scaled.numerator)).rjust(wanted + 1, "0")
    sign = "-" if scaled < 0 else ""
    return sign + (f"{digits[:-wanted]}.{digits[-wanted:]}" if wanted else digits)


def round_half_away(value: Fraction, places: int) -> Fraction:
    """Rounded to 10**-places, halves away from zero, as schools do."""
    scale = Fraction(10) ** places
    magnitude = math.floor(abs(value) * scale + Fraction(1, 2)) / scale
    return magnitude if value >= 0 else -magnitude


def multiply(a: list[int], b: list[int]) -> list[int]:
    product = [0] * (len(a) + len(b) - 1)
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            product[i + j] += left * right
    return product


def polynomial(coefficients: list[int], name: str) -> str:
    """Highest power first: `3*x**2 - x + 4`."""
    powers = [name if i == 1 else f"{name}**{i}" if i else "" for i in range(len(coefficients))]
    return linear_sum([(c, powers[i]) for i, c in reversed(list(enumerate(coefficients))) if c]) or "0"


def linear_sum(terms: list[tuple[int, str]]) -> str:
    text = ""
    for factor, what in terms:
        size = str(abs(factor)) if not what else what if abs(factor) == 1 else f"{abs(factor)}*{what}"
        sign = ("-" if factor < 0 else "") if not text else (" - " if factor < 0 else " + ")
        text += sign + size
    return text


def in_parentheses(value: Fraction) -> str:
    return str(value) if value.denominator == 1 and value >= 0 else f"({value})"
