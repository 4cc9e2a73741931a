"""`forget train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.cli import completion
from mlx_forget.cli.answers import emit, propose, works_in
from mlx_forget.cli.options import given, with_options
from mlx_forget.config import TrainConfig, scale_defaults
from mlx_forget.config_layers import from_layers
from mlx_forget.strict_yaml import read_given, read_yaml

if TYPE_CHECKING:
    from mlx_forget.costs import Device, Rate
    from mlx_forget.training.plan import Plan
    from mlx_forget.training.watch import Watch

app = typer.Typer()


@app.command()
@with_options(TrainConfig)
def train(
    config: Annotated[Path | None, typer.Option("-c", "--config", help="YAML file of these keys; options override it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder. \\[default: runs/ID-BACKEND]")] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Insist on a checkpoint to go on from, or refuse one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would run, train nothing.")] = False,
    measure: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: train this many steps from fresh weights to tell the hours; 50 will do."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: the device to assume for the hours, such as h100. \\[default: this machine's]",
            autocompletion=completion.devices,
        ),
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="With --dry-run: how many of them. \\[default: 1]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record (or the dry run) as one JSON object.")] = False,
    stack_with: Annotated[
        list[Path] | None, typer.Option(hidden=True, help="Run folders of a sweep to train as one with this run.")
    ] = None,
    **values: Any,
) -> None:
    """Pretrain or finetune a model.

    Without options: a 0.65M-parameter base model is pretrained on built-in prose (once; it is kept), then finetuned on built-in code with
    1% of prose injected, and what it forgot is measured.

    Example: forget train --target notes.txt --p 1% --iters 300
    """
    import os

    from mlx_forget.cli.signals import graceful_stop
    from mlx_forget.costs import device_named
    from mlx_forget.errors import RunFailed, UserError
    from mlx_forget.progress import SUPERVISOR, Preparation, RunProgress, supervisor
    from mlx_forget.progress import console as make_console
    from mlx_forget.records import read_record
    from mlx_forget.training.measure import measured_rate
    from mlx_forget.training.plan import Target, plan_run
    from mlx_forget.training.run import execute
    from mlx_forget.training.watch import Watch

    console = make_console()
    # A sweep asks for complete configurations, which it has written itself: nothing is laid under them.
    supervised = SUPERVISOR in os.environ
    from_file = {} if config is None else read_yaml(config) if supervised else read_given(config)
    resolved = from_layers(TrainConfig, {} if supervised else scale_defaults(), from_file, given(values))

    if not dry_run and (measure, on, devices) != (None, None, None):
        raise UserError("--measure, --on and --devices are for --dry-run: add it, or leave them out.")
    if on is not None and measure is not None:
        raise UserError("--measure times this machine, --on assumes another: give one of them.")

    device = None if on is None else device_named(on)

    watched: list[RunProgress] = []

    def observer(title: str, folder: Path) -> RunProgress:
        watched.append(RunProgress(console, title, folder))
        return watched[-1]

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    with graceful_stop(say, supervisor=supervisor()) as interrupted:
        watch = Watch(say=say, progress=Preparation(console), observer=observer, interrupted=interrupted)
        if stack_with:
            assert output is not None
            _train_stack([output, *stack_with], watch)
            return
        if output is not None:
            works_in(output)
        target = Target(device=device, num_devices=devices)
        plan = plan_run(resolved, folder=output, watch=watch, target=target)
        if dry_run:
            rate = None if measure is None else measured_rate(plan, measure, watch)
            if plan.group.rank == 0:
                _print_plan(_with_cost(plan, rate, device), as_json=as_json)
            return
        works_in(plan.folder, lambda: {"run_id": plan.run_id})
        try:
            # The runs of a sweep that was killed may still be writing their last checkpoint.
            record = execute(plan, resume=resume, watch=watch, wait=supervised)
        except RunFailed:
            diverged = read_record(plan.folder)
            if as_json and diverged is not None and plan.group.rank == 0:
                emit(diverged)
            raise
        finally:
            for progress in watched:
                progress.close()
    if plan.group.rank:
        return
    if as_json:
        emit(record)
    else:
        _print_record(record)
    say(f"Record: {plan.folder / 'record.json'}")
    if not resolved.is_pretraining:
        propose("audit", "auto", plan.folder)


def _train_stack(folders: "list[Path]", watch: "Watch") -> None:
    """Train the runs that a sweep has asked for in these folders as one."""
    import dataclasses

    from mlx_forget.pipeline.opened import Opened
    from mlx_forget.records import REQUESTED
    from mlx_forget.sweeps.stacking import execute_stack
    from mlx_forget.training.plan import plan_run

    quiet, opened = dataclasses.replace(watch, say=lambda sentence: None), Opened()
    configs = [from_layers(TrainConfig, read_yaml(folder / REQUESTED)) for folder in folders]
    plans = [
        plan_run(config, folder=folder, watch=quiet if number else watch, opened=opened)
        for number, (config, folder) in enumerate(zip(configs, folders, strict=True))
    ]
    execute_stack(plans, watch=watch, wait=True)


def _with_cost(plan: "Plan", rate: "Rate | None", device: "Device | None") -> dict[str, Any]:
    """The summary of a plan, with hours and what they are taken from; null where nothing is known."""
    from mlx_forget.backends import load_backend
    from mlx_forget.costs import Rate, device_like

    device = device or device_like(load_backend(plan.backend).hardware())
    if rate is None and device is not None:
        rate = Rate.assumed(device, plan.precision, plan.num_devices)
    hours = None if rate is None else plan.flops() / rate.flops_per_second / 3600
    return {
        **plan.summary(),
        "num_devices": plan.num_devices,
        "hours": hours,
        "rate": None if rate is None else rate.says,
    }


def _print_plan(summary: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit(summary)
        return
    from mlx_forget.costs import in_words

    base = summary["base"]
    if base is not None:
        print(
            f"base       {base['num_params']:,} parameters, {base['num_steps']:,} steps, {base['num_tokens']:,} tokens ({base['folder']})"
        )
    print(f"run        {summary['run_id']} in {summary['folder']}")
    print(
        f"model      {summary['num_params']:,} parameters ({summary['num_non_embedding_params']:,} without embeddings), {summary['precision']}"
    )
    print(f"steps      {summary['num_steps']:,}, learning rate {summary['learning_rate']:.3g}")
    print(
        f"tokens     {summary['num_tokens']:,}, of them {summary['num_pretrain_tokens']:,} injected; {summary['unique_target_tokens']:,} unique"
    )
    if summary["kept_log_prob_bytes"]:
        print(f"log-probs  {summary['kept_log_prob_bytes'] / 1e9:.3g} GB beside the replay data")
    print(f"compute    {summary['train_flops']:.3g} FLOPs")
    rows = summary["micro_batch_size"]
    pieces = "" if rows is None else f", {rows} rows at a time"
    print(f"memory     about {in_words(summary['memory_bytes_per_device'])} on each of {summary['num_devices']}{pieces}")
    print(f"disk       up to {summary['disk_bytes'] / 1e9:.3g} GB of checkpoints at once")
    if summary["hours"] is None:
        print("hours      unknown on this device: add --measure 50, or --on DEVICE")
    else:
        print(f"hours      about {summary['hours']:.3g} ({summary['rate']})")


def _print_record(record: dict[str, Any]) -> None:
    losses = record["losses"]
    print(f"{record['status']}: {record['reason']}")
    for name in ("start", "best", "end"):
        row = losses[name]
        pretrain = "" if row["pretrain_val"] is None else f"   pretraining {row['pretrain_val']:.4f}"
        print(
            f"{name:<6} step {row['step']:>7,}   target train {row['target_train']:.4f}   validation {row['target_val']:.4f}{pretrain}"
        )
    if served := record["p"]["rows"]:
        print(f"p served: {100 * served:.3g}% of rows, {100 * record['p']['tokens']:.3g}% of the tokens that are learnt")
    if record["forgetting_nats"] is not None:
        lost = record["progress_lost"]
        readings = [
            f"{value:.1%} of the pretraining progress ({name})"
            for name, value in (
                ("loss", lost["loss_fraction"]),
                ("token equivalent", lost["token_equivalent"]),
            )
            if value is not None
        ]
        print(
            f"forgotten at the best step: {record['forgetting_nats']:+.4f} nats" + (": " + ", ".join(readings) if readings else "")
        )
