"""`forget laws`: the laws that can be fitted."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.cli import completion
from mlx_forget.cli.answers import Json, emit, pairs, tell
from mlx_forget.cli.options import ColumnMap
from mlx_forget.errors import UserError

if TYPE_CHECKING:
    from mlx_forget.laws.forms import Law

app = typer.Typer()


@app.command("laws")
def laws_command(
    name: Annotated[str | None, typer.Argument(help="One law, in full.", autocompletion=completion.laws)] = None,
    design: Annotated[
        Path | None,
        typer.Option("--design", help="A table of planned runs, without losses: what it would leave undetermined of the law."),
    ] = None,
    mapping: ColumnMap = None,
    as_json: Json = None,
) -> None:
    """The laws that can be fitted: formula, columns, parameters, source.

    With --design, the runs that a plan still lacks, before any is trained.

    Example: forget laws bethune-forgetting --design planned.csv --map L0=3.2
    """
    from mlx_forget.laws.forms import get_law, laws

    if design is not None:
        if name is None:
            raise UserError(
                "--design checks a plan for one law: name it, as in `forget laws bethune-forgetting --design planned.csv`."
            )
        _say_design(get_law(name), design, pairs(mapping, "--map"), as_json=bool(as_json))
        return
    if mapping:
        raise UserError("--map says where --design TABLE has a law's columns: give that too.")
    chosen = list(laws()) if name is None else [get_law(name)]
    if as_json:
        emit({"laws": [law_json(law) for law in chosen]})
        return
    for law in chosen:
        tell(f"{law.name:26} {law.formula}")
        if name is not None:
            tell(f"  source      {law.source}")
            tell(f"  columns     {', '.join(law.columns)}, loss")
            tell(f"  linear in   {', '.join(law.linear) or '-'}")
            for parameter in law.parameters:
                unit = f" [{parameter.unit}]" if parameter.unit else ""
                tell(f"  {parameter.name:10}  {parameter.meaning}{unit}; {parameter.low:g} to {parameter.high:g}")
            if law.alternatives:
                tell(f"  rivals      {', '.join(alternative.name for alternative in law.alternatives)}")


def _say_design(law: "Law", table: Path, mapping: dict[str, str], *, as_json: bool) -> None:
    from mlx_forget.laws.identify import design_flags
    from mlx_forget.tables import read_table

    planned = read_table(table, mapping=mapping)
    flags = design_flags(law, planned)
    if as_json:
        emit({"law": law.name, "num_rows": planned.num_rows, "flags": [asdict(flag) for flag in flags]})
        return
    rows = f"{planned.num_rows} planned run" + ("s" if planned.num_rows != 1 else "")
    tell(f"{law.name}: {rows} {'leave nothing undetermined' if not flags else 'would not determine it all'}")
    for flag in flags:
        tell(f"  {flag.words}")
        if flag.remedy:
            tell(f"    to determine {', '.join(flag.parameters)}: {flag.remedy}")


def law_json(law: "Law") -> dict[str, Any]:
    return {
        "name": law.name,
        "formula": law.formula,
        "latex": law.latex,
        "source": law.source,
        "columns": [*law.columns, "loss"],
        "response": law.response,
        "linear": list(law.linear),
        "parameters": [
            {"name": q.name, "meaning": q.meaning, "unit": q.unit, "low": q.low, "high": q.high} for q in law.parameters
        ],
        "rivals": [alternative.name for alternative in law.alternatives],
    }
