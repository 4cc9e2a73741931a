"""`forget sweep` of a recipe with stages."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_forget.cli.sweep_runs import on_this_machine, report, train_runs

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_forget.costs import Device
    from mlx_forget.engines import Demand
    from mlx_forget.sweeps.grid import Recipe
    from mlx_forget.sweeps.stacking import Wanted
    from mlx_forget.sweeps.stages import Chain
    from mlx_forget.sweeps.sweep import Job, Sweep
    from mlx_forget.training.watch import Watch


def sweep_stages(
    recipe: "Recipe",
    overrides: Mapping[str, Any],
    name: str,
    demand: "Demand",
    watch: "Watch",
    console: "Console",
    *,
    wanted: "Wanted",
    retry_failed: bool,
    dry_run: bool,
    device: "Device | None",
    as_json: bool,
) -> None:
    """Train the stages of every chain one after another, and measure every data set after each.

    Args:
        name: of the engine.
        device: to assume for the hours of a dry run.
    """
    from mlx_forget.cli.signals import graceful_stop
    from mlx_forget.studies.loss_matrix import FILE, measure, read_matrices, summary, table_lines, write_matrices
    from mlx_forget.sweeps.costs import check_disk, disk_by_place
    from mlx_forget.sweeps.stages import execute_stages, plan_stages
    from mlx_forget.sweeps.sweep import stack_sweep

    if dry_run:
        _print_plan(recipe, overrides, name, demand, watch, device, as_json=as_json)
        return
    folder = demand.folder
    chains = plan_stages(recipe, overrides=overrides, watch=watch)
    demand = on_this_machine(demand, name, chains[0].plans[0], [chain.resources[0] for chain in chains])
    quiet = dataclasses.replace(watch, say=lambda sentence: None)
    bases, stages, _ = _costs(chains, folder, quiet, device)
    for place, needed in disk_by_place([*bases, *stages], workers=demand.workers or 1).items():
        check_disk(place, needed)
    known = read_matrices(folder / FILE)

    def measured(folders: list[list[Path]]) -> None:
        known[:] = [measure(chain, done, known) for chain, done in zip(chains, folders, strict=True)]
        write_matrices(folder / FILE, recipe.name, known)

    with graceful_stop(watch.say) as interrupted:
        watching = dataclasses.replace(watch, interrupted=interrupted)

        def run(planned: "Sweep") -> "list[Job]":
            planned = stack_sweep(planned, wanted, num_processes=demand.workers or 1)
            return train_runs(name, demand, planned, watching, console, retry_failed=retry_failed)

        done = execute_stages(chains, folder, run=run, done=measured, watch=quiet)
    if known and not as_json:
        print("\n".join(table_lines(known)))
    report(folder, done, watch.say, as_json=as_json, chains=[summary(matrix) for matrix in known])


def _print_plan(
    recipe: "Recipe",
    overrides: Mapping[str, Any],
    name: str,
    demand: "Demand",
    watch: "Watch",
    device: "Device | None",
    *,
    as_json: bool,
) -> None:
    """Every stage of every chain with its cost; nothing is prepared."""
    from mlx_forget.backends import choose_backend
    from mlx_forget.cli.sweep_view import print_plan
    from mlx_forget.sweeps.costs import NotPreparedError, disk_needed, only_if_prepared, outlined_rows, speed_of
    from mlx_forget.sweeps.stages import plan_stages, titled_stages

    folder, later = demand.folder, {"run_id": None, "pending": "the stage before it"}
    # Stages are planned once as a whole and once from where they are.
    said: set[str] = set()

    def say_once(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            say(sentence)

    say, watch = watch.say, dataclasses.replace(watch, say=say_once)
    try:
        chains = plan_stages(recipe, overrides=overrides, watch=only_if_prepared(watch))
        bases, stages, found = _costs(chains, folder, only_if_prepared(watch), device)
    except NotPreparedError as reason:
        titled = titled_stages(recipe, overrides)
        wanted = titled[0][0][0].config.backend
        backend = choose_backend()[0] if wanted == "auto" else wanted
        speed = speed_of(backend, [folder], device)
        numbers = [number + 1 for chain in titled for number in range(len(chain))]
        outlined = outlined_rows([stage for chain in titled for stage in chain], backend, speed, resources=demand.resources)
        num_bases = len(outlined) - len(numbers)
        rows = outlined[:num_bases] + [
            row | {"stage": number} | ({} if number == 1 else later)
            for number, row in zip(numbers, outlined[num_bases:], strict=True)
        ]
        notes = [f"Not prepared yet: {reason}. Ids are pending where they depend on it."]
        workers = demand.workers or 1
    else:
        workers = on_this_machine(demand, name, chains[0].plans[0], [chain.resources[0] for chain in chains]).workers or 1
        rows = bases
        for (number, named, _), row in zip(found, stages, strict=True):
            rows.append(row | {"stage": number} | ({} if named else later | {"folder": None, "base": None}))
        notes = []
    notes.append("A stage has its id once the stage before it is done.")
    disk_bytes = disk_needed(rows, workers=workers)
    print_plan(str(folder), rows, [], notes, workers=workers, disk_bytes=disk_bytes, as_json=as_json)


def _costs(
    chains: "list[Chain]", folder: Path, watch: "Watch", device: "Device | None"
) -> "tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[int, bool, Job]]]":
    """What every base model and every stage will cost, and the stages as `planned_so_far` finds them."""
    from mlx_forget.sweeps.costs import planned_rows, speed_of
    from mlx_forget.sweeps.dispatch import look_back
    from mlx_forget.sweeps.stages import planned_so_far
    from mlx_forget.sweeps.sweep import Sweep, base_job

    found = planned_so_far(chains, folder, watch=watch)
    plans = [job.plan.base for _, _, job in found if job.plan.base is not None]
    bases = [base_job(plan) for plan in {plan.folder: plan for plan in plans}.values()]
    for base in bases:
        look_back(base, retry=False)
    places = [folder, *sorted({base.plan.folder.parent for base in bases})]
    planned = Sweep(folder, [job for _, _, job in found], bases, [], [])
    rows = planned_rows(planned, speed_of(chains[0].plans[0].backend, places, device))
    return rows[: len(bases)], rows[len(bases) :], found
