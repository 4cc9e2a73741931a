"""What a person or a supervising process sees of long work: a rich bar on a terminal, plain lines elsewhere, a file for supervisors."""

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mlx_forget.distributed import launched_rank
from mlx_forget.durable_files import read_object
from mlx_forget.training.loop import Report

PROGRESS_FILE = "progress.json"
# Its keys.
_PROGRESS = {"title": str, "step": int, "num_steps": int, "tokens_per_second": float, "seconds_left": float, "losses": str}
# Set by a sweep for the processes it starts: its own process number.
SUPERVISOR = "FORGET_SUPERVISOR"

_SECONDS_BETWEEN_FILES = 0.5
_SECONDS_BETWEEN_LINES = 5.0


def supervisor() -> int | None:
    """The process whose end should end this one: the launcher of several processes, or the sweep that started this one."""
    if launched_rank() is not None:
        return os.getppid()
    number = os.environ.get(SUPERVISOR)
    return None if number is None else int(number)


def console() -> Console:
    """Where a command speaks: standard error; of several processes that a launcher started, rank 0 speaks for all."""
    rank = launched_rank()
    if rank is None:
        return Console(stderr=True)
    return Console(file=cast(IO[str], _LaunchedStderr()), quiet=rank > 0)


class _LaunchedStderr(io.TextIOBase):
    """Standard error of a process that a launcher reads: once the launcher has gone, what is said is dropped, and the run goes on to
    write its checkpoint."""

    def write(self, text: str) -> int:
        self._keep_going(lambda: sys.stderr.write(text))
        return len(text)

    def flush(self) -> None:
        self._keep_going(sys.stderr.flush)

    def _keep_going(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def losses_text(row: dict[str, Any]) -> str:
    """The losses of an evaluation in one line."""
    parts = [f"target {row['target_val_loss']:.4f}"]
    if row["forgetting_nats"] is not None:
        parts.append(f"pretraining {row['pretrain_val_loss']:.4f} ({row['forgetting_nats']:+.4f})")
    if row["best"] is not None and row["best"]["step"] == row["step"] and row["step"]:
        parts.append("best so far")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What a run last wrote about itself; None where it has not, or where that cannot be read."""
    try:
        found = read_object(folder / PROGRESS_FILE)
        return {name: kind(found[name]) for name, kind in _PROGRESS.items()}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


class RunProgress:
    """Watches one run: a bar with tokens/s, time left and losses on a terminal, a line per evaluation, and `progress.json`."""

    def __init__(self, console: Console, title: str, folder: Path) -> None:
        self._console = console
        self._title = title
        self._file = folder / PROGRESS_FILE
        self._losses = ""
        self._last_report: Report | None = None
        self._written = -math.inf
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn(
                    "{task.completed:,}/{task.total:,} steps · {task.fields[rate]} · {task.fields[left]} left · {task.fields[losses]}"
                ),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )

    def on_report(self, report: Report) -> None:
        self._last_report = report
        rate, left = f"{report.tokens_per_second:,.0f} tokens/s", duration(report.seconds_left)
        if self._bar is not None:
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task(self._title, total=report.num_steps, rate=rate, left=left, losses=self._losses)
            self._bar.update(self._task, completed=report.step, rate=rate, left=left, losses=self._losses)
            if report.step >= report.num_steps:
                self.close()
        self._write()

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self._losses = losses_text(row)
        report = self._last_report
        rate = f" · {report.tokens_per_second:,.0f} tokens/s · {duration(report.seconds_left)} left" if report else ""
        line = f"{self._title} · step {row['step']:,} · {self._losses}{rate}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._write(force=True)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _write(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._last_report is None or (not force and now - self._written < _SECONDS_BETWEEN_FILES):
            return
        self._written = now
        report = self._last_report
        content = {
            "title": self._title,
            "step": report.step,
            "num_steps": report.num_steps,
            "tokens_per_second": report.tokens_per_second,
            "seconds_left": report.seconds_left,
            "losses": self._losses,
        }
        aside = self._file.with_name(f".{self._file.name}.part")
        aside.write_text(json.dumps(content), encoding="utf-8")
        os.replace(aside, self._file)


class Preparation:
    """Progress of preparing data: a line when an activity starts, and at most one every few seconds, with the rate and the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._activity = ""
        self._printed = -math.inf
        # When the activity began, and how far it was: what a resumed one found done counts for no rate.
        self._began: tuple[float, float, int] = (0.0, 0.0, 0)

    def __call__(self, activity: str, fraction: float, num_bytes: int = 0) -> None:
        now = time.monotonic()
        if activity != self._activity:
            self._began = (now, fraction, num_bytes)
        if activity != self._activity or now - self._printed > _SECONDS_BETWEEN_LINES:
            if fraction < 1:
                self._console.print(
                    f"{activity}{self._details(now, fraction, num_bytes)}", highlight=False, soft_wrap=True, markup=False
                )
            self._printed, self._activity = now, activity

    def _details(self, now: float, fraction: float, num_bytes: int) -> str:
        seconds, done = now - self._began[0], fraction - self._began[1]
        if not fraction or not done or not seconds:
            return f" ({fraction:.0%})" if fraction else ""
        rate = f"{(num_bytes - self._began[2]) / seconds / 1e6:.1f} MB/s, " if num_bytes else ""
        return f" ({fraction:.0%}, {rate}{duration(seconds * (1 - fraction) / done)} left)"
