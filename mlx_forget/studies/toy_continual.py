"""Small tasks, one after another: does a model keep the earlier ones when it replays its own samples?

The toy of Marek et al. (2026, experiment toy_continual), on the tasks of `toy_tasks`. At every new task the optimiser starts afresh and
the reference is the model as it stands; replay rows are sampled from the reference after the BOS of each earlier task, in equal parts,
and their next-token loss is added with coefficient 10. A task is solved where the greedy answer and its EOS match exactly. The model is a
GPT-2-style one of the ladder, not the authors'. Rows here are no text: a task is the BOS that its rows start with, and no tokenizer knows
it, which is why these stages are none of a recipe's.

    python -m mlx_forget.studies.toy_continual --tasks reversal,sort --batch-size 256 --steps 600 --output runs/toy
    forget plot runs/toy

The folder holds `toy.json`, every reading so far, and what a stopped run needs: the same command goes on from the last reading.
"""

import argparse
import csv
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.backends import choose_backend, load_backend
from mlx_forget.durable_files import is_whole, make_folder, read_object, sealed, sync, write_text
from mlx_forget.errors import Interrupted, RunFailed, UserError, exit_code, unknown
from mlx_forget.ladder import model_spec
from mlx_forget.methods import TERM_REPLAY_NTP, method_spec
from mlx_forget.records import installed_versions
from mlx_forget.replay.sampling import uniforms
from mlx_forget.studies.toy_tasks import LENGTH, TASKS, VOCAB_SIZE, Rows, bos_of, exact_match, examples
from mlx_forget.trainer import Batch, OptimSpec, RuntimeSpec, Trainer, TrainerSpec

FILE = "toy.json"
SCHEMA_VERSION = 1
# What an arm is called, and the folder of its weights.
PLAIN, REPLAYED = "without replay", "with self-generated replay"
ARMS = {PLAIN: "plain", REPLAYED: "replay"}
READINGS_PER_TASK = 10
_STEPS_SAMPLED_AT_ONCE = 4
_WEIGHTS, _STATE = "model.safetensors", "training_state.safetensors"

# The steps so far, over all tasks, and the share of right answers of every task.
Reading = dict[str, Any]


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
        for name in ("steps", "batch_size", "num_train", "num_valid", "warmup_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be positive, it is {getattr(self, name)}.")

    @property
    def command(self) -> str:
        """What runs it."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        options = {name: ",".join(value) if name == "tasks" else value for name, value in given.items()}
        return " ".join(
            [
                "python -m mlx_forget.studies.toy_continual",
                *(f"--{name.replace('_', '-')} {value}" for name, value in options.items()),
            ]
        )

    def learning_rate_of(self, step: int) -> float:
        """Constant after a linear warm-up; step 0 already learns."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps)


@dataclass
class Outcome:
    """Every reading so far of both arms, as `toy.json` holds it."""

    spec: ToySpec
    backend: str
    device: str
    arms: dict[str, list[Reading]]

    @property
    def is_finished(self) -> bool:
        last = len(self.spec.tasks) * self.spec.steps
        return all(readings and readings[-1]["step"] == last for readings in self.arms.values())

    def after(self, arm: str, stage: int) -> dict[str, float] | None:
        """Exact match of every task when a task has been learnt, or None before that."""
        step = (stage + 1) * self.spec.steps
        return next((dict(row["exact_match"]) for row in self.arms[arm] if row["step"] == step), None)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "command": self.spec.command,
            "finished": self.is_finished,
            "spec": asdict(self.spec),
            "backend": self.backend,
            "device": self.device,
            "versions": installed_versions(),
            "arms": self.arms,
        }


def read_outcome(folder: Path) -> Outcome | None:
    """What a folder holds of the experiment; None where there is nothing.

    Raises:
        UserError: a damaged file, or one of another schema.
    """
    path = folder / FILE
    try:
        found = read_object(path)
        if found["schema_version"] != SCHEMA_VERSION:
            raise UserError(f"{path} has schema {found['schema_version']}, this version reads {SCHEMA_VERSION}.")
        if not is_whole(found):
            raise ValueError
        defaults, spec = asdict(ToySpec()), found["spec"]
        if not spec.keys() <= defaults.keys():
            raise ValueError
        given = {name: type(default)(spec.get(name, default)) for name, default in defaults.items()}
        arms = {arm: [_reading(row, given["tasks"]) for row in found["arms"][arm]] for arm in ARMS}
        return Outcome(ToySpec(**given), str(found["backend"]), str(found["device"]), arms)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: remove {folder}, and the experiment starts again.") from None


def _reading(row: Mapping[str, Any], tasks: Sequence[str]) -> Reading:
    return {"step": int(row["step"]), "exact_match": {task: float(row["exact_match"][task]) for task in tasks}}


def run_toy(
    spec: ToySpec,
    folder: Path,
    *,
    backend: str,
    runtime: RuntimeSpec,
    say: Callable[[str], None] = lambda sentence: None,
    interrupted: Callable[[], int | None] = lambda: None,
) -> Outcome:
    """Learn the tasks in order, without and with replay, from where an earlier call has stopped.

    The first task is learnt once: there is nothing to replay yet.

    Raises:
        UserError: the folder holds another experiment, or cannot be written.
        Interrupted: a stop was asked for.
    """
    make_folder(folder)
    outcome = read_outcome(folder) or Outcome(spec, backend, "", {arm: [] for arm in ARMS})
    if (outcome.spec, outcome.backend) != (spec, backend):
        raise UserError(f"{folder} holds another experiment ({outcome.spec.command}, {outcome.backend}): choose another --output.")
    if outcome.is_finished:
        _remove_weights(folder)
        say(f"This experiment is done already: {folder / FILE}")
        return outcome
    valid = {task: examples(task, spec.num_valid, spec.seed + 1) for task in spec.tasks}
    for arm in ARMS:
        for stage, task in enumerate(spec.tasks):
            if arm == REPLAYED and not stage:
                shared = [row for row in outcome.arms[PLAIN] if row["step"] <= spec.steps]
                outcome.arms[arm] = shared + [row for row in outcome.arms[arm] if row["step"] > spec.steps]
            else:
                _learn(outcome, arm, stage, folder, valid, runtime, interrupted)
            scores = outcome.after(arm, stage)
            assert scores is not None
            say(f"{arm}, after {task}: " + ", ".join(f"{name} {share:.1%}" for name, share in scores.items()))
    _remove_weights(folder)
    return outcome


def _learn(
    outcome: Outcome,
    arm: str,
    stage: int,
    folder: Path,
    valid: Mapping[str, Rows],
    runtime: RuntimeSpec,
    interrupted: Callable[[], int | None],
) -> None:
    """Learn one task, reading every task's score on the way, unless that is done."""
    spec, readings, task = outcome.spec, outcome.arms[arm], outcome.spec.tasks[stage]
    if outcome.after(arm, stage) is not None and _learnt(folder / ARMS[arm], stage).exists():
        return
    earlier = spec.tasks[:stage] if arm == REPLAYED else ()
    trainer = load_backend(outcome.backend)(
        TrainerSpec(
            model=model_spec(spec.shape, VOCAB_SIZE, LENGTH),
            optim=OptimSpec(beta2=0.99, weight_decay=0.02, max_grad_norm=0.0),
            method=method_spec("ntp-replay", spec.coefficient) if earlier else method_spec("plain"),
            runtime=runtime,
            seed=spec.seed,
        )
    )
    outcome.device = trainer.device
    if stage:
        # The first task is learnt by the plain arm for both.
        trainer.load(_learnt(folder / ARMS[PLAIN if stage == 1 else arm], stage - 1))
    trainer.set_reference("start")
    done = _resume(trainer, folder / ARMS[arm], stage)
    first = stage * spec.steps
    readings[:] = [row for row in readings if row["step"] <= first + done]
    every = max(1, spec.steps // READINGS_PER_TASK)
    for step, batch in _batches(trainer, earlier, spec, stage, done):
        result = trainer.train_step(batch, spec.learning_rate_of(step))
        last = step + 1 == spec.steps
        if last or (step + 1) % every == 0:
            if not math.isfinite(result.read().grad_norm):
                raise RunFailed(f"{arm}, {task}: the gradient is not finite at step {step + 1:,}: lower --learning-rate.")
            scores = {name: exact_match(trainer, rows) for name, rows in valid.items()}
            readings.append({"step": first + step + 1, "exact_match": scores})
            # In this order: readings that no checkpoint has reached are read again.
            write_text(folder / FILE, json.dumps(sealed(outcome.as_json()), indent=1))
            _keep(trainer, folder / ARMS[arm], stage, step + 1, whole=last)
        if (signal := interrupted()) and not last:
            _keep(trainer, folder / ARMS[arm], stage, step + 1, whole=False)
            raise Interrupted(f"interrupted at step {first + step + 1:,}; the same command goes on from there", signal=signal)


def _learnt(folder: Path, stage: int) -> Path:
    """The weights at the end of a task."""
    return folder / f"{stage}.safetensors"


def _remove_weights(folder: Path) -> None:
    """Remove what only a run that is not finished needs; a run that was killed after its last reading has it still."""
    for name in ARMS.values():
        shutil.rmtree(folder / name, ignore_errors=True)


def _keep(trainer: Trainer, folder: Path, stage: int, step: int, *, whole: bool) -> None:
    """Weights at the end of a task, or weights and moments within one; the newest replaces the one before."""
    folder.mkdir(exist_ok=True)
    if whole:
        aside = folder / f".{stage}.part.safetensors"
        trainer.save(aside)
        sync(aside)
        os.replace(aside, _learnt(folder, stage))
        sync(folder)
    older = [path for path in folder.glob(f"{stage}-*") if path.name != f"{stage}-{step}"]
    if not whole and not (folder / f"{stage}-{step}").exists():
        parts = folder / f".{stage}-{step}.part"
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        trainer.save(parts / _WEIGHTS)
        trainer.save_state(parts / _STATE)
        for part in (parts / _WEIGHTS, parts / _STATE, parts):
            sync(part)
        os.rename(parts, folder / f"{stage}-{step}")
        sync(folder)
    for one in older:
        shutil.rmtree(one)


def _resume(trainer: Trainer, folder: Path, stage: int) -> int:
    """Load the newest checkpoint within a task; returns its step, or 0."""
    steps = [int(path.name.partition("-")[2]) for path in folder.glob(f"{stage}-*")]
    if not steps:
        return 0
    newest = folder / f"{stage}-{max(steps)}"
    trainer.load(newest / _WEIGHTS)
    trainer.load_state(newest / _STATE)
    return max(steps)


def _batches(trainer: Trainer, earlier: Sequence[str], spec: ToySpec, stage: int, done: int) -> Iterator[tuple[int, Batch]]:
    """The steps of a task that are left, with their batches: task rows, then replay rows."""
    data = examples(spec.tasks[stage], spec.num_train, spec.seed)
    order = np.random.Generator(np.random.Philox(key=[spec.seed, 100 + stage]))
    cache: Rows | None = None
    for step in range(spec.steps):
        # Drawn for the steps that are done too: the order is that of an uninterrupted run.
        chosen = order.integers(0, len(data), spec.batch_size)
        if step < done:
            continue
        rows = data[chosen]
        if earlier:
            within = step % _STEPS_SAMPLED_AT_ONCE
            if cache is None or not within:
                cache = _replayed(trainer, earlier, spec, stage, step - within)
            rows = np.concatenate([rows, cache[within * spec.batch_size : (within + 1) * spec.batch_size]])
        term = np.repeat(np.array([0, TERM_REPLAY_NTP], np.uint8), [spec.batch_size, len(rows) - spec.batch_size])
        yield step, Batch(rows, np.ones((len(rows), LENGTH - 1), np.uint8), None, term, (term > 0).astype(np.uint8))


def _replayed(trainer: Trainer, earlier: Sequence[str], spec: ToySpec, stage: int, step: int) -> Rows:
    """Replay rows of the next steps: the earlier tasks take turns, row by row."""
    count = _STEPS_SAMPLED_AT_ONCE * spec.batch_size
    prompts = np.resize(np.array([bos_of(task) for task in earlier], np.int32), count)[:, None]
    u = uniforms(spec.seed + 1000 * stage, step * spec.batch_size, count, LENGTH - 1)
    return np.concatenate([prompts, trainer.sample(prompts, u, from_reference=True)], axis=1)


def table_lines(outcome: Outcome) -> list[str]:
    """Exact match after each task, as aligned text."""
    tasks, width = outcome.spec.tasks, max(map(len, ARMS))
    lines = [f"{'':<{width}}  {'after':<9}" + "".join(f"  {task:>9}" for task in tasks)]
    for arm in ARMS:
        for stage, task in enumerate(tasks):
            scores = outcome.after(arm, stage)
            cells = "" if scores is None else "".join(f"  {scores[name]:>9.1%}" for name in tasks)
            lines.append(f"{arm:<{width}}  {task:<9}{cells}")
    return [*lines, f"Share of {outcome.spec.num_valid:,} held-out questions whose greedy answer, end included, is right."]


def write_csv(outcome: Outcome, path: Path) -> None:
    """Every reading: columns arm, step, task, exact_match."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "step", "task", "exact_match"))
    for arm, readings in outcome.arms.items():
        writer.writerows((arm, row["step"], task, share) for row in readings for task, share in row["exact_match"].items())
    write_text(path, text.getvalue())


def main(arguments: list[str] | None = None) -> None:
    """Both arms, with and without replay; prints a table, or one JSON object with --json."""
    from mlx_forget.cli.signals import graceful_stop

    defaults = ToySpec()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", default=",".join(defaults.tasks))
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/toy"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--json", action="store_true")
    for name in ("steps", "batch_size", "shape", "learning_rate", "warmup_steps", "coefficient", "num_train", "num_valid", "seed"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    backend, threads, as_json, folder = (given.pop(name) for name in ("backend", "num_threads", "json", "output"))

    def say(sentence: str) -> None:
        if not as_json:
            print(sentence, flush=True)

    try:
        spec = ToySpec(**given | {"tasks": tuple(given["tasks"].split(","))})
        backend = choose_backend()[0] if backend == "auto" else backend
        with graceful_stop(say) as interrupted:
            runtime = RuntimeSpec(num_threads=threads)
            outcome = run_toy(spec, folder, backend=backend, runtime=runtime, say=say, interrupted=interrupted)
    except (Interrupted, RunFailed, UserError) as error:
        parser.exit(exit_code(error), f"{error}\n")
    except OSError as error:
        parser.exit(1, f"Cannot write {folder}: {error.strerror or error}; the same command goes on from there.\n")
    print(json.dumps(outcome.as_json()) if as_json else "\n".join(table_lines(outcome)))


if __name__ == "__main__":
    main()
