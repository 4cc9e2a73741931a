"""What the loop reports, passed on to TensorBoard or Weights & Biases beside the history that every run keeps.

Both write into the run's own folder and need no network: W&B is offline unless `WANDB_MODE` says otherwise, and `wandb sync` sends it later.
"""

import importlib.util
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_forget.errors import UserError, unknown
from mlx_forget.training.loop import Observer, Report

# The names of modules, and of the extras that bring them.
SINKS = ("tensorboard", "wandb")
PROJECT = "mlx-forget"

# Names of what an evaluation reads; losses in nats per token.
_EVALUATION = {
    "target_val_loss": "loss/target_validation",
    "target_train_loss": "loss/target_train",
    "pretrain_val_loss": "loss/pretraining_validation",
    "forgetting_nats": "forgetting_nats",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "num_skipped": "num_skipped",
}


class Sink(Protocol):
    """Where scalars go."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of one step, by name; steps rise."""


def check_sink(name: str | None) -> None:
    """Refuse a sink that this installation cannot write to.

    Raises:
        UserError: unknown, or not installed.
    """
    if name is None:
        return
    if name not in SINKS:
        raise unknown("log_to", name, SINKS)
    if importlib.util.find_spec(name) is None:
        raise UserError(f"--log-to {name} needs {name}, which is not installed: pip install 'mlx-forget[{name}]'")


def tracked(
    observer: Observer, name: str | None, folder: Path, *, run_id: str, title: str, config: Mapping[str, Any], step: int
) -> Observer:
    """The observer, and a sink beside it where one is asked for.

    Args:
        folder: of the run; the sink's files lie below it.
        step: that the run goes on from.
    """
    if name is None:
        return observer
    check_sink(name)
    sink: Sink
    if name == "tensorboard":
        sink = TensorBoard(folder / "tensorboard", step=step)
    else:
        sink = WeightsAndBiases(folder, run_id=run_id, title=title, config=config)
    return Tracked([observer], sink)


class Tracked(Observer):
    """Passes what is observed on to others, and its numbers to a sink."""

    def __init__(self, others: Sequence[Observer], sink: Sink) -> None:
        self._others, self._sink = others, sink

    def on_report(self, report: Report) -> None:
        for other in self._others:
            other.on_report(report)
        self._write(report.step, {"loss/batch": report.batch_loss, "tokens_per_second": report.tokens_per_second})

    def on_evaluation(self, row: dict[str, Any]) -> None:
        for other in self._others:
            other.on_evaluation(row)
        self._write(row["step"], {name: row.get(column) for column, name in _EVALUATION.items()})

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        finite = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        if finite:
            self._sink.write(step, finite)


class TensorBoard:
    """An event file; TensorBoard drops what an interrupted run had written beyond the step that it goes on from."""

    def __init__(self, folder: Path, *, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = Event
        self._writer = EventFileWriter(str(folder))
        if step:
            self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()


class WeightsAndBiases:
    """A W&B run of the same id, in the run's folder."""

    def __init__(self, folder: Path, *, run_id: str, title: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=f"{title}, {run_id}",
            id=run_id,
            dir=str(folder),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)
