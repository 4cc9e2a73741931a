"""`forget laws`: the laws that can be fitted."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.cli import completion
from mlx_forget.cli.answers import Json, emit, tell

if TYPE_CHECKING:
    from mlx_forget.laws.forms import Law

app = typer.Typer()


@app.command("laws")
def laws_command(
    name: Annotated[str | None, typer.Argument(help="One law, in full.", autocompletion=completion.laws)] = None,
    as_json: Json = None,
) -> None:
    """The laws that can be fitted: formula, columns, parameters, source.

    Example: forget laws bethune-forgetting
    """
    from mlx_forget.laws.forms import get_law, laws

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
