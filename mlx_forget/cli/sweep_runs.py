"""What `forget sweep` does with planned runs, with stages or without: where they are trained, what is shown, and how they ended."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_forget.cli.answers import emit, works_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console

    from mlx_forget.engines import Demand
    from mlx_forget.sweeps.grid import Resources
    from mlx_forget.sweeps.sweep import Job, Sweep
    from mlx_forget.training.plan import Plan
    from mlx_forget.training.watch import Watch

_FAILURES_SHOWN = 20


def on_this_machine(demand: "Demand", name: str, plan: "Plan", runs: "Sequence[Resources]") -> "Demand":
    """A demand with what the backend says of this machine, and how many runs a pool of processes trains side by side.

    Args:
        runs: what each run asks for.
    """
    from mlx_forget.backends import load_backend
    from mlx_forget.engines.processes import num_workers

    capabilities = load_backend(plan.backend).describe()
    demand = dataclasses.replace(
        demand,
        uses_gpu=plan.config.device != "cpu" and capabilities.accelerator,
        # A run that insists on a device of its own is not confined to another.
        gpus=capabilities.gpus if plan.config.device is None else (),
        gpu_variable=capabilities.gpu_variable,
    )
    if name != "processes" or demand.workers is not None:
        return demand
    smallest = min(runs, key=lambda asked: asked.gpus or 0)
    return dataclasses.replace(demand, workers=min(num_workers(demand, smallest), len(runs)))


def train_runs(
    name: str, demand: "Demand", planned: "Sweep", watch: "Watch", console: "Console", *, retry_failed: bool
) -> "list[Job]":
    """Train the runs of a sweep on an engine, shown as a live table on a terminal and in lines elsewhere."""
    from rich.live import Live

    from mlx_forget.cli.sweep_view import SweepView
    from mlx_forget.engines import open_engine
    from mlx_forget.progress import RunProgress
    from mlx_forget.sweeps.dispatch import execute_sweep

    view = SweepView(console)

    def observer(title: str, folder: Path) -> RunProgress:
        return RunProgress(console, title, folder)

    watch = dataclasses.replace(watch, observer=observer)
    works_in(planned.folder, lambda: {"runs": job_rows([*planned.bases, *planned.jobs])})
    engine = open_engine(name, demand, watch)
    if engine.speaks or not console.is_terminal:
        return execute_sweep(planned, engine, retry_failed=retry_failed, on_change=view.lines, watch=watch)
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        return execute_sweep(
            planned, engine, retry_failed=retry_failed, on_change=lambda jobs: live.update(view.table(jobs)), watch=watch
        )


def job_rows(jobs: "Iterable[Job]") -> list[dict[str, Any]]:
    """Where the runs of a sweep stand, for --json."""
    return [
        {
            "run_id": job.plan.run_id,
            "title": job.title,
            "state": job.state,
            "reason": job.reason,
            "folder": str(job.plan.folder),
        }
        for job in jobs
    ]


def report(folder: Path, done: "list[Job]", say: "Callable[[str], None]", *, as_json: bool, **more: Any) -> None:
    """Say how the runs of a sweep ended.

    Raises:
        RunFailed: runs failed, now or before.
    """
    from mlx_forget.errors import RunFailed

    if as_json:
        emit({"folder": str(folder), "runs": job_rows(done), **more})
    failed = [job for job in done if job.state == "failed"]
    blocked = sum(job.state == "blocked" for job in done)
    say(f"{sum(job.state == 'done' for job in done)} of {len(done)} runs done: {folder}")
    for job in failed[:_FAILURES_SHOWN]:
        say(f"Failed: {job.title}: {job.reason} ({job.log})")
    if failed:
        others = f" and keep {blocked} from starting" if blocked else ""
        raise RunFailed(f"{len(failed)} of {len(done)} runs failed{others}; --retry-failed trains them once more.")
