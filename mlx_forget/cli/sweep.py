"""`forget sweep`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlx_forget.plan import Plan
    from mlx_forget.stacking import Wanted
    from mlx_forget.sweep import Job, Sweep

app = typer.Typer()


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that comes with mlx-forget.")],
    output: Annotated[Path | None, typer.Option(help="Sweep folder. \\[default: runs/NAME]")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE over the recipe; KEY=[A, B] makes a grid axis; base.KEY reaches the base model.",
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side. \\[default: one a core; one on a GPU]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads a run. \\[default: 1, or the cores on a GPU]")] = None,
    stack: Annotated[
        str | None, typer.Option(help="Train this many runs of one shape as one; off, or auto: where it pays. \\[default: auto]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every run and its cost; train nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Train a grid of runs from a recipe. Done runs are skipped, begun ones resume.

    Example: forget sweep figure1 --set seed=1 --output runs/figure1-seed1
    """
    from rich.console import Console

    from mlx_forget.cli.signals import graceful_stop
    from mlx_forget.progress import Preparation
    from mlx_forget.resources import recipe as find_recipe
    from mlx_forget.sweep import default_processes, plan_sweep, read_recipe, stack_sweep
    from mlx_forget.watch import Watch

    console = Console(stderr=True)

    def say(sentence: str) -> None:
        console.print(sentence, highlight=False, soft_wrap=True)

    read = read_recipe(find_recipe(recipe))
    folder = output or Path("runs") / read.name
    watch = Watch(say=say, progress=Preparation(console))
    overrides = _parse(settings or [])
    wanted = _wanted(stack)
    if read.stages:
        from mlx_forget.cli.stages import sweep_stages

        how: dict[str, Any] = {"jobs": jobs, "threads": threads, "wanted": wanted, "dry_run": dry_run, "as_json": as_json}
        sweep_stages(read, folder, overrides, watch, console, **how)
        return
    planned = plan_sweep(read, folder, overrides=overrides, watch=watch)
    on_gpu = uses_gpu(planned.jobs[0].plan)
    num_processes = jobs or (1 if on_gpu else min(default_processes(), len(planned.jobs)))
    planned = stack_sweep(planned, wanted, num_processes=num_processes)
    if dry_run:
        _print_plan(planned, as_json=as_json)
        return
    if stack is not None or on_gpu:
        for note in planned.notes:
            say(note)
    with graceful_stop(say) as interrupted:
        done = train_runs(planned, console, num_processes=num_processes, threads=threads, interrupted=interrupted)
    report(folder, done, say, as_json=as_json)


def train_runs(
    planned: "Sweep", console: Any, *, num_processes: int, threads: int | None, interrupted: Callable[[], int | None]
) -> "list[Job]":
    """Train the runs of a sweep while their state is shown."""
    import os

    from rich.live import Live

    from mlx_forget.sweep import execute_sweep

    watcher = _Watcher(console)
    how: dict[str, Any] = {
        "num_processes": num_processes,
        "num_threads": threads or max(1, (os.cpu_count() or 1) // num_processes),
        "interrupted": interrupted,
    }
    if not console.is_terminal:
        return execute_sweep(planned, on_change=watcher.lines, **how)
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        return execute_sweep(planned, on_change=lambda all_jobs: live.update(watcher.table(all_jobs)), **how)


def report(folder: Path, done: "list[Job]", say: Callable[[str], None], *, as_json: bool, **more: Any) -> None:
    """Say how the runs of a sweep ended.

    Raises:
        RunFailed: one did not end well.
    """
    from mlx_forget.errors import RunFailed

    runs = [{"run_id": job.plan.run_id, "title": job.title, "state": job.state, "folder": str(job.plan.folder)} for job in done]
    if as_json:
        print(json.dumps({"folder": str(folder), "runs": runs, **more}))
    failed = [job for job in done if job.state == "failed"]
    say(f"{sum(job.state == 'done' for job in done)} of {len(done)} runs done: {folder}")
    if failed:
        raise RunFailed(f"{failed[0].title} failed; its log ends: {_last_line(failed[0].log)} ({failed[0].log})")


class _Watcher:
    """Shows the jobs of a sweep: a live table on a terminal, a line for every change elsewhere."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._shown: dict[str, tuple[str, str]] = {}

    def table(self, jobs: "list[Job]") -> Any:
        from rich.table import Table

        from mlx_forget.progress import duration

        table = Table(box=None)
        for name in ("run", "state", "step", "tokens/s", "left", "losses (nats)"):
            table.add_column(name)
        for job in jobs:
            p = job.progress
            step = f"{p['step']:,}/{p['num_steps']:,}" if p else ""
            rate, left = (
                (f"{p['tokens_per_second']:,.0f}", duration(p["seconds_left"])) if p and job.state == "running" else ("", "")
            )
            table.add_row(job.title, job.state, step, rate, left, p.get("losses", ""))
        return table

    def lines(self, jobs: "list[Job]") -> None:
        for job in jobs:
            now = (job.state, job.progress.get("losses", ""))
            if job.state != "waiting" and now != self._shown.get(job.plan.run_id):
                self._shown[job.plan.run_id] = now
                step = f" · step {job.progress['step']:,}/{job.progress['num_steps']:,} · {now[1]}" if job.progress else ""
                self._console.print(f"{job.title} · {job.state}{step}", highlight=False, soft_wrap=True)


def _parse(settings: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` settings; values are YAML, `base.KEY` goes into the mapping `base`."""
    import yaml

    from mlx_forget.errors import UserError

    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set takes KEY=VALUE, not {setting!r}.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {setting}: the value is not valid YAML.") from None
        if key.startswith("base."):
            values.setdefault("base", {})[key.removeprefix("base.")] = value
        else:
            values[key] = value
    return values


def _wanted(stack: str | None) -> "Wanted":
    """`--stack`: auto, off, or a number of runs."""
    from mlx_forget.errors import UserError

    if stack is None or stack == "auto":
        return "auto"
    if stack in ("off", "1"):
        return "off"
    if not stack.isdigit() or int(stack) < 1:
        raise UserError(f"--stack takes auto, off or a number of runs, not {stack!r}.")
    return int(stack)


def uses_gpu(plan: "Plan") -> bool:
    """Whether a run will have an accelerator to itself."""
    from mlx_forget.trainer import load_backend

    return plan.config.device != "cpu" and load_backend(plan.backend).describe().accelerator


def _print_plan(planned: "Sweep", *, as_json: bool) -> None:
    summaries = [{"title": job.title, **job.plan.summary()} for job in (*planned.bases, *planned.jobs)]
    stacks = [[job.plan.run_id for job in together] for together in planned.stacks if len(together) > 1]
    if as_json:
        print(json.dumps({"folder": str(planned.folder), "runs": summaries, "stacks": stacks, "notes": planned.notes}))
        return
    for row in summaries:
        print(
            f"{row['run_id']}  {row['title']:<24} {row['num_params']:>13,} parameters {row['num_steps']:>7,} steps "
            f"{row['num_tokens']:>13,} tokens {row['train_flops']:.2e} FLOPs"
        )
    print(
        f"{len(summaries)} runs, {sum(row['num_tokens'] for row in summaries):,} tokens, {sum(row['train_flops'] for row in summaries):.2e} FLOPs"
    )
    for run_ids in stacks:
        print(f"trained as one: {', '.join(run_ids)}")
    for note in planned.notes:
        print(note)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "(empty)"
