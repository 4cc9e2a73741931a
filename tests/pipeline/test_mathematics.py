"""The question generator: every answer is checked by another computation than the one that made it."""

import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import islice, pairwise, permutations, product
from statistics import median
from types import CodeType

import pytest

from mlx_forget.pipeline import mathematics
from mlx_forget.pipeline.mathematics import FAMILIES, Question, documents, questions, split_of

NUM_QUESTIONS = 6_000
PINNED_FIRST = ("mean", "What is the median of 23, 55, 52, 41?", "46.5")


@pytest.fixture(scope="module")
def sample() -> list[Question]:
    return list(islice(questions(seed=7), NUM_QUESTIONS))


class Jet:
    """value + first t + second t**2: arithmetic that carries two derivatives along."""

    def __init__(self, *parts: int) -> None:
        self.parts = [*parts, 0, 0][:3]

    def __add__(self, other: "Jet | int") -> "Jet":
        return Jet(*(a + b for a, b in zip(self.parts, lift(other).parts, strict=True)))

    def __mul__(self, other: "Jet | int") -> "Jet":
        a, b = self.parts, lift(other).parts
        return Jet(a[0] * b[0], a[0] * b[1] + a[1] * b[0], a[0] * b[2] + a[1] * b[1] + a[2] * b[0])

    def __pow__(self, power: int) -> "Jet":
        return math.prod([self] * power, start=Jet(1))

    def __neg__(self) -> "Jet":
        return self * -1

    def __sub__(self, other: "Jet | int") -> "Jet":
        return self + -lift(other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: int) -> "Jet":
        return lift(other) - self


def lift(value: Jet | int) -> Jet:
    return value if isinstance(value, Jet) else Jet(value)


def evaluate(text: str, **values: object) -> object:
    """The value of an expression as Python reads it, with exact fractions."""
    return eval(compiled(text), {"__builtins__": {}, "Fraction": Fraction}, values)


@cache
def compiled(text: str) -> CodeType:
    exact = re.sub(r"(\d+)(?= */)", r"Fraction(\1)", text)
    return compile(exact, text, "eval")


def found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, text)
    assert match, text
    return match.groups()


def numbers(text: str) -> list[Fraction]:
    return [Fraction(part) for part in text.split(", ")]


def check_arithmetic(question: str, answer: str) -> None:
    (text,) = found(r"(?:Calculate|What is|Work out) (.+)[.?]", question)
    assert evaluate(text) == int(answer)


def check_base_conversion(question: str, answer: str) -> None:
    digits, source, target = found(r"Convert (\w+) from base (\d+) to base (\d+)\.", question)
    assert int(digits, int(source)) == int(answer, int(target))
    assert source != target


def check_common_divisor(question: str, answer: str) -> None:
    a, b = map(int, re.findall(r"\d+", question))
    while b:
        a, b = b, a % b
    assert a == int(answer)


def check_common_multiple(question: str, answer: str) -> None:
    a, b = map(int, re.findall(r"\d+", question))
    multiple = a
    while multiple % b:
        multiple += a
    assert multiple == int(answer)


def check_comparison(question: str, answer: str) -> None:
    if question.startswith("Which"):
        a, b = found(r"Which is greater: (\S+) or (\S+)\?", question)
        assert answer in (a, b)
        assert Fraction(answer) == max(Fraction(a), Fraction(b))
        assert Fraction(a) != Fraction(b)
    else:
        a, b = found(r"Is (\S+) less than (\S+)\?", question)
        assert answer == ("Yes" if Fraction(a) < Fraction(b) else "No")


def check_derivative(question: str, answer: str) -> None:
    order, text, name = found(r"What is the (second )?derivative of (.+) with respect to (\w)\?", question)
    for point in range(-3, 4):
        jet = lift(evaluate(text, **{name: Jet(point, 1)}))  # type: ignore[arg-type]
        wanted = 2 * jet.parts[2] if order else jet.parts[1]
        assert evaluate(answer, **{name: point}) == wanted


def check_digits(question: str, answer: str) -> None:
    (number,) = re.findall(r"\d+", question)
    if "sum" in question:
        assert sum(int(digit) for digit in number) == int(answer)
    else:
        (place,) = found(r"What is the (.+) digit of \d+\?", question)
        units = ["units", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands", "millions"]
        assert number[-1 - [*units, "ten millions"].index(place)] == answer


def check_division(question: str, answer: str) -> None:
    total, divisor = map(int, re.findall(r"\d+", question))
    parts = [int(part) for part in re.findall(r"\d+", answer)]
    assert 0 <= parts[-1] < divisor
    assert (total - parts[-1]) % divisor == 0
    if question.startswith("Divide"):
        assert parts[0] * divisor + parts[1] == total


def check_expansion(question: str, answer: str) -> None:
    (text,) = found(r"Expand (.+)\.", question)
    (name,) = set(re.findall(r"[a-z]", text))
    assert "(" not in answer
    for point in range(-4, 5):
        assert evaluate(text, **{name: point}) == evaluate(answer, **{name: point})


def check_fractions(question: str, answer: str) -> None:
    (text,) = found(r"Calculate (.+)\.", question)
    assert evaluate(text) == Fraction(answer)
    assert answer == str(Fraction(answer))


def check_linear_equation(question: str, answer: str) -> None:
    match = re.fullmatch(r"Solve (.+) = (.+) for (\w)\.|Find (\w) if (.+) = (.+)\.", question)
    assert match, question
    left, right, name = match.group(1, 2, 3) if match[1] else match.group(5, 6, 4)
    sides = [[evaluate(side, **{name: value}) for side in (left, right)] for value in (int(answer), int(answer) + 1)]
    assert sides[0][0] == sides[0][1]
    assert sides[1][0] != sides[1][1], "every value would solve it"


def check_linear_system(question: str, answer: str) -> None:
    first, first_value, second, second_value, asked = found(r"Solve (.+) = (-?\d+), (.+) = (-?\d+) for (\w)\.", question)
    (other,) = set(re.findall(r"[a-z]", first + second)) - {asked}
    solutions = [
        value
        for value in range(-15, 16)
        if evaluate(first, **{asked: int(answer), other: value}) == int(first_value)
        and evaluate(second, **{asked: int(answer), other: value}) == int(second_value)
    ]
    assert len(solutions) == 1


def check_mean(question: str, answer: str) -> None:
    kind, values = found(r"What is the (mean|median) of (.+)\?", question)
    wanted = median(numbers(values)) if kind == "median" else sum(numbers(values)) / len(numbers(values))
    assert Fraction(answer) == wanted


def check_modular_arithmetic(question: str, answer: str) -> None:
    text, modulus = found(r"What is (.+) modulo (\d+)\?", question)
    value = evaluate(text)
    assert isinstance(value, int)
    assert value % int(modulus) == int(answer)


def check_percentage(question: str, answer: str) -> None:
    if match := re.fullmatch(r"What is (\d+)% of (\d+)\?", question):
        assert Fraction(answer) * 100 == int(match[1]) * int(match[2])
    else:
        base, direction, percent = found(r"What is (\d+) (increased|decreased) by (\d+)%\?", question)
        change = Fraction(answer) - int(base)
        assert change * 100 == int(base) * int(percent) * (1 if direction == "increased" else -1)


def check_polynomial_value(question: str, answer: str) -> None:
    function, name, text, again, point = found(r"Let (\w)\((\w)\) = (.+)\. What is (\w)\((-?\d+)\)\?", question)
    assert function == again
    assert evaluate(text, **{name: int(point)}) == int(answer)


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def check_prime_factors(question: str, answer: str) -> None:
    (number,) = map(int, re.findall(r"\d+", question))
    if question.startswith("Is"):
        assert answer == ("Yes" if is_prime(number) else "No")
        return
    factors = [int(factor) for factor in re.split(r", |\*", answer)]
    assert all(map(is_prime, factors))
    assert factors == sorted(factors)
    if question.startswith("Write"):
        assert math.prod(factors) == number
    else:
        assert len(set(factors)) == len(factors)
        for factor in factors:
            assert number % factor == 0
            while number % factor == 0:
                number //= factor
        assert number == 1


def check_probability(question: str, answer: str) -> None:
    bag = [colour for count, colour in re.findall(r"(\d+) (\w+)", question) for _ in range(int(count))]
    (asked,) = re.findall(r"(?:it is|all are) (\w+)\?", question)
    taken = 1 if "One ball is" in question else 2 if "Two balls are" in question else 3
    chance, left, right = Fraction(1), len(bag), bag.count(asked)
    for i in range(taken):
        chance *= Fraction(right - i, left - i)
    assert Fraction(answer) == chance
    if len(bag) <= 9 and taken <= 2:
        draws = list(permutations(bag, taken))
        assert Fraction(answer) == Fraction(sum(set(draw) == {asked} for draw in draws), len(draws))


def check_roots(question: str, answer: str) -> None:
    text, name = found(r"Solve (.+) = 0 for (\w)\.", question)
    assert [x for x in range(-25, 26) if evaluate(text, **{name: x}) == 0] == [int(x) for x in answer.split(", ")]


def check_rounding(question: str, answer: str) -> None:
    units = {"ten": 10, "hundred": 100, "thousand": 1000, "ten thousand": 10_000}
    if match := re.fullmatch(r"Round (\S+) to the nearest (.+)\.", question):
        step = Fraction(units[match[2]])
    else:
        match = re.fullmatch(r"Round (\S+) to (\d+) decimal places?\.", question)
        assert match, question
        step = Fraction(1, 10 ** int(match[2]))
        assert len(answer.partition(".")[2]) == int(match[2])
    value, rounded = Fraction(match[1]), Fraction(answer)
    assert (rounded / step).denominator == 1
    assert abs(rounded - value) < step / 2 or (abs(rounded - value) == step / 2 and abs(rounded) > abs(value))


def check_sequence(question: str, answer: str) -> None:
    if match := re.fullmatch(r"What is term number (\d+) of (.+), \.\.\.\?", question):
        wanted, terms = int(match[1]), numbers(match[2])
    else:
        (shown,) = found(r"What is the next term of (.+)\?", question)
        terms = numbers(shown)
        wanted = len(terms) + 1
    steps = [b - a for a, b in pairwise(terms)]
    bends = {b - a for a, b in pairwise(steps)}
    if len(bends) == 1:
        (bend,) = bends
        while len(terms) < wanted:
            terms.append(terms[-1] + (terms[-1] - terms[-2]) + bend)
    else:
        (ratio,) = {b / a for a, b in pairwise(terms)}
        terms.append(terms[-1] * ratio)
    assert terms[wanted - 1] == int(answer)


def check_sorting(question: str, answer: str) -> None:
    shown, order = found(r"Sort (.+) in (ascending|descending) order\.", question)
    assert Counter(shown.split(", ")) == Counter(answer.split(", "))
    values = numbers(answer)
    pairs = pairwise(values)
    assert all(a < b if order == "ascending" else a > b for a, b in pairs)


# In SI base units (bytes for memory), written apart from the generator's own table.
METRIC: dict[str, Fraction | int] = {
    **{"millimeters": Fraction(1, 1000), "centimeters": Fraction(1, 100), "meters": 1, "kilometers": 1000},
    **{"milligrams": Fraction(1, 10**6), "grams": Fraction(1, 1000), "kilograms": 1, "tonnes": 1000},
    **{"seconds": 1, "minutes": 60, "hours": 60 * 60, "days": 24 * 60 * 60, "weeks": 7 * 24 * 60 * 60},
    **{"milliliters": Fraction(1, 1000), "centiliters": Fraction(1, 100), "liters": 1},
    **{"bytes": 1, "kibibytes": 1024, "mebibytes": 1024**2, "gibibytes": 1024**3},
}


def check_unit_conversion(question: str, answer: str) -> None:
    amount, source, target = found(r"Convert (\S+) (\w+) to (\w+)\.", question)
    assert Fraction(amount) * METRIC[source] == Fraction(answer) * METRIC[target]


CHECKS: dict[str, Callable[[str, str], None]] = {
    name.removeprefix("check_").replace("_", " "): check for name, check in list(globals().items()) if name.startswith("check_")
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_answer_is_right(sample: list[Question], family: str) -> None:
    asked = [question for question in sample if question.family == family]
    assert len(asked) > 100
    for question in asked:
        CHECKS[family](question.question, question.answer)


def test_a_wrong_answer_would_be_noticed(sample: list[Question]) -> None:
    noticed: Counter[str] = Counter()
    for family in FAMILIES:
        asked = [question for question in sample if question.family == family][:60]
        for question, other in pairwise(asked):
            try:
                CHECKS[family](question.question, other.answer)
            except (AssertionError, NameError, ValueError):
                noticed[family] += 1
    assert all(noticed[family] >= 15 for family in FAMILIES), noticed


def test_families_and_difficulties_all_have_their_share(sample: list[Question]) -> None:
    counts = Counter((question.family, question.difficulty) for question in sample)
    assert len(FAMILIES) >= 12
    for family, difficulty in product(FAMILIES, range(mathematics.NUM_DIFFICULTIES)):
        assert counts[family, difficulty] >= 0.3 * NUM_QUESTIONS / len(FAMILIES) / 3


def test_no_question_comes_twice(sample: list[Question]) -> None:
    assert len({question.question for question in sample}) == len(sample)


def test_a_seed_means_the_same_questions_wherever_it_runs(sample: list[Question]) -> None:
    assert list(islice(questions(seed=7), 50)) == sample[:50]
    assert list(islice(questions(seed=8), 50)) != sample[:50]
    first = next(questions())
    assert (first.family, first.question, first.answer) == PINNED_FIRST


def test_blocks_hold_whole_questions_of_one_split_only() -> None:
    splits: dict[str, set[str]] = {"train": set(), "validation": set()}
    total = 0
    for split, text in documents(num_bytes=200_000, validation_share=0.1):
        assert text.endswith("\n")
        total += len(text)
        lines = text.splitlines()
        assert [line[:3] for line in lines] == ["Q: ", "A: "] * (len(lines) // 2)
        asked = {line.removeprefix("Q: ") for line in lines[::2]}
        assert {split_of(question, validation_share=0.1) for question in asked} == {split}
        splits[split] |= asked
    assert not splits["train"] & splits["validation"]
    assert 0.07 < len(splits["validation"]) / (len(splits["train"]) + len(splits["validation"])) < 0.13
    assert 200_000 <= total < 201_000
