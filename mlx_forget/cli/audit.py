"""`forget audit`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_forget.audit.config import AuditConfig
from mlx_forget.cli.options import given, with_options

app = typer.Typer()


@app.command()
@with_options(AuditConfig)
def audit(
    base: Annotated[
        str, typer.Argument(help="The model before: a run or checkpoint folder, or auto: what TUNED was finetuned from.")
    ],
    tuned: Annotated[str, typer.Argument(help="The model after: a run or checkpoint folder.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="A text to read, NAME=SOURCE: a built-in corpus, a store, a file or folder. Repeat it for more. \\[default: prose, code]",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for audit.html and audit.json. \\[default: audits/TUNED]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    **values: Any,
) -> None:
    """What did a model forget? Two checkpoints in; a table, JSON and an HTML page out.

    Example: forget audit auto runs/notes --data law=law.txt --fail-above 0.02
    """
    from rich.console import Console

    from mlx_forget.audit.files import to_json, write_audit
    from mlx_forget.audit.run import execute_audit, plan_audit
    from mlx_forget.audit.table import print_table
    from mlx_forget.audit.texts import parse_texts
    from mlx_forget.audit.verdict import failure
    from mlx_forget.cli.answers import emit_text, works_in
    from mlx_forget.config_layers import from_layers
    from mlx_forget.durable_files import folder_for
    from mlx_forget.errors import RunFailed
    from mlx_forget.progress import Preparation

    console = Console(stderr=True)

    def say(sentence: str) -> None:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)

    config = from_layers(AuditConfig, given(values), where="audit")
    progress = Preparation(console)
    plan = plan_audit(base, tuned, parse_texts(data or []), config, say=say, progress=progress)
    folder = output or Path("audits") / plan.tuned.name
    works_in(folder)
    with folder_for(folder):
        found = execute_audit(plan, say=say, progress=progress)
        write_audit(found, folder)
    if as_json:
        emit_text(to_json(found))
    else:
        print_table(found)
    say(f"Wrote {folder / 'audit.html'} and audit.json")
    if found.passed is False:
        raise RunFailed(failure(found))
