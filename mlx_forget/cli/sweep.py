"""`forget sweep`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.cli import completion
from mlx_forget.cli.answers import propose, works_in
from mlx_forget.cli.sweep_runs import on_this_machine, report, train_runs

if TYPE_CHECKING:
    from mlx_forget.costs import Device
    from mlx_forget.sweeps.grid import Recipe, Resources
    from mlx_forget.sweeps.stacking import Wanted

app = typer.Typer()


@app.command()
def sweep(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or the name of one that comes with mlx-forget.", autocompletion=completion.recipes)
    ],
    output: Annotated[Path | None, typer.Option(help="Sweep folder; several sweeps may share one. \\[default: runs/NAME]")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE over the recipe; KEY=[A, B] makes a grid axis; base.KEY reaches the base model.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="processes, in-process, ray or slurm: where runs are trained. \\[default: processes]",
            autocompletion=completion.engines,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "--jobs", min=1, help="Runs side by side. \\[default: one a core, or a GPU; all of a cluster]"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads a run. \\[default: the cores shared out; 1 on a cluster]")
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(help="GPUs a run: several are one process each under torchrun. \\[default: one, where there are any]"),
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Processes a run. \\[default: one a GPU]")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Memory that a cluster sets aside for a run.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster that runs already: HOST:PORT or auto. \\[default: RAY_ADDRESS, else a local one]"),
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for submitit, as partition=gpu or timeout_min=600; cluster=local tries it without Slurm."),
    ] = None,
    stack: Annotated[
        str | None, typer.Option(help="Train this many runs of one shape as one; off, or auto: where it pays. \\[default: auto]")
    ] = None,
    log_to: Annotated[
        str | None,
        typer.Option(
            help="Write the losses of every run for tensorboard or wandb (offline) too, into its folder.",
            autocompletion=completion.sinks,
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Train what failed before once more.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every run and its cost; prepare nothing, train nothing.")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: the device to assume for the hours, such as h100. \\[default: as finished runs were]",
            autocompletion=completion.devices,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Train a grid of runs from a recipe. Done runs are skipped, begun ones resume, failed ones are listed.

    Example: forget sweep figure1 --set seed=1 --output runs/figure1-seed1
    """
    from rich.console import Console

    from mlx_forget.cli.signals import graceful_stop
    from mlx_forget.config import scale_defaults
    from mlx_forget.costs import device_named
    from mlx_forget.engines import Demand
    from mlx_forget.errors import UserError
    from mlx_forget.progress import Preparation
    from mlx_forget.resources import recipe as find_recipe
    from mlx_forget.sweeps.costs import NotPreparedError, check_disk, disk_by_place, only_if_prepared, planned_rows, speed_of
    from mlx_forget.sweeps.dispatch import look_back, unfinished_strangers
    from mlx_forget.sweeps.grid import Resources, read_recipe
    from mlx_forget.sweeps.sweep import plan_sweep, stack_sweep
    from mlx_forget.training.plan import Target
    from mlx_forget.training.watch import Watch

    console = Console(stderr=True)

    def say(sentence: str) -> None:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)

    if on is not None and not dry_run:
        raise UserError("--on is for --dry-run: add it, or leave --on out.")
    device = None if on is None else device_named(on)
    name = engine or "processes"
    read = read_recipe(find_recipe(recipe))
    folder = output or Path("runs") / read.name
    works_in(folder)
    watch = Watch(say=say, progress=Preparation(console))
    overrides = _parse(settings or []) | ({} if log_to is None else {"log_to": log_to})
    wanted = _wanted(stack)
    demand = Demand(
        folder=folder,
        workers=workers,
        resources=Resources(threads=threads, gpus=gpus, ranks=ranks, memory_gb=memory_gb),
        address=address,
        settings=_pairs("--slurm", slurm or []),
        say=say,
    )
    if scale_defaults():
        say("FORGET_SCALE=smoke: the recipe's test in seconds, whose numbers mean nothing.")
    if read.stages:
        from mlx_forget.cli.stages import sweep_stages

        how: dict[str, Any] = {
            "wanted": wanted,
            "retry_failed": retry_failed,
            "dry_run": dry_run,
            "device": device,
            "as_json": as_json,
        }
        sweep_stages(read, overrides, name, demand, watch, console, **how)
        return
    try:
        # A login node need not hold what the machines of a cluster will.
        target = Target(device=device, must_fit=name in ("processes", "in-process"))
        quiet = only_if_prepared(watch) if dry_run else watch
        planned = plan_sweep(read, folder, overrides=overrides, resources=demand.resources, target=target, watch=quiet)
    except NotPreparedError as reason:
        note = f"Not prepared yet: {reason}."
        asked = demand.resources
        _print_outline(read, folder, overrides, device, note, resources=asked, workers=workers or 1, as_json=as_json)
        return
    demand = on_this_machine(demand, name, planned.jobs[0].plan, [job.resources for job in planned.jobs])
    side_by_side = demand.workers or 1
    planned = stack_sweep(planned, wanted, num_processes=side_by_side)
    for job in (*planned.bases, *planned.jobs):
        look_back(job, retry=False)
    bases = sorted({base.plan.folder.parent for base in planned.bases})
    rows = planned_rows(planned, speed_of(planned.jobs[0].plan.backend, [folder, *bases], device))
    needs = disk_by_place(rows, workers=side_by_side)
    if dry_run:
        from mlx_forget.cli.sweep_view import print_plan

        stacks = [[job.plan.run_id for job in together] for together in planned.stacks if len(together) > 1]
        disk_bytes = sum(needs.values())
        print_plan(str(folder), rows, stacks, planned.notes, workers=side_by_side, disk_bytes=disk_bytes, as_json=as_json)
    for place, needed in needs.items():
        check_disk(place, needed)
    if dry_run:
        return
    if stack is not None or demand.uses_gpu:
        for note in planned.notes:
            say(note)
    strangers = unfinished_strangers(planned)
    if strangers:
        say(f"Left alone, unfinished runs that are not of this sweep: {', '.join(path.name for path in strangers)}")
    with graceful_stop(say) as interrupted:
        watch = dataclasses.replace(watch, interrupted=interrupted)
        done = train_runs(name, demand, planned, watch, console, retry_failed=retry_failed)
    report(folder, done, say, as_json=as_json)
    propose("report", folder)


def _print_outline(
    recipe: "Recipe",
    folder: Path,
    overrides: dict[str, Any],
    device: "Device | None",
    note: str,
    *,
    resources: "Resources",
    workers: int,
    as_json: bool,
) -> None:
    """The dry run of a sweep whose data are not all prepared."""
    from mlx_forget.backends import choose_backend
    from mlx_forget.cli.sweep_view import print_plan
    from mlx_forget.sweeps.costs import disk_needed, outlined_rows, speed_of
    from mlx_forget.sweeps.sweep import titled_runs

    configs = recipe.configs(overrides)
    backend = configs[0].backend if configs[0].backend != "auto" else choose_backend()[0]
    rows = outlined_rows(titled_runs(recipe, overrides), backend, speed_of(backend, [folder], device), resources=resources)
    notes = [f"{note} Ids are pending where they depend on it, and so is what stacks."]
    print_plan(str(folder), rows, [], notes, workers=workers, disk_bytes=disk_needed(rows, workers=workers), as_json=as_json)


def _parse(settings: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` settings; values are YAML."""
    import yaml

    from mlx_forget.errors import UserError

    values: dict[str, Any] = {}
    for key, text in _pairs("--set", settings).items():
        try:
            values[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UserError(f"--set {key}={text}: the value is not valid YAML.") from None
    return values


def _pairs(option: str, settings: list[str]) -> dict[str, str]:
    from mlx_forget.errors import UserError

    pairs: dict[str, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"{option} takes KEY=VALUE, not {setting!r}.")
        pairs[key] = text
    return pairs


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
