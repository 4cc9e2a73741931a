"""The only training loop. It drives runs over a trainer's verbs and knows no framework.

Each run has its own schedule, data, stop rules, history, checkpoints and outcome. The host reads losses at report steps only;
everything that is decided from them (stop rules, divergence) is decided there or at evaluations, so it is the same on every rank.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from mlx_forget import checkpoint
from mlx_forget.evaluate import Windows, compare_with_start, window_losses
from mlx_forget.history import HistoryWriter
from mlx_forget.ladder import ModelSpec
from mlx_forget.methods import SOURCE_TARGET, TERM_TASK
from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.records import HISTORY
from mlx_forget.schedule import Schedule
from mlx_forget.trainer import Stack, StepResult, Trainer
from mlx_forget.training.stop_rules import Rule, Stop, StopRules

Status = Literal["finished", "stopped", "diverged", "interrupted"]


@dataclass(frozen=True)
class Cadence:
    """Steps between reports, evaluations and checkpoints; evaluations also happen at step 0 and at the last step."""

    report: int
    evaluate: int
    save: int


@dataclass(frozen=True)
class Report:
    """The state of a run at a report step, for whoever watches."""

    step: int
    num_steps: int
    tokens: int
    batch_loss: float
    tokens_per_second: float
    seconds_left: float


class Observer(Protocol):
    """Whoever watches a run: a progress bar, a progress file, nobody."""

    def on_report(self, report: Report) -> None: ...

    def on_evaluation(self, row: dict[str, Any]) -> None: ...


@dataclass
class RunState:
    """One run: what it was given, and where it is.

    Args:
        folder: the run's directory.
        model, tokenizer: written into checkpoints.
        schedule: learning rate by step.
        stream: batches by step.
        target_train, target_val, pretrain_val: frozen windows; `pretrain_val` None measures no forgetting. A pretraining run
            passes the same object as target_val and pretrain_val.
        compares_with_start: read the pretraining windows against the trainer's reference, the start model, at every evaluation.
        identity: written into every checkpoint, such as the run's id.
    """

    folder: Path
    model: ModelSpec | PretrainedSpec
    tokenizer: Path
    schedule: Schedule
    stream: BatchStream
    target_train: Windows
    target_val: Windows
    pretrain_val: Windows | None
    cadence: Cadence
    stop: StopRules
    observer: Observer
    compares_with_start: bool = False
    identity: dict[str, Any] = field(default_factory=dict)

    step: int = 0
    start: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)
    num_skipped: int = 0
    evaluations_since_best: int = 0
    elapsed_seconds: float = 0.0
    num_resumes: int = 0
    interval_sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    status: Status | None = None
    reason: str = ""
    stopped_by: Rule | None = None

    _pending: list[StepResult] = field(default_factory=list)
    _history: HistoryWriter | None = None
    _clock: float = 0.0
    _grad_norm: float = math.nan
    _rate: float = math.nan
    _rate_mark: tuple[int, float] = (0, 0.0)

    @property
    def tokens_per_step(self) -> int:
        return self.stream.batch_size * self.stream.target.row_length

    @property
    def history(self) -> HistoryWriter:
        assert self._history is not None
        return self._history

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from the state that a checkpoint carries."""
        self.step = state["step"]
        self.start, self.best, self.last = state["start"], state["best"], state["last"]
        self.curve = [(point[0], point[1]) for point in state["curve"]]
        self.num_skipped = state["num_skipped"]
        self.evaluations_since_best = state["evaluations_since_best"]
        self.elapsed_seconds = state["elapsed_seconds"]
        self.num_resumes = state["num_resumes"] + 1
        self.interval_sums = np.array(state["interval_sums"])
        self._grad_norm = state["grad_norm"]
        # Of a run that had ended, and was killed before its record stood.
        self.status, self.reason, self.stopped_by = state.get("status"), state.get("reason", ""), state.get("stopped_by")

    def checkpoint_state(self) -> dict[str, Any]:
        """What `resume` needs."""
        return {
            **self.identity,
            "step": self.step,
            "start": self.start,
            "best": self.best,
            "last": self.last,
            "curve": self.curve,
            "num_skipped": self.num_skipped,
            "evaluations_since_best": self.evaluations_since_best,
            "elapsed_seconds": self.elapsed_seconds,
            "num_resumes": self.num_resumes,
            "interval_sums": self.interval_sums.tolist(),
            "grad_norm": self._grad_norm,
            "peak_learning_rate": self.schedule.peak,
            "status": self.status,
            "reason": self.reason,
            "stopped_by": self.stopped_by,
        }


def drive(
    trainer: Trainer | Stack,
    runs: Sequence[RunState],
    *,
    interrupted: Callable[[], int | None] = lambda: None,
    ended: Callable[[RunState], None] = lambda run: None,
) -> None:
    """Train every run to its end, or until `interrupted` names a signal; each then has its `status` and `reason`.

    An interrupted run has a checkpoint at the step it reached. A diverged one keeps its last good checkpoint. A trainer drives one run, a
    stack as many as it has members; `ended` is called with each run as it ends, while the others go on.
    """
    members = trainer.members if isinstance(trainer, Stack) else [trainer]
    for run, member in zip(runs, members, strict=True):
        _open(run, member)
        if run.status is not None:
            ended(run)
    try:
        while any(run.status is None for run in runs):
            for stepped, member in zip(_train_step(trainer, runs), members, strict=True):
                if stepped is not None:
                    _after_step(stepped, member, interrupted)
                    if stepped.status is not None:
                        ended(stepped)
    finally:
        for run in runs:
            if run._history is not None:
                run._history.close()


def _open(run: RunState, trainer: Trainer) -> None:
    if trainer.group.rank == 0:
        run._history = HistoryWriter(run.folder / HISTORY, keep_through=run.step if run.start is not None else None)
    run._clock = time.perf_counter()
    run._rate_mark = (run.step, run._clock)
    if run.start is None:
        _evaluate(run, trainer)
        _save(run, trainer)
    if run.status is None and run.step >= run.stop.num_steps:
        _end(run, trainer, "finished", f"all {run.step:,} steps done")


def _train_step(trainer: Trainer | Stack, runs: Sequence[RunState]) -> list[RunState | None]:
    """One step of every run that has not ended; returns those, with None in the place of the others."""
    active = [run if run.status is None else None for run in runs]
    # A run that has ended still fills its place in the call.
    steps = [min(run.step, run.stop.num_steps - 1) for run in runs]
    rates = [run.schedule(step) for run, step in zip(runs, steps, strict=True)]
    if isinstance(trainer, Stack):
        batches = [run.stream.batch(step) for run, step in zip(runs, steps, strict=True)]
        results = trainer.train_step(batches, rates, [run is not None for run in active])
    else:
        batch = runs[0].stream.batch(steps[0], rank=trainer.group.rank, world_size=trainer.group.size)
        results = [trainer.train_step(batch, rates[0])]
    for run, result in zip(active, results, strict=True):
        if run is not None:
            run._pending.append(result)
            run.step += 1
    return active


def _after_step(run: RunState, trainer: Trainer, interrupted: Callable[[], int | None]) -> None:
    last = run.step >= run.stop.num_steps
    evaluate = last or run.step % run.cadence.evaluate == 0
    save = last or run.step % run.cadence.save == 0
    due = evaluate or save or run.step % run.cadence.report == 0
    stop_now = bool(interrupted())
    if not due and (trainer.group.size > 1 or not stop_now):
        return
    over_time = run.stop.max_seconds is not None and _elapsed(run) > run.stop.max_seconds
    stop_now, over_time = trainer.group.agree(stop_now, over_time)
    _report(run)
    if run.num_skipped > run.stop.max_skipped:
        run.status, run.reason = "diverged", f"{run.num_skipped} updates were not finite by step {run.step:,}"
        run.elapsed_seconds = _elapsed(run)
        return
    ended = _evaluate(run, trainer) if evaluate else None
    if ended is not None and not last:
        _end(run, trainer, "stopped", ended.reason, ended.rule)
    elif last:
        _end(run, trainer, "finished", f"all {run.step:,} steps done")
    elif over_time:
        if not evaluate:
            _evaluate(run, trainer)
        _end(run, trainer, "stopped", "the time limit was reached", "time")
    elif stop_now:
        _save(run, trainer)
        run.status, run.reason = "interrupted", f"interrupted at step {run.step:,}"
    elif save:
        _save(run, trainer)


def _report(run: RunState) -> None:
    """Read what the device has done since the last report."""
    for result in run._pending:
        reading = result.read()
        run._grad_norm = reading.grad_norm
        run.num_skipped += reading.skipped
        if not reading.skipped:
            target = (reading.loss_sums[TERM_TASK, SOURCE_TARGET], reading.counts[TERM_TASK, SOURCE_TARGET])
            run.interval_sums += target
    run._pending.clear()
    now = time.perf_counter()
    steps, seconds = run.step - run._rate_mark[0], now - run._rate_mark[1]
    if steps and seconds > 0:
        run._rate = steps * run.tokens_per_step / seconds
        run._rate_mark = (run.step, now)
    left = (run.stop.num_steps - run.step) * run.tokens_per_step / run._rate if run._rate else math.nan
    run.observer.on_report(
        Report(
            step=run.step,
            num_steps=run.stop.num_steps,
            tokens=run.step * run.tokens_per_step,
            batch_loss=float(run.interval_sums[0] / run.interval_sums[1]) if run.interval_sums[1] else math.nan,
            tokens_per_second=run._rate,
            seconds_left=left,
        )
    )


def _evaluate(run: RunState, trainer: Trainer) -> Stop | None:
    """Read all losses, extend the history, keep the best; returns why the run should stop, if it should."""
    target_val = window_losses(trainer, run.target_val)
    if run.pretrain_val is None:
        pretrain_val = None
    elif run.pretrain_val is run.target_val:
        pretrain_val = target_val
    else:
        pretrain_val = window_losses(trainer, run.pretrain_val)
    target_tokens, pretrain_tokens = run.stream.tokens_before(run.step)
    row = {
        "step": run.step,
        "tokens": target_tokens + pretrain_tokens,
        "pretrain_tokens": pretrain_tokens,
        "learning_rate": run.schedule(max(0, run.step - 1)),
        "batch_loss": float(run.interval_sums[0] / run.interval_sums[1]) if run.interval_sums[1] else None,
        "target_train_loss": float(window_losses(trainer, run.target_train).mean()),
        "target_val_loss": float(target_val.mean()),
        "pretrain_val_loss": None if pretrain_val is None else float(pretrain_val.mean()),
        "target_val_windows": target_val.tolist(),
        "pretrain_val_windows": None if pretrain_val is None else pretrain_val.tolist(),
        "grad_norm": None if math.isnan(run._grad_norm) else run._grad_norm,
        "num_skipped": run.num_skipped,
        "tokens_per_second": None if math.isnan(run._rate) else run._rate,
        "wall_seconds": _elapsed(run),
    }
    run.interval_sums = np.zeros(2)
    against_start: dict[str, float] = {}
    if run.compares_with_start and run.pretrain_val is not None:
        against_start = compare_with_start(trainer, run.pretrain_val)
    row |= against_start
    if trainer.group.rank == 0:
        run.history.append(row)
    losses = {
        "step": run.step,
        "target_train": row["target_train_loss"],
        "target_val": row["target_val_loss"],
        "pretrain_val": row["pretrain_val_loss"],
        **against_start,
    }
    run.last = losses
    if run.start is None:
        run.start = losses
    if losses["pretrain_val"] is not None:
        run.curve.append((row["tokens"], losses["pretrain_val"]))
    forgetting = _forgetting(run, losses)
    if not run.stop.is_too_much(forgetting) and (run.best is None or losses["target_val"] < run.best["target_val"]):
        run.best = losses
        run.evaluations_since_best = 0
        with trainer.gathered(with_training_state=False):
            if trainer.group.rank == 0:
                folder = run.folder / "checkpoints" / "best"
                checkpoint.save_checkpoint(
                    folder, trainer, run.model, run.tokenizer, run.checkpoint_state(), with_training_state=False
                )
    else:
        run.evaluations_since_best += 1
    run.observer.on_evaluation({**row, "best": run.best, "forgetting_nats": forgetting})
    run._rate_mark = (run.step, time.perf_counter())
    return run.stop.met(losses["target_val"], forgetting, run.evaluations_since_best)


def _forgetting(run: RunState, losses: dict[str, Any]) -> float | None:
    """The rise of the pretraining loss since the start; None where that loss is not read, or is what is being learnt."""
    assert run.start is not None
    if run.pretrain_val is None or run.pretrain_val is run.target_val:
        return None
    return float(losses["pretrain_val"] - run.start["pretrain_val"])


def _end(run: RunState, trainer: Trainer, status: Status, reason: str, stopped_by: Rule | None = None) -> None:
    # With the last checkpoint, so that a run that is killed before its record stands does not train on.
    run.status, run.reason, run.stopped_by = status, reason, stopped_by
    _save(run, trainer)


def _save(run: RunState, trainer: Trainer) -> None:
    run.elapsed_seconds, run._clock = _elapsed(run), time.perf_counter()
    with trainer.gathered(with_training_state=True):
        if trainer.group.rank == 0:
            folder = run.folder / "checkpoints"
            checkpoint.save_checkpoint(
                folder / "last",
                trainer,
                run.model,
                run.tokenizer,
                run.checkpoint_state(),
                with_training_state=True,
            )
    trainer.group.barrier()
    run._rate_mark = (run.step, time.perf_counter())


def _elapsed(run: RunState) -> float:
    return run.elapsed_seconds + time.perf_counter() - run._clock
