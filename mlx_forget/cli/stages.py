"""`forget sweep` of a recipe with stages."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_forget.cli.sweep import on_this_machine, report, train_runs

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_forget.engines import Demand
    from mlx_forget.grid import Recipe
    from mlx_forget.stacking import Wanted
    from mlx_forget.stages import Chain
    from mlx_forget.sweep import Job, Sweep
    from mlx_forget.watch import Watch


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
    as_json: bool,
) -> None:
    """Train the stages of every chain one after another, and measure every data set after each.

    Args:
        name: of the engine.
    """
    from mlx_forget.cli.signals import graceful_stop
    from mlx_forget.loss_matrix import FILE, measure, read_matrices, summary, table_lines, write_matrices
    from mlx_forget.stages import execute_stages, plan_stages
    from mlx_forget.sweep import stack_sweep

    folder = demand.folder
    chains = plan_stages(recipe, overrides=overrides, watch=watch)
    if dry_run:
        _print_plan(chains, folder, as_json=as_json)
        return
    demand = on_this_machine(demand, name, chains[0].plans[0], len(chains))
    known = read_matrices(folder / FILE)

    def measured(folders: list[list[Path]]) -> None:
        known[:] = [measure(chain, done, known) for chain, done in zip(chains, folders, strict=True)]
        write_matrices(folder / FILE, recipe.name, known)

    with graceful_stop(watch.say) as interrupted:
        watching = dataclasses.replace(watch, interrupted=interrupted)

        def run(planned: "Sweep") -> "list[Job]":
            planned = stack_sweep(planned, wanted, num_processes=demand.workers or 1)
            return train_runs(name, demand, planned, watching, console, retry_failed=retry_failed)

        quiet = dataclasses.replace(watch, say=lambda sentence: None)
        done = execute_stages(chains, folder, run=run, done=measured, watch=quiet)
    if known and not as_json:
        print("\n".join(table_lines(known)))
    report(folder, done, watch.say, as_json=as_json, chains=[summary(matrix) for matrix in known])


def _print_plan(chains: "list[Chain]", folder: Path, *, as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for chain in chains:
        for number, (stage, plan) in enumerate(zip(chain.stages, chain.plans, strict=True)):
            # A later stage is named once the weights that it starts from are there.
            own = plan.summary() if number == 0 else plan.summary() | {"run_id": None, "folder": None, "base": None}
            rows.append({"title": ", ".join(part for part in (chain.label, stage.name) if part), "stage": number + 1, **own})
    if as_json:
        print(json.dumps({"folder": str(folder), "runs": rows}))
        return
    bases = {row["base"]["run_id"]: row["base"] for row in rows if row["base"]}
    for row in [{"title": "base", **base} for base in bases.values()] + rows:
        name = row["run_id"] or f"stage {row['stage']}"
        print(
            f"{name:<12}  {row['title']:<36} {row['num_params']:>13,} parameters {row['num_steps']:>7,} steps "
            f"{row['num_tokens']:>13,} tokens {row['num_replay_tokens']:>11,} replayed {row['train_flops']:.2e} FLOPs"
        )
