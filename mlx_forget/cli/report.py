"""`forget report`: what a sweep found, as one page."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_forget.cli import completion
from mlx_forget.cli.answers import emit, say, works_in

app = typer.Typer()


@app.command()
def report(
    sweep: Annotated[Path, typer.Argument(help="The folder of a sweep (or of several), or a table of forget runs export.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The page. \\[default: report.html]")] = None,
    max_forgetting: Annotated[
        list[float] | None,
        typer.Option(
            "--max-forgetting", help="Budget in nats per token; may be given again. \\[default: shares of what p = 0 forgets]"
        ),
    ] = None,
    confidence: Annotated[float | None, typer.Option(help="That a budget holds. \\[default: 0.9]")] = None,
    where: Annotated[str | None, typer.Option(help="Only these runs, as in forget runs list.")] = None,
    status: Annotated[str | None, typer.Option(help="finished, stopped or diverged.", autocompletion=completion.statuses)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page says as one JSON object.")] = False,
) -> None:
    """What a sweep found, as one HTML page: runs, U-curves, forgetting, laws with hold-outs, and which p keeps within a budget.

    Example: forget report runs/figure1 -o figure1.html
    """

    from mlx_forget.durable_files import folder_for, write_text
    from mlx_forget.report.contents import make_report
    from mlx_forget.report.page import render

    page = output or Path("report.html")
    works_in(page.parent)
    with folder_for(page.parent):
        made = make_report(sweep, where=where, status=status, budgets=max_forgetting or [], confidence=confidence)
        write_text(page, render(made))
    say(f"Wrote {page}: {len(made.runs.rows):,} runs")
    if as_json:
        emit({"file": str(page), **made.as_json()})
