"""Small runs of one shape trained as one: which can, how many at a time, and doing it.

A model that is too small to fill a device leaves most of it idle; K of them side by side use it. Each run keeps its data, schedule, stop
rules, history, checkpoints and record, and ends with the losses that it would have alone.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from mlx_forget import records
from mlx_forget.backends import load_backend
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.errors import Interrupted, OutOfMemory, RunFailed
from mlx_forget.ladder import num_params, train_bytes
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.training.folder import only_group
from mlx_forget.training.loop import RunState, drive
from mlx_forget.training.plan import Plan
from mlx_forget.training.run import finish_run, look_into, prepare_run, start_trainer, trainer_spec, with_base
from mlx_forget.training.watch import Watch

Wanted = Literal["auto", "off"] | int

# `auto` fills an accelerator up to this many parameters; declared, not measured. A model of this size keeps one busy by itself.
_AUTO_PARAMS = 20_000_000
_AUTO_MEMBERS = 32
# What is left to the framework, the evaluations and whoever else is there.
_SHARE_OF_MEMORY = 0.7


def obstacle(plan: Plan) -> str | None:
    """Why a run cannot be part of a stack, or None."""
    method = plan.config.method_spec()
    if not load_backend(plan.backend).describe().stack:
        return f"backend {plan.backend!r} does not stack"
    if plan.group.size > 1:
        return "a run on several devices does not stack"
    if plan.config.adapter() is not None or plan.config.trained_layers is not None or plan.config.compare_to_start:
        return "a run with adapters, or one that is compared with its start model, does not stack"
    if method.reference is not None or method.replay_term is not None:
        return f"method {method.name!r} does not stack"
    if plan.config.optimizer != "adamw":
        return f"optimizer {plan.config.optimizer!r} does not stack"
    if plan.model.architecture != "gpt2":
        return f"architecture {plan.model.architecture!r} does not stack"
    return None


def shape_of(plan: Plan) -> Hashable:
    """Runs stack if this is equal: everything of a step but its data, share, seed and rate."""
    config = plan.config
    runtime = dataclasses.replace(config.runtime(plan.precision), num_threads=None)
    sides = [side for side in (plan.stream.target, plan.stream.pretrain) if side is not None]
    rows = (plan.stream.batch_size, plan.stream.target.row_length, any(side.has_segments for side in sides))
    return plan.backend, plan.model, config.optim(), config.method_spec(), runtime, rows


def most_members(plan: Plan, wanted: Wanted, *, num_processes: int = 1) -> tuple[int, str]:
    """How many runs like this one to train as one, and a sentence that says why.

    Args:
        wanted: `off`, a number, or `auto`: off on a CPU, where it does not pay; many small models on an accelerator.
        num_processes: stacks that share the device's memory.
    """
    backend = load_backend(plan.backend)
    if wanted == "off":
        return 1, "Runs are trained one by one, as asked."
    on_cpu = plan.config.device == "cpu" or not backend.describe().accelerator
    if wanted == "auto" and on_cpu:
        return 1, "Runs are trained one by one: on a CPU, a stack is no faster (0.94 to 1.10 times, measured)."
    count = wanted if isinstance(wanted, int) else min(_AUTO_MEMBERS, _AUTO_PARAMS // num_params(plan.model))
    if count < 2:
        return 1, f"Runs are trained one by one: a model of {num_params(plan.model):,} parameters fills a device by itself."
    limit = plan.config.memory_limit_gb
    available = limit * 1e9 if limit is not None else (backend.memory_bytes() or _host_memory_bytes())
    if available is not None:
        rows = plan.config.micro_batch_size or plan.stream.batch_size
        assert not isinstance(plan.model, PretrainedSpec), "does not stack"
        need = train_bytes(plan.model, rows * plan.stream.target.row_length)
        fitting = int(available * _SHARE_OF_MEMORY / num_processes / need)
        if fitting < count:
            members = f"only {fitting} runs are" if fitting > 1 else "runs are not"
            return max(1, fitting), (
                f"Instead of {count}, {members} trained as one: each needs about {need / 1e9:.2g} GB of {available / 1e9:.2g} GB."
            )
    return count, f"Up to {count} runs of one shape are trained as one."


def group_runs(plans: Sequence[Plan], wanted: Wanted, *, num_processes: int = 1) -> tuple[list[list[int]], list[str]]:
    """Which runs to train as one, as numbers into `plans`, and the sentences that say why."""
    groups: list[list[int]] = []
    said: list[str] = []
    alike: dict[Hashable, list[int]] = {}
    for number, plan in enumerate(plans):
        reason = obstacle(plan) if wanted != "off" else None
        if reason is not None:
            groups.append([number])
            said.append(f"Trained one by one: {reason}.")
        elif records.read_record(plan.folder) is not None:
            groups.append([number])
        else:
            alike.setdefault(shape_of(plan), []).append(number)
    for numbers in alike.values():
        most, sentence = most_members(plans[numbers[0]], wanted, num_processes=num_processes)
        said.append(sentence)
        if most > 1 and len(numbers) == 1:
            said.append(f"Run {plans[numbers[0]].run_id} is the only one of its shape: it is trained alone.")
        # Runs of one length end together; a stack gets smaller as its runs end.
        numbers = sorted(numbers, key=lambda number: plans[number].num_steps)
        size = math.ceil(len(numbers) / math.ceil(len(numbers) / most))
        groups.extend(numbers[start : start + size] for start in range(0, len(numbers), size))
    return sorted(groups), list(dict.fromkeys(said))


def execute_stack(plans: Sequence[Plan], *, watch: Watch | None = None, wait: bool = False) -> list[dict[str, Any]]:
    """Train planned runs of one shape as one, each from its latest checkpoint, and return their records in order.

    Raises:
        UserError: a folder holds another run, or is in use.
        RunFailed: runs diverged; the others went on to their ends first.
        Interrupted: a stop was asked for; every run that had not ended has a checkpoint.
    """
    watch = watch or Watch()
    assert len({shape_of(plan) for plan in plans}) == 1
    assert not any(obstacle(plan) for plan in plans)
    plans = [with_base(plan, watch) if plan.base is not None else plan for plan in plans]
    with ExitStack() as held:
        for plan in sorted(plans, key=lambda plan: plan.folder):
            held.enter_context(only_group(plan.group, plan.folder, wait=wait))
        found = _train_fitting(list(plans), watch)
    ordered = [found[plan.folder] for plan in plans]
    diverged = [plan.folder / records.RECORD for plan in plans if found[plan.folder]["status"] == "diverged"]
    if diverged:
        raise RunFailed(f"{len(diverged)} of {len(plans)} runs diverged: {', '.join(map(str, diverged))}")
    return ordered


def _train_fitting(plans: list[Plan], watch: Watch) -> dict[Path, dict[str, Any]]:
    """Train runs to their ends, half of them at a time where all are too much for the memory; their records by folder."""
    found: dict[Path, dict[str, Any]] = {}
    todo: list[tuple[Plan, Checkpoint | None]] = []
    for plan in plans:
        record, latest = look_into(plan, None, watch)
        if record is None:
            todo.append((plan, latest))
        else:
            watch.say(f"This run is done already: {plan.folder / records.RECORD}")
            found[plan.folder] = record
    if not todo:
        return found
    try:
        return found | _train(todo, watch)
    except OutOfMemory as error:
        if len(todo) == 1:
            raise
        watch.say(f"{error} Training {math.ceil(len(todo) / 2)} runs as one instead of {len(todo)}.")
    left = [plan for plan, _ in todo]
    middle = math.ceil(len(left) / 2)
    for half in (left[:middle], left[middle:]):
        found |= _train_fitting(half, watch)
    return found


def _train(todo: list[tuple[Plan, Checkpoint | None]], watch: Watch) -> dict[Path, dict[str, Any]]:
    """Train runs to their ends; the record of each is written as it ends."""
    first = todo[0][0]
    stack = load_backend(first.backend).stack(trainer_spec(first), [plan.config.seed for plan, _ in todo])
    for note in stack.members[0].notes:
        watch.say(note)
    watch.say(f"{len(todo)} runs are trained as one.")
    runs = [
        prepare_run(start_trainer(plan, member, watch), latest, member, watch)
        for (plan, latest), member in zip(todo, stack.members, strict=True)
    ]
    plan_of = {run.folder: (plan, member) for run, (plan, _), member in zip(runs, todo, stack.members, strict=True)}
    written: dict[Path, dict[str, Any]] = {}

    def ended(run: RunState) -> None:
        if run.status != "interrupted":
            plan, member = plan_of[run.folder]
            written[plan.folder] = finish_run(plan, run, member, stack_size=len(todo))

    drive(stack, runs, interrupted=watch.interrupted, ended=ended)
    if any(run.status == "interrupted" for run in runs):
        steps = ", ".join(f"{run.step:,}" for run in runs if run.status == "interrupted")
        raise Interrupted(f"interrupted at step {steps}; the same command goes on from there", signal=watch.interrupted() or 2)
    return written


def _host_memory_bytes() -> int | None:
    """What the operating system could still give; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines}
    return int(sizes["MemAvailable"]) * 1024 if "MemAvailable" in sizes else None
