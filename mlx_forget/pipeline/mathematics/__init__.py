"""Questions and answers from school mathematics, drawn from a seed; after DM Mathematics (Saxton 2019).

A family (`families`) is a function of a random source and a difficulty (0 easy, 1 medium, 2 hard) that returns a
question and its answer. Numbers are written with digits, polynomials as `3*x**2 - x + 4`, fractions as `3/4`. The
stream is lazy and without end; no question comes twice, and the hash of a question alone decides its split.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mlx_forget.pipeline.mathematics.draw import Draw
from mlx_forget.pipeline.mathematics.families import FAMILIES

Split = Literal["train", "validation"]
NUM_DIFFICULTIES = 3
DOCUMENT_BYTES = 4_000


@dataclass(frozen=True)
class Question:
    """A question, its answer, and where they come from."""

    family: str
    difficulty: int
    question: str
    answer: str

    @property
    def text(self) -> str:
        return f"Q: {self.question}\nA: {self.answer}\n"


def questions(seed: int = 0) -> Iterator[Question]:
    """Questions without end: families and difficulties in equal parts, until one has no new ones left."""
    names = sorted(FAMILIES)
    draw = Draw(seed)
    seen: set[bytes] = set()
    while True:
        name = draw.one_of(names)
        difficulty = draw.below(NUM_DIFFICULTIES)
        question, answer = FAMILIES[name](draw, difficulty)
        key = hashlib.blake2b(question.encode(), digest_size=8).digest()
        if key not in seen:
            seen.add(key)
            yield Question(name, difficulty, question, answer)


def split_of(question: str, *, validation_share: float) -> Split:
    """The split of a question: a pure function of its text."""
    digest = hashlib.sha256(question.encode()).digest()
    return "validation" if int.from_bytes(digest[:8]) < validation_share * 2**64 else "train"


def documents(*, num_bytes: int, validation_share: float, seed: int = 0) -> Iterator[tuple[Split, str]]:
    """Blocks of questions of some 4 KB, each with the split of all its questions, `num_bytes` in all."""
    pending: dict[Split, list[str]] = {"train": [], "validation": []}
    sizes: dict[Split, int] = {"train": 0, "validation": 0}
    total = 0
    for question in questions(seed):
        split = split_of(question.question, validation_share=validation_share)
        pending[split].append(question.text)
        sizes[split] += len(question.text)
        total += len(question.text)
        if sizes[split] >= DOCUMENT_BYTES:
            yield split, "".join(pending[split])
            pending[split], sizes[split] = [], 0
        if total >= num_bytes:
            break
    for split, rest in pending.items():
        if rest:
            yield split, "".join(rest)
