"""`forget fuse`."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_forget.cli.answers import Json, emit, say, works_in

app = typer.Typer()


@app.command("fuse")
def fuse_command(
    run: Annotated[
        Path, typer.Argument(help="A run with adapters, one of its checkpoints, or a folder of peft's or mlx-lm's adapters.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the whole checkpoint.")],
    base: Annotated[Path | None, typer.Option(help="Where the base is now. \\[default: what the adapters name]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weights as float32, bfloat16 or float16. \\[default: as the base has them]")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Accept a model whose config.json names code; none is run here.")
    ] = False,
    as_json: Json = None,
) -> None:
    """Make one whole checkpoint of adapters and the base that they were trained on.

    The result needs no adapter support: transformers loads it, and so does --init.

    Example: forget fuse runs/lora -o models/fused
    """
    from mlx_forget.checkpoint import find_checkpoint
    from mlx_forget.fuse import fuse

    found = find_checkpoint(run.expanduser(), trust_remote_code=trust_remote_code)
    works_in(output)
    made = fuse(found, output.expanduser(), base=None if base is None else base.expanduser(), dtype=dtype)
    step = made.state.get("step")
    if as_json:
        emit({"folder": str(made.folder), "step": step, "fused_from": made.state["fused_from"]})
    else:
        start = base or made.state["fused_from"]["base"]["folder"]
        at = "" if step is None else f", step {step:,}"
        say(
            f"Wrote {made.folder}: the adapters of {found.folder}{at}, in the weights of {start}, as {made.state['fused_from']['dtype']}."
        )
        say(f"It is a whole checkpoint. What it forgot: forget audit {start} {made.folder}; go on from it: --init {made.folder}")
