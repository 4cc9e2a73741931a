"""`forget runs`: finished runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="List finished runs, or show one.\n\nExample: forget runs list runs")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_runs(
    folder: Annotated[Path | None, typer.Argument(help="Where to look. \\[default: runs]")] = None,
    as_json: AsJson = False,
) -> None:
    """List the finished runs at or below a folder.

    Example: forget runs list runs
    """
    from mlx_forget.errors import UserError
    from mlx_forget.records import find_runs

    root = folder or Path("runs")
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    runs = list(find_runs(root))
    if as_json:
        print(json.dumps({"runs": [{"folder": str(run.folder), **run.record} for run in runs]}))
        return
    print(f"{'run':<14} {'status':<9} {'params':>12} {'p':>6} {'steps':>7} {'target val':>10} {'forgetting':>10}  folder")
    for run in runs:
        record = run.record
        forgetting = "" if record["forgetting_nats"] is None else f"{record['forgetting_nats']:+.4f}"
        print(
            f"{record['run_id']:<14} {record['status']:<9} {record['num_params']:>12,} {record['config']['p']:>6} {record['num_steps']:>7,} "
            f"{record['losses']['best']['target_val']:>10.4f} {forgetting:>10}  {run.folder}"
        )


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="A run folder.")], as_json: AsJson = False) -> None:
    """Everything a run's record says.

    Example: forget runs show runs/figure1/0123456789ab-cuda
    """
    import yaml

    from mlx_forget.errors import UserError
    from mlx_forget.progress import PROGRESS_FILE
    from mlx_forget.records import read_record

    record = read_record(folder)
    if record is None:
        begun = " It was begun: resume it with forget train." if (folder / PROGRESS_FILE).exists() else ""
        raise UserError(f"{folder} holds no finished run.{begun}")
    print(
        json.dumps(record) if as_json else yaml.safe_dump(record, sort_keys=False, allow_unicode=True),
        end="\n" if as_json else "",
    )
