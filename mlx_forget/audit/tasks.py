"""lm-eval's tasks before and after, on the same examples: accuracies, a paired test, and agreement with the base's answers.

Both models score every request in one pass; lm-eval is then run once for each on the scores.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.audit.answers import PairedRates, paired_rates
from mlx_forget.audit.models import Model
from mlx_forget.errors import UserError
from mlx_forget.pipeline.tokenise import Progress
from mlx_forget.trainer import Trainer

_METRICS = ("acc", "acc_norm", "exact_match")
_YAML = (".yaml", ".yml")
_ROWS_AT_ONCE = 64
_Score = tuple[float, bool]


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: lm-eval's.
        metric: of that name, 1 for a right answer.
        rates: of right answers.
        agreement: share of examples to which both models give the same answer, right or wrong; None where a task has no choices.
    """

    name: str
    metric: str
    rates: PairedRates
    agreement: float | None


def check_tasks(tasks: str) -> list[str]:
    """The names in a list that commas separate: lm-eval's own, or YAML files of tasks.

    Raises:
        UserError: no name, a file that is not there, or lm-eval is not installed.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks takes names that commas separate, such as arc_easy,hellaswag.")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-eval, which is not installed: pip install 'mlx-forget[eval]'")
    for name in names:
        if name.endswith(_YAML) and not Path(name).is_file():
            raise UserError(f"--tasks: there is no file {name}.")
    return names


def compare_tasks(trainer: Trainer, model: Model, tasks: str, *, limit: int | None, progress: Progress) -> tuple[Task, ...]:
    """Run tasks with the trainer's model and its reference.

    Raises:
        UserError: a task that lm-eval does not know or cannot load, or one that generates text.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    scorer = _PairScorer(trainer, model, progress)

    class Side(LM):  # type: ignore[misc]
        """One of the two models, answering from the scores of both."""

        def __init__(self, side: int) -> None:
            super().__init__()
            self.side = side

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[_Score]:
            return [pair[self.side] for pair in scorer.scores([request.args for request in requests])]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [("", request.args[0]) for request in requests]
            return [pair[self.side][0] for pair in scorer.scores(texts)]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise UserError("--tasks runs tasks that choose among answers; one of these generates text.")

    names = check_tasks(tasks)
    folders = [str(Path(name).resolve().parent) for name in names if name.endswith(_YAML)]
    names = [Path(name).stem if name.endswith(_YAML) else name for name in names]
    manager = TaskManager(include_path=folders or None)
    samples = []
    for side in (1, 0):
        try:
            found = simple_evaluate(
                Side(side), tasks=list(names), task_manager=manager, limit=limit, log_samples=True, bootstrap_iters=0
            )
        except UserError:
            raise
        except Exception as error:
            # Tasks load data of their own, by names of their own: whatever fails there is about the request.
            raise UserError(f"lm-eval cannot run {tasks}: {' '.join(str(error).split()) or type(error).__name__}") from error
        samples.append(found["samples"])
    before, after = samples
    return tuple(_task(name, before[name], after[name]) for name in sorted(before))


def _task(name: str, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Task:
    first, second = ({sample["doc_id"]: sample for sample in side} for side in (before, after))
    shared = sorted(set(first) & set(second))
    metric = next((metric for metric in _METRICS if shared and metric in first[shared[0]]), None)
    if metric is None:
        raise UserError(f"Task {name} has none of the metrics {', '.join(_METRICS)}: its answers cannot be compared one by one.")
    rates = paired_rates([float(first[i][metric]) for i in shared], [float(second[i][metric]) for i in shared])
    choices = [(_choice(first[i]), _choice(second[i])) for i in shared]
    same = [a == b for a, b in choices if a is not None and b is not None]
    return Task(name, metric, rates, float(np.mean(same)) if same else None)


def _choice(sample: dict[str, Any]) -> int | None:
    """The answer with the highest score; None where there is nothing to choose."""
    scores = [response[0] for response in sample["filtered_resps"] if isinstance(response, list | tuple)]
    return int(np.argmax(scores)) if len(scores) > 1 else None


class _PairScorer:
    """Log-likelihoods of continuations under both models (tuned, base), each request computed once."""

    def __init__(self, trainer: Trainer, model: Model, progress: Progress) -> None:
        self._trainer, self._model, self._progress = trainer, model, progress
        self._known: dict[tuple[str, str], tuple[_Score, _Score]] = {}

    def scores(self, requests: Sequence[tuple[str, str]]) -> list[tuple[_Score, _Score]]:
        new = [request for request in dict.fromkeys(requests) if request not in self._known]
        rows = [self._row(*request) for request in new]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        for start in range(0, len(order), _ROWS_AT_ONCE):
            chosen = order[start : start + _ROWS_AT_ONCE]
            width = len(rows[chosen[0]][0])
            tokens, mask = np.zeros((len(chosen), width), np.int32), np.zeros((len(chosen), width - 1), np.uint8)
            for number, i in enumerate(chosen):
                row, num_scored = rows[i]
                tokens[number, : len(row)] = row
                mask[number, len(row) - 1 - num_scored : len(row) - 1] = 1
            found = self._trainer.compare(tokens, mask)
            for number, i in enumerate(chosen):
                here = mask[number].astype(bool)
                tuned = (-float(found.nll[number].sum(dtype=np.float64)), bool(found.hit[number][here].all()))
                base = (-float(found.ref_nll[number].sum(dtype=np.float64)), bool(found.ref_hit[number][here].all()))
                self._known[new[i]] = (tuned, base)
            self._progress("scoring answers", min(1.0, (start + len(chosen)) / len(order)))
        return [self._known[request] for request in requests]

    def _row(self, context: str, continuation: str) -> tuple[np.ndarray[Any, np.dtype[np.int32]], int]:
        """BOS and the tokens of both, cut at the left to fit the context, and how many of the last ones are scored."""
        # A space before a word belongs to the word's token.
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        encode = self._model.tokenizer.encode
        whole, num_context = encode(kept + continuation), len(encode(kept)) if kept else 0
        num_scored = max(1, len(whole) - num_context)
        length = self._model.spec.context_length
        row = np.concatenate([[self._model.bos_id], whole[-length:]]).astype(np.int32)
        return row, min(num_scored, len(row) - 1)
