"""What a person sees of a sweep: a live table on a terminal, lines elsewhere, and the plan before anything is spent."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from mlx_forget.cli.answers import emit
from mlx_forget.progress import duration
from mlx_forget.sweeps.costs import hours_text, size_text
from mlx_forget.sweeps.dispatch import states
from mlx_forget.sweeps.sweep import Job

_SHOWN_FIRST = ("running", "failed", "elsewhere", "queued", "blocked", "interrupted", "waiting", "done")


class SweepView:
    """Shows the jobs of a sweep; what is left is judged by the FLOPs that were done since it began to watch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[str, str]] = {}
        self._flops: dict[str, float] = {}
        # When it began to watch, and the FLOPs that were done by then.
        self._began: tuple[float, float] | None = None

    def seconds_left(self, jobs: Sequence[Job]) -> float | None:
        """What is left at the rate so far; None before anything was done."""
        if not jobs:
            return None
        done, left = 0.0, 0.0
        for job in jobs:
            if job.state in ("failed", "blocked"):
                continue
            if job.plan.run_id not in self._flops:
                self._flops[job.plan.run_id] = float(job.plan.summary()["train_flops"])
            flops = self._flops[job.plan.run_id]
            share = 1.0 if job.state == "done" else min(1.0, job.progress.get("step", 0) / job.plan.num_steps)
            done += share * flops
            left += (1 - share) * flops
        now = time.monotonic()
        if self._began is None:
            self._began = (now, done)
        seconds, worked = now - self._began[0], done - self._began[1]
        return seconds * left / worked if worked > 0 and seconds > 0 else None

    def summary(self, jobs: Sequence[Job]) -> str:
        """One line: how many runs stand where, and the time left."""
        counts = states(jobs)
        left = self.seconds_left(jobs)
        parts = [f"{counts[state]} {state}" for state in ("done", *_SHOWN_FIRST) if state in counts]
        parts = list(dict.fromkeys(parts))
        if left and any(state in counts for state in ("running", "queued", "waiting")):
            parts.append(f"{duration(left)} left")
        return f"{len(jobs)} runs: {' · '.join(parts)}"

    def table(self, jobs: Sequence[Job]) -> Any:
        """The runs under way and those that failed first, as many as the terminal has room for."""
        table = Table(box=None)
        for name in ("run", "state", "step", "tokens/s", "left", "losses (nats)"):
            table.add_column(name, no_wrap=name != "losses (nats)")
        room = max(5, self._console.height - 4)
        ordered = list(jobs)
        if len(jobs) > room:
            ordered = sorted(jobs, key=lambda job: _SHOWN_FIRST.index(job.state))[:room]
        for job in ordered:
            p = job.progress
            step = f"{p['step']:,}/{p['num_steps']:,}" if p else ""
            rate, left = ("", "")
            if p and job.state == "running":
                rate, left = f"{p['tokens_per_second']:,.0f}", duration(p["seconds_left"])
            table.add_row(job.title, job.state, step, rate, left, job.reason or p.get("losses", ""))
        return Group(table, self.summary(jobs))

    def lines(self, jobs: Sequence[Job]) -> None:
        """A line for every change."""
        for job in jobs:
            now = (job.state, job.progress.get("losses", ""))
            if job.state in ("waiting", "queued") or now == self._shown.get(job.plan.run_id):
                continue
            self._shown[job.plan.run_id] = now
            step = f" · step {job.progress['step']:,}/{job.progress['num_steps']:,} · {now[1]}" if job.progress else ""
            reason = f" · {job.reason}" if job.reason else ""
            self._console.print(f"{job.title} · {job.state}{step}{reason}", highlight=False, soft_wrap=True, markup=False)


def print_plan(
    folder: str,
    rows: Sequence[Mapping[str, Any]],
    stacks: Sequence[Sequence[str]],
    notes: Sequence[str],
    *,
    workers: int,
    disk_bytes: int,
    as_json: bool,
) -> None:
    """Every run with its cost, and the sums."""
    known = [row["hours"] for row in rows if row["hours"] is not None and row["state"] != "done"]
    hours = sum(known) if len(known) == sum(row["state"] != "done" for row in rows) else None
    totals = {
        "num_runs": len(rows),
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "train_flops": sum(row["train_flops"] for row in rows),
        "hours": hours,
        "wall_hours": None if hours is None else hours / workers,
        "disk_bytes": disk_bytes,
    }
    if as_json:
        emit({"folder": folder, "runs": list(rows), "stacks": stacks, "notes": notes, "totals": totals})
        return
    width = max(24, *(len(row["title"]) for row in rows))
    for row in rows:
        state = "" if row["state"] == "waiting" else f"  {row['state']}"
        if row["num_gpus"]:
            state = f" on {row['num_gpus']:g} GPU{'s' if row['num_gpus'] > 1 else ''}{state}"
        print(
            f"{row['run_id'] or 'pending':<12}  {row['title']:<{width}} {row['num_params']:>13,} parameters {row['num_steps']:>7,} steps "
            f"{row['num_tokens']:>13,} tokens {row['train_flops']:.2e} FLOPs {hours_text(row['hours']):>9} "
            f"{size_text(row['kept_disk_bytes']):>8}{state}"
        )
    times = f"{hours_text(hours)} of training, {hours_text(totals['wall_hours'])} with {workers} at a time"
    print(
        f"{len(rows)} runs, {totals['num_tokens']:,} tokens, {totals['train_flops']:.2e} FLOPs, "
        f"{'hours unknown until a run is done (or --on DEVICE)' if hours is None else times}, {size_text(disk_bytes)} of disk"
    )
    early = [row for row in rows if row["may_stop"] and row["state"] != "done"]
    if early:
        rules = dict.fromkeys(rule for row in early for rule in row["may_stop"])
        print(f"At most: {len(early)} of the runs may end before their last step ({', '.join(rules)}).")
    for run_ids in stacks:
        print(f"trained as one: {', '.join(run_ids)}")
    for note in notes:
        print(note)
