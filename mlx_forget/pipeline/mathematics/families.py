"""The families of questions: functions of a random source and a difficulty (0 easy, 1 medium, 2 hard) that return a question and its answer."""

import math
from collections.abc import Callable
from fractions import Fraction

from mlx_forget.pipeline.mathematics.draw import Draw
from mlx_forget.pipeline.mathematics.notation import (
    in_base,
    in_decimal,
    in_parentheses,
    linear_sum,
    multiply,
    polynomial,
    prime_factors,
    round_half_away,
)

Answered = tuple[str, str]


def _arithmetic(draw: Draw, level: int) -> Answered:
    """A chain of additions, subtractions and multiplications, in parentheses where the order needs them."""
    text, value, loose = str(draw.number(2 + level)), 0, False
    value = int(text)
    for _ in range(draw.between(1, 1 + level)):
        operation = draw.one_of("+-*")
        other = draw.number(2 + level) if operation != "*" else draw.between(2, 10 ** (1 + level // 2) + 2)
        if operation == "*":
            text, value, loose = f"({text})*{other}" if loose else f"{text}*{other}", value * other, False
        else:
            text, value, loose = (
                f"{text} {operation} {other}",
                value + other * (1 if operation == "+" else -1),
                True,
            )
    return draw.one_of([f"Calculate {text}.", f"What is {text}?", f"Work out {text}."]), str(value)


def _division(draw: Draw, level: int) -> Answered:
    divisor, quotient = draw.between(2, 10 ** (1 + level)), draw.number(2 + level)
    remainder = draw.below(divisor)
    total = divisor * quotient + remainder
    if draw.below(2):
        return f"What is the remainder when {total} is divided by {divisor}?", str(remainder)
    return f"Divide {total} by {divisor}, giving quotient and remainder.", f"{quotient} remainder {remainder}"


def _linear_equation(draw: Draw, level: int) -> Answered:
    name, solution, size = draw.one_of("abcdghkmnpqrstuvwxyz"), draw.nonzero(9 * 3**level), 9 * 4**level
    left, right = draw.nonzero(size), draw.between(-size, size) if level else 0
    if left == right:
        right = 0
    constant = draw.nonzero(size * 3)
    other = (left - right) * solution + constant
    question = f"{polynomial([constant, left], name)} = {polynomial([other, right], name)}"
    return draw.one_of([f"Solve {question} for {name}.", f"Find {name} if {question}."]), str(solution)


def _linear_system(draw: Draw, level: int) -> Answered:
    size = 5 + 5 * level
    x, y = draw.some_of("abcdghkmnpqrstuvwxyz", 2)
    x_value, y_value = draw.nonzero(size), draw.nonzero(size)
    while True:
        a, b, c, d = (draw.nonzero(size) for _ in range(4))
        if a * d != b * c:
            break
    first = f"{linear_sum([(a, x), (b, y)])} = {a * x_value + b * y_value}"
    second = f"{linear_sum([(c, x), (d, y)])} = {c * x_value + d * y_value}"
    asked, value = draw.one_of([(x, x_value), (y, y_value)])
    return f"Solve {first}, {second} for {asked}.", str(value)


def _common_divisor(draw: Draw, level: int) -> Answered:
    factor = draw.between(1, 10 ** (1 + level))
    a, b = (factor * draw.between(2, 10 ** (1 + level)) for _ in range(2))
    question = draw.one_of(["Calculate the greatest common divisor of", "What is the highest common factor of"])
    return f"{question} {a} and {b}{'?' if question.startswith('W') else '.'}", str(math.gcd(a, b))


def _common_multiple(draw: Draw, level: int) -> Answered:
    factor = draw.between(1, 12)
    a, b = (factor * draw.between(2, 10 * 4**level) for _ in range(2))
    return f"What is the least common multiple of {a} and {b}?", str(math.lcm(a, b))


def _prime_factors(draw: Draw, level: int) -> Answered:
    number = draw.between(2, 10 ** (3 + level))
    kind = draw.below(3)
    if kind == 1 and draw.below(2):
        # Few numbers are prime: without help, "No" would nearly always be right.
        while len(prime_factors(number)) != 1:
            number += 1
    factors = prime_factors(number)
    if kind == 0:
        return f"List the prime factors of {number}.", ", ".join(map(str, sorted(set(factors))))
    if kind == 1:
        return f"Is {number} a prime number?", "Yes" if len(factors) == 1 else "No"
    return f"Write {number} as a product of primes.", "*".join(map(str, factors))


def _base_conversion(draw: Draw, level: int) -> Answered:
    source, target = draw.some_of(range(2, 17) if level else [2, 8, 10, 16], 2)
    number = draw.between(1, 10 ** (3 + level))
    question = f"Convert {in_base(number, source)} from base {source} to base {target}."
    return question, in_base(number, target)


def _polynomial_value(draw: Draw, level: int) -> Answered:
    coefficients = _coefficients(draw, draw.between(1, 2 + level // 2), 9 * 2**level)
    function, name, point = draw.one_of("fghpqru"), draw.one_of("xyztwn"), draw.between(-6 - level, 6 + level)
    value = sum(c * point**i for i, c in enumerate(coefficients))
    return f"Let {function}({name}) = {polynomial(coefficients, name)}. What is {function}({point})?", str(value)


def _derivative(draw: Draw, level: int) -> Answered:
    name = draw.one_of("xyztwnab")
    coefficients = _coefficients(draw, draw.between(1 + level, 2 + level), 10 * 3**level)
    text = polynomial(coefficients, name)
    order = 2 if level == 2 and draw.below(2) else 1
    for _ in range(order):
        coefficients = [i * c for i, c in enumerate(coefficients)][1:] or [0]
    words = "second derivative" if order == 2 else "derivative"
    return f"What is the {words} of {text} with respect to {name}?", polynomial(coefficients, name)


def _expansion(draw: Draw, level: int) -> Answered:
    name, size = draw.one_of("xyztwnab"), 5 + 4 * level
    factors = [_coefficients(draw, 1 + (level > 0 and draw.below(2)), size) for _ in range(2 + (level == 2))]
    product = [1]
    for factor in factors:
        product = multiply(product, factor)
    text = "*".join(f"({polynomial(factor, name)})" for factor in factors)
    return f"Expand {text}.", polynomial(product, name)


def _roots(draw: Draw, level: int) -> Answered:
    name, size = draw.one_of("xyztwnab"), 6 + 8 * level
    roots = sorted({draw.between(-size, size), draw.between(-size, size)})
    scale = draw.nonzero(1 + 3 * level)
    first, last = roots[0], roots[-1]
    product = multiply([-first, 1], [-last, 1])
    text = polynomial([scale * c for c in product], name)
    return f"Solve {text} = 0 for {name}.", ", ".join(map(str, roots))


def _sequence(draw: Draw, level: int) -> Answered:
    kind = draw.below(3)
    start, step = draw.between(-50, 50) * 3**level, draw.nonzero(12 * 3**level)
    if kind == 2:
        ratio = draw.between(2, 3 + level)
        terms = [(abs(step) % 20 + 1) * ratio**i for i in range(5)]
    else:
        bend = draw.nonzero(2 + 3 * level) if level else 0
        terms = [start + step * i + bend * i * (i - 1) // 2 for i in range(7)]
    if kind == 1:
        n = draw.between(10, 20 + 20 * level)
        value = start + step * (n - 1) + bend * (n - 1) * (n - 2) // 2
        shown = ", ".join(map(str, terms[:4]))
        return f"What is term number {n} of {shown}, ...?", str(value)
    length = len(terms) - 1
    shown = ", ".join(map(str, terms[:length]))
    return f"What is the next term of {shown}?", str(terms[length])


def _probability(draw: Draw, level: int) -> Answered:
    colours = draw.some_of(["red", "blue", "green", "white", "black", "yellow"], 2 + level)
    counts = [draw.between(1, 6 + 3 * level) for _ in colours]
    total = sum(counts)
    taken = draw.between(1, 1 + level)
    if taken > counts[0]:
        taken = counts[0]
    chance = Fraction(math.comb(counts[0], taken), math.comb(total, taken))
    content = ", ".join(f"{count} {colour}" for count, colour in zip(counts[:-1], colours[:-1], strict=True))
    bag = f"A bag holds {content} and {counts[-1]} {colours[-1]} balls."
    if taken == 1:
        return f"{bag} One ball is taken. What is the probability that it is {colours[0]}?", str(chance)
    number = {2: "Two", 3: "Three"}[taken]
    asked = f"What is the probability that all are {colours[0]}?"
    return f"{bag} {number} balls are taken without putting any back. {asked}", str(chance)


def _comparison(draw: Draw, level: int) -> Answered:
    values: list[tuple[Fraction, str]] = []
    while len({value for value, _ in values}) < 2:
        values = []
        for _ in range(2):
            if draw.below(2):
                fraction = Fraction(draw.nonzero(10 * 5**level), draw.between(2, 10 * 3**level))
                values.append((fraction, str(fraction)))
            else:
                decimal = draw.decimal(1 + level // 2, 1 + level)
                values.append((decimal, in_decimal(decimal)))
    (a, a_text), (b, b_text) = values
    if draw.below(2):
        return f"Which is greater: {a_text} or {b_text}?", a_text if a > b else b_text
    return f"Is {a_text} less than {b_text}?", "Yes" if a < b else "No"


def _rounding(draw: Draw, level: int) -> Answered:
    if draw.below(2):
        value, places = draw.decimal(2 + level, 3 + level), draw.between(1, 2 + level)
        noun = "decimal place" if places == 1 else "decimal places"
        return f"Round {in_decimal(value)} to {places} {noun}.", in_decimal(round_half_away(value, places), places)
    value = Fraction(draw.between(10, 10 ** (4 + level)))
    places = draw.between(1, 2 + level)
    unit = ["ten", "hundred", "thousand", "ten thousand"][places - 1]
    return f"Round {value} to the nearest {unit}.", str(round_half_away(value, -places))


def _modular_arithmetic(draw: Draw, level: int) -> Answered:
    modulus, a, b = draw.between(3, 10 * 5**level), draw.number(2 + level), draw.number(2 + level)
    kind = draw.below(3)
    if kind == 0:
        exponent = draw.between(2, 5 + 10 * level)
        return f"What is {a}**{exponent} modulo {modulus}?", str(pow(a, exponent, modulus))
    if kind == 1:
        return f"What is {a} + {b} modulo {modulus}?", str((a + b) % modulus)
    return f"What is {a}*{b} modulo {modulus}?", str(a * b % modulus)


def _fractions(draw: Draw, level: int) -> Answered:
    size = 9 * 3**level
    a, b = (Fraction(draw.nonzero(size), draw.between(2, size)) for _ in range(2))
    sign = draw.one_of("+-*/")
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
    return f"Calculate {in_parentheses(a)} {sign} {in_parentheses(b)}.", str(value)


def _sorting(draw: Draw, level: int) -> Answered:
    pool: dict[Fraction, str] = {}
    while len(pool) < 3 + 2 * level:
        kind = draw.below(1 + level)
        value = Fraction(draw.nonzero(10 ** (2 + level // 2)), 10 if kind == 1 else draw.between(2, 9) if kind else 1)
        pool[value] = in_decimal(value) if kind == 1 else str(value)
    order, down = ("descending", True) if draw.below(2) else ("ascending", False)
    shown = ", ".join(pool.values())
    answer = ", ".join(pool[value] for value in sorted(pool, reverse=down))
    return f"Sort {shown} in {order} order.", answer


# quantity -> unit -> size in the smallest unit of the quantity
UNITS: dict[str, dict[str, int]] = {
    "length": {"millimeters": 1, "centimeters": 10, "meters": 1_000, "kilometers": 1_000_000},
    "mass": {"milligrams": 1, "grams": 1_000, "kilograms": 1_000_000, "tonnes": 1_000_000_000},
    "time": {"seconds": 1, "minutes": 60, "hours": 3_600, "days": 86_400, "weeks": 604_800},
    "volume": {"milliliters": 1, "centiliters": 10, "liters": 1_000},
    "memory": {"bytes": 1, "kibibytes": 2**10, "mebibytes": 2**20, "gibibytes": 2**30},
}


def _unit_conversion(draw: Draw, level: int) -> Answered:
    while True:
        units = UNITS[draw.one_of(sorted(UNITS))]
        source, target = draw.some_of(sorted(units), 2)
        amount = draw.decimal(3, level) if level else Fraction(draw.number(3))
        value = abs(amount) * units[source] / units[target]
        # Only answers that a short decimal writes exactly.
        if value < 10**9 and (value * 10**6).denominator == 1:
            return f"Convert {in_decimal(abs(amount))} {source} to {target}.", in_decimal(value)


def _percentage(draw: Draw, level: int) -> Answered:
    percent, base = (
        draw.between(1, 100 + 100 * level),
        draw.between(1, 10 ** (3 + level // 2)) * [20, 5, 1][level],
    )
    value = Fraction(percent * base, 100)
    kind = draw.below(3)
    if kind == 0:
        return f"What is {percent}% of {base}?", in_decimal(value)
    if kind == 1:
        return f"What is {base} increased by {percent}%?", in_decimal(base + value)
    percent = (percent - 1) % 99 + 1
    return f"What is {base} decreased by {percent}%?", in_decimal(base - Fraction(percent * base, 100))


def _digits(draw: Draw, level: int) -> Answered:
    number = draw.between(100, 10 ** (4 + 2 * level))
    if draw.below(2):
        return f"What is the sum of the digits of {number}?", str(sum(map(int, str(number))))
    names = [
        "units",
        "tens",
        "hundreds",
        "thousands",
        "ten thousands",
        "hundred thousands",
        "millions",
        "ten millions",
    ]
    place = draw.below(min(len(str(number)), len(names)))
    return f"What is the {names[place]} digit of {number}?", str(number // 10**place % 10)


def _mean(draw: Draw, level: int) -> Answered:
    values = [draw.between(-10 * level, 20 * 4**level) for _ in range(3 + level + draw.below(3))]
    shown = ", ".join(map(str, values))
    if draw.below(2):
        ordered, middle = sorted(values), len(values) // 2
        median = ordered[middle] if len(values) % 2 else Fraction(ordered[middle - 1] + ordered[middle], 2)
        return f"What is the median of {shown}?", in_decimal(Fraction(median))
    return f"What is the mean of {shown}?", str(Fraction(sum(values), len(values)))


def _coefficients(draw: Draw, degree: int, size: int) -> list[int]:
    """Coefficients from the constant up; the leading one is not 0."""
    return [*(draw.between(-size, size) for _ in range(degree)), draw.nonzero(size)]


FAMILIES: dict[str, Callable[[Draw, int], Answered]] = {
    "arithmetic": _arithmetic,
    "base conversion": _base_conversion,
    "common divisor": _common_divisor,
    "common multiple": _common_multiple,
    "comparison": _comparison,
    "derivative": _derivative,
    "digits": _digits,
    "division": _division,
    "expansion": _expansion,
    "fractions": _fractions,
    "linear equation": _linear_equation,
    "linear system": _linear_system,
    "mean": _mean,
    "modular arithmetic": _modular_arithmetic,
    "percentage": _percentage,
    "polynomial value": _polynomial_value,
    "prime factors": _prime_factors,
    "probability": _probability,
    "roots": _roots,
    "rounding": _rounding,
    "sequence": _sequence,
    "sorting": _sorting,
    "unit conversion": _unit_conversion,
}
