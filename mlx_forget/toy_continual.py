"""Four small tasks, one after another: does a model keep the earlier ones when it replays its own samples?

The toy of Marek et al. (2026, experiment toy_continual): addition, reversal, sorting and addition modulo 1000 of three-digit numbers, each
under a BOS of its own. At every new task the optimiser starts afresh and the reference is the model as it stands; replay rows are sampled
from the reference after the BOS of each earlier task, in equal parts, and their next-token loss is added with coefficient 10. A task is
solved where the greedy answer and its EOS match exactly. The model is a GPT-2-style one of the ladder, not the authors'.

    python -m mlx_forget.toy_continual --tasks reversal,sort --batch-size 256 --steps 2000
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError, unknown
from mlx_forget.ladder import model_spec
from mlx_forget.methods import TERM_REPLAY_NTP, method_spec
from mlx_forget.sampling import uniforms
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, Trainer, TrainerSpec, choose_backend, load_backend

TASKS = ("add", "reversal", "sort", "modadd")
_PAD, _FIRST_BOS, _SEP, _EQUALS, _NULL, _EOS, _FIRST_DIGIT = 0, 1, 5, 6, 7, 8, 9
VOCAB_SIZE = 19
# BOS, three digits, SEP, three digits or NULL, EQUALS | four digits, EOS
_QUESTION, LENGTH = 9, 14
_STEPS_SAMPLED_AT_ONCE = 4

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ToySpec:
    """The experiment; defaults are the published ones.

    Args:
        tasks: in the order in which they are learnt.
        steps: per task.
        batch_size: task rows per step, and as many replay rows.
        coefficient: c of the replay term.
    """

    tasks: tuple[str, ...] = TASKS
    steps: int = 2000
    batch_size: int = 2048
    shape: str = "2x256"
    learning_rate: float = 1e-4
    warmup_steps: int = 200
    coefficient: float = 10.0
    num_train: int = 65_536
    num_valid: int = 4_096
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise unknown("task", task, TASKS)
        if len(set(self.tasks)) != len(self.tasks) or len(self.tasks) < 2:
            raise UserError("Forgetting needs at least two tasks, each once.")
        for name in ("steps", "batch_size", "num_train", "num_valid"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be positive, it is {getattr(self, name)}.")


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


def run_toy(
    spec: ToySpec, *, replay: bool, backend: str, runtime: RuntimeSpec, say: Callable[[str], None] = lambda sentence: None
) -> list[dict[str, float]]:
    """Learn the tasks in order; exact match of every task after each of them."""
    model = model_spec(spec.shape, VOCAB_SIZE, LENGTH)
    valid = {task: examples(task, spec.num_valid, spec.seed + 1) for task in spec.tasks}
    optim = OptimSpec(beta2=0.99, weight_decay=0.02, max_grad_norm=0.0)
    matrix: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "model.safetensors"
        for stage, task in enumerate(spec.tasks):
            earlier = spec.tasks[:stage] if replay else ()
            method = method_spec("ntp-replay", spec.coefficient) if earlier else method_spec("plain")
            trainer = load_backend(backend)(TrainerSpec(model=model, optim=optim, method=method, runtime=runtime, seed=spec.seed))
            if stage:
                trainer.load(weights)
            trainer.set_reference("start")
            _learn(trainer, task, earlier, spec, stage)
            trainer.save(weights)
            matrix.append({name: exact_match(trainer, rows) for name, rows in valid.items()})
            say(f"after {task}: " + ", ".join(f"{name} {share:.1%}" for name, share in matrix[-1].items()))
    return matrix


def _learn(trainer: Trainer, task: str, earlier: Sequence[str], spec: ToySpec, stage: int) -> None:
    data = examples(task, spec.num_train, spec.seed)
    order = np.random.Generator(np.random.Philox(key=[spec.seed, 100 + stage]))
    cache: Rows = np.zeros((0, LENGTH), np.int32)
    for step in range(spec.steps):
        rows = data[order.integers(0, len(data), spec.batch_size)]
        if earlier:
            here = step % _STEPS_SAMPLED_AT_ONCE * spec.batch_size
            if not here:
                cache = _replayed(trainer, earlier, spec, stage, step)
            rows = np.concatenate([rows, cache[here : here + spec.batch_size]])
        term = np.repeat(np.array([0, TERM_REPLAY_NTP], np.uint8), [spec.batch_size, len(rows) - spec.batch_size])
        batch = Batch(rows, np.ones((len(rows), LENGTH - 1), np.uint8), None, term, (term > 0).astype(np.uint8))
        trainer.train_step(batch, spec.learning_rate * min(1.0, (step + 1) / spec.warmup_steps))


def _replayed(trainer: Trainer, earlier: Sequence[str], spec: ToySpec, stage: int, step: int) -> Rows:
    """Replay rows of the next steps: the earlier tasks take turns, row by row."""
    count = _STEPS_SAMPLED_AT_ONCE * spec.batch_size
    prompts = np.resize(np.array([bos_of(task) for task in earlier], np.int32), count)[:, None]
    u = uniforms(spec.seed + 1000 * stage, step * spec.batch_size, count, LENGTH - 1)
    return np.concatenate([prompts, trainer.sample(prompts, u, from_reference=True)], axis=1)


def main(arguments: list[str] | None = None) -> None:
    """Both arms, with and without replay; prints a table, or one JSON object with --json."""
    defaults = ToySpec()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", default=",".join(defaults.tasks))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--json", action="store_true")
    for name in ("steps", "batch_size", "shape", "learning_rate", "warmup_steps", "coefficient", "num_train", "num_valid", "seed"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    backend, threads, as_json = (given.pop(name) for name in ("backend", "num_threads", "json"))
    try:
        spec = ToySpec(**given | {"tasks": tuple(given["tasks"].split(","))})
        backend = choose_backend()[0] if backend == "auto" else backend
        arms = {}
        for name, replay in (("without replay", False), ("with self-generated replay", True)):
            arms[name] = run_toy(
                spec,
                replay=replay,
                backend=backend,
                runtime=RuntimeSpec(num_threads=threads),
                say=lambda sentence, name=name: None if as_json else print(f"{name}, {sentence}", flush=True),  # type: ignore[misc]
            )
    except UserError as error:
        parser.exit(2, f"{error}\n")
    if as_json:
        print(json.dumps({"spec": asdict(spec), "backend": backend, "exact_match": arms}))


if __name__ == "__main__":
    main()
