"""`forget runs`: what many runs have left behind: list, show, compare, export, prune, verify."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from mlx_forget.cli import completion
from mlx_forget.cli.answers import clean, emit, emit_text, say

if TYPE_CHECKING:
    from mlx_forget.runs.index import RunIndex
    from mlx_forget.runs.rows import Row

# Folders and phrases that are shown of many.
MOST_SHOWN = 5


class ListByDefault(typer.core.TyperGroup):
    """`forget runs [FOLDER]` is `forget runs list [FOLDER]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing and not args:
            # A shell asks what could come next.
            return super().parse_args(ctx, args)
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=ListByDefault, help="List, show, compare, export, prune and verify runs.\n\nExample: forget runs list runs")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Folder = Annotated[Path | None, typer.Argument(help="Where to look, at any depth. \\[default: runs]")]
Within = Annotated[Path | None, typer.Option("--in", help="Where to look for a run id. \\[default: runs]")]
Where = Annotated[str | None, typer.Option(help="Only these runs, as in forget fit: 'N <= 3.4e8 and method == \"injection\"'.")]
Status = Annotated[str | None, typer.Option(help="finished, stopped or diverged.", autocompletion=completion.statuses)]
Sort = Annotated[str | None, typer.Option(help="A column, such as forgetting_nats; -forgetting_nats puts the largest first.")]


@app.command("list")
def list_runs(
    folder: Folder = None, where: Where = None, status: Status = None, sort: Sort = None, as_json: AsJson = False
) -> None:
    """List the runs at or below a folder that have ended, and name those that have not.

    Example: forget runs list runs --where 'p > 0' --sort forgetting_nats
    """
    index, rows = chosen(folder, where, status, sort)
    if as_json:
        print_json(index, rows)
        return
    print_rows(index, rows)
    say_others(index)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="A run folder, or the beginning of a run id.")],
    within: Within = None,
    as_json: AsJson = False,
) -> None:
    """Everything a run's record says.

    Example: forget runs show runs/figure1/0123456789ab-cuda
    """
    import yaml

    from mlx_forget.runs.comparison import finished
    from mlx_forget.runs.selection import find_run

    record = finished(find_run(run, folder=within))
    if as_json:
        emit(record)
    else:
        print(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), end="")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or beginnings of run ids.")],
    within: Within = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the histories into this file, such as compared.png or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """What runs were told differently, and their losses side by side; ± is one standard error, paired by evaluation window.

    Example: forget runs compare 0123456789ab 456789abcdef
    """
    from mlx_forget.runs.comparison import as_json as comparison_json
    from mlx_forget.runs.comparison import compare as compare_runs
    from mlx_forget.runs.comparison import lines
    from mlx_forget.runs.selection import find_run

    made = compare_runs([find_run(run, folder=within) for run in runs])
    content = comparison_json(made)
    if plot is not None:
        from mlx_forget.plots import draw_histories, save_figure

        if plot.suffix not in (".png", ".pdf", ".svg"):
            from mlx_forget.errors import unknown

            raise unknown("figure format", plot.suffix or plot.name, (".png", ".pdf", ".svg"))
        plot.parent.mkdir(parents=True, exist_ok=True)
        save_figure(draw_histories(made.runs), plot)
        say(f"Wrote {plot}")
    if as_json:
        emit(content)
    else:
        print("\n".join(lines(made)))


@app.command()
def export(
    folder: Folder = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .parquet or .csv file. \\[default: runs.parquet]")
    ] = None,
    where: Where = None,
    status: Status = None,
    sort: Sort = None,
    as_json: AsJson = False,
) -> None:
    """Write runs as a table with the columns of the laws and where each number comes from; forget fit and forget report read it.

    Example: forget runs export runs/figure1 -o figure1.parquet
    """
    from mlx_forget.records import installed_versions
    from mlx_forget.runs.export import check_format
    from mlx_forget.runs.export import export as write

    path = output or Path("runs.parquet")
    check_format(path)
    index, rows = chosen(folder, where, status, sort)
    provenance = {
        # A place on this machine is nobody else's affair.
        "folder": index.root.name if index.root.is_absolute() else str(index.root),
        "where": where,
        "status": status,
        "num_runs": len(rows),
        "left_out": index.problems,
        "versions": installed_versions(),
    }
    columns = write(rows, path, root=index.root, provenance=provenance)
    say_others(index)
    say(f"Wrote {path}: {len(rows):,} runs, {len(columns)} columns")
    if as_json:
        emit({"file": str(path), "num_runs": len(rows), "columns": columns, **others(index)})


@app.command()
def prune(
    folder: Folder = None,
    where: Where = None,
    status: Status = None,
    best_too: Annotated[
        bool, typer.Option("--best-too", help="Remove checkpoints/best as well, which holds what was learnt.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove checkpoints of runs that have ended, all but the best ones; records and histories stay.

    Says what would go and asks first. A run that another one started from keeps its checkpoints.

    Example: forget runs prune runs --dry-run
    """
    import sys

    from mlx_forget.runs.prune import find_prunable
    from mlx_forget.runs.prune import prune as remove

    index, rows = chosen(folder, where, status, None)
    found = find_prunable(index, rows, best_too=best_too)
    for path, size in found.checkpoints.items():
        say(f"{size / 1e6:>10.1f} MB  {path}")
    for path, reason in found.kept.items():
        say(f"      kept: {path} ({reason})")
    total = f"{len(found.checkpoints)} checkpoints, {found.num_bytes / 1e6:.1f} MB"
    removed = bool(found.checkpoints) and not dry_run
    if removed and not yes:
        if sys.stdin.isatty() and not as_json:
            removed = typer.confirm(f"Remove {total}?", err=True)
        else:
            removed = False
            say("Nothing is removed without --yes where nobody can be asked.")
    if removed:
        remove(list(found.checkpoints))
    say(f"{'Removed' if removed else 'Would remove' if found.checkpoints else 'Nothing to remove:'} {total}.")
    if as_json:
        emit(
            {
                "checkpoints": [{"folder": str(path), "bytes": size} for path, size in found.checkpoints.items()],
                "bytes": found.num_bytes,
                "kept": {str(path): reason for path, reason in found.kept.items()},
                "removed": removed,
            }
        )


@app.command()
def verify(
    folder: Folder = None,
    hashes: Annotated[
        bool, typer.Option("--hashes/--no-hashes", help="Check the files of checkpoints against their checksums.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Check records, histories and checkpoints; exit code 1 where something is wrong.

    Runs that were only begun are named and otherwise left alone.

    Example: forget runs verify runs
    """
    from mlx_forget.errors import RunFailed
    from mlx_forget.runs.verify import describe_begun, verify_runs

    index = read(folder)
    problems = verify_runs(index, hashes=hashes)
    begun = {name: describe_begun(index.root / name) for name in index.begun}
    if as_json:
        emit({"num_runs": index.num_records, "problems": problems, "begun": begun})
    else:
        for name, phrases in problems.items():
            for phrase in phrases:
                print(f"{index.root / name}: {phrase}")
        for name, phrase in begun.items():
            print(f"{index.root / name}: {phrase}")
    good = f"{index.num_records - len(problems):,} of {index.num_records:,} runs are whole"
    if problems:
        raise RunFailed(f"{good}; something is wrong with {', '.join(_few(list(problems)))}.")
    say(f"{good}.")


# ------------------------------------------------------------------------------------------------ what they share


def read(folder: Path | None) -> "RunIndex":
    from mlx_forget.runs.index import read_index
    from mlx_forget.runs.selection import DEFAULT_FOLDER

    return read_index(folder or DEFAULT_FOLDER)


def chosen(folder: Path | None, where: str | None, status: str | None, sort: str | None) -> "tuple[RunIndex, list[Row]]":
    from mlx_forget.runs.selection import select

    index = read(folder)
    return index, select(index.rows, where=where, status=status, sort=sort)


def print_rows(index: "RunIndex", rows: "list[Row]") -> None:
    """One line per run."""
    print(
        f"{'run':<14} {'status':<9} {'params':>12} {'tokens':>11} {'p':>6} {'method':<14} {'seed':>4} {'steps':>7} {'target val':>10} "
        f"{'forgetting':>17}  folder"
    )
    for row in rows:
        size, tokens, steps = ("" if row[name] is None else f"{row[name]:,.0f}" for name in ("N", "D", "num_steps"))
        loss = "" if row["L_ft"] is None else f"{row['L_ft']:.4f}"
        forgetting = "" if row["forgetting_nats"] is None else f"{row['forgetting_nats']:+.4f}"
        if row.get("max_forgetting") is not None:
            forgetting += f" (of {row['max_forgetting']:g})"
        print(
            f"{row['run']:<14} {row['status']:<9} {size:>12} {tokens:>11} {row['p_asked']!s:>6} {row['method']:<14} {row['seed']!s:>4} "
            f"{steps:>7} {loss:>10} {forgetting:>17}  {index.folder_of(row)}"
        )


def print_json(index: "RunIndex", rows: "list[Row]") -> None:
    """The records themselves, which are JSON already and were read once: they are passed on, not parsed again."""
    from mlx_forget.records import RECORD

    whole = []
    for row in rows:
        folder = index.folder_of(row)
        text = (folder / RECORD).read_text(encoding="utf-8").replace("\n", "").strip()
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(clean(json.loads(text)))
        whole.append(f'{{"folder": {json.dumps(str(folder))}, {text.removeprefix("{").lstrip()}')
    emit_text(f'{{"runs": [{", ".join(whole)}], {json.dumps(others(index)).removeprefix("{")}')


def others(index: "RunIndex") -> dict[str, Any]:
    """What is in a folder besides runs that have ended, for --json."""
    return {
        "left_out": {str(index.root / name): problem for name, problem in index.problems.items()},
        "begun": [str(index.root / name) for name in index.begun],
    }


def say_others(index: "RunIndex") -> None:
    """Name what is in a folder besides runs that have ended."""
    reasons: dict[str, list[str]] = {}
    for name, problem in index.problems.items():
        reasons.setdefault(problem, []).append(str(index.root / name))
    for reason, names in reasons.items():
        say(f"left out: {len(names)} {reason} ({', '.join(_few(names))})")
    if index.begun:
        names = [str(index.root / name) for name in index.begun]
        say(f"begun, without a record yet: {len(names)} ({', '.join(_few(names))})")


def _few(names: list[str]) -> list[str]:
    return names[:MOST_SHOWN] + ["..."] * (len(names) > MOST_SHOWN)
