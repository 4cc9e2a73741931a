"""Four small tasks with exact answers: addition, reversal, sorting and addition modulo 1000 of three-digit numbers.

Each task's rows start with a BOS of its own (Marek et al. 2026, experiment toy_continual):

    BOS, three digits, SEP, three digits or NULL, EQUALS | four digits, EOS
"""

import numpy as np
import numpy.typing as npt

from mlx_forget.trainer import Trainer

TASKS = ("add", "reversal", "sort", "modadd")
_PAD, _FIRST_BOS, _SEP, _EQUALS, _NULL, _EOS, _FIRST_DIGIT = 0, 1, 5, 6, 7, 8, 9
VOCAB_SIZE = 19
_QUESTION, LENGTH = 9, 14

Rows = npt.NDArray[np.int32]


def bos_of(task: str) -> int:
    """The first token of a task's rows."""
    return _FIRST_BOS + TASKS.index(task)


def examples(task: str, count: int, seed: int) -> Rows:
    """Random questions of a task with their answers, int32[count, LENGTH]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, TASKS.index(task)]))
    a, b = rng.integers(0, 1000, (2, count))
    digits = _digits(a, 3)
    rows = np.full((count, LENGTH), _NULL, np.int32)
    rows[:, 0], rows[:, 4], rows[:, 8], rows[:, 13] = bos_of(task), _SEP, _EQUALS, _EOS
    rows[:, 1:4] = digits + _FIRST_DIGIT
    if task in ("add", "modadd"):
        rows[:, 5:8] = _digits(b, 3) + _FIRST_DIGIT
        answer = _digits(a + b if task == "add" else (a + b) % 1000, 4)
    else:
        ordered = digits[:, ::-1] if task == "reversal" else np.sort(digits, axis=1)
        answer = np.concatenate([np.zeros((count, 1), np.int64), ordered], axis=1)
    rows[:, _QUESTION : _QUESTION + 4] = answer + _FIRST_DIGIT
    return rows


def _digits(numbers: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Decimal digits, highest first, int64[n, count]."""
    digits: npt.NDArray[np.int64] = numbers[:, None] // 10 ** np.arange(count - 1, -1, -1) % 10
    return digits


def exact_match(trainer: Trainer, rows: Rows) -> float:
    """Share of questions whose greedy answer is right, EOS included."""
    # At this temperature all the probability is on the likeliest token.
    u = np.full((len(rows), LENGTH - _QUESTION), 0.5)
    answers = trainer.sample(rows[:, :_QUESTION], u, temperature=1e-4)
    return float((answers == rows[:, _QUESTION:]).all(axis=1).mean())
