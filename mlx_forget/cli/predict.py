"""`forget predict`: a loss, or the forgetting, at a question, from a saved fit."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_forget.cli import completion
from mlx_forget.cli.answers import Json, clean, emit, say, tell
from mlx_forget.errors import UserError

if TYPE_CHECKING:
    from mlx_forget.laws.forms import Law

COLUMN_OPTIONS = {
    "N": "--n",
    "D": "--d",
    "p": "--p",
    "r": "--r",
    "R": "--share",
    "P": "--trainable",
    "steps": "--steps",
    "L0": "--l0",
    "L_ft": "--l-ft",
}

app = typer.Typer()


def question(law: "Law", given: Mapping[str, float | None], *, need: tuple[str, ...] | None = None) -> dict[str, float]:
    """The law's columns from the options.

    Raises:
        UserError: one is missing.
    """
    made = {}
    for name in law.columns if need is None else need:
        value = given.get(name)
        if value is None:
            raise UserError(f"{law.name} needs {name} ({COLUMN_OPTIONS[name]}): give it.")
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in ("p", "r", "L0")):
            raise UserError(f"{COLUMN_OPTIONS[name]} must be a positive number, and it is {value:g}.")
        made[name] = float(value)
    return made


@app.command("predict")
def predict_command(
    fit: Annotated[Path, typer.Argument(help="A fit.json; with --measured, a file of predictions.")],
    n: Annotated[float | None, typer.Option("--n", help="Parameters N.")] = None,
    d: Annotated[float | None, typer.Option("--d", help="Unique finetuning tokens D.")] = None,
    p: Annotated[str | None, typer.Option("--p", help="Share of pretraining data: 0.01 or 1%.")] = None,
    r: Annotated[str | None, typer.Option("--r", help="Share of the predicted corpus.")] = None,
    share: Annotated[str | None, typer.Option("--share", help="Share R of domain data.")] = None,
    trainable: Annotated[float | None, typer.Option("--trainable", help="Trainable parameters P.")] = None,
    steps: Annotated[float | None, typer.Option("--steps", help="Update steps.")] = None,
    l_ft: Annotated[float | None, typer.Option("--l-ft", help="Finetuning loss.")] = None,
    l0: Annotated[
        float | None,
        typer.Option("--l0", help="Pretraining loss before finetuning; without it: forgetting, in nats."),
    ] = None,
    group: Annotated[str | None, typer.Option(help="The group, where the fit has several.")] = None,
    level: Annotated[float | None, typer.Option(help="Coverage of the interval.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Predict the forgetting of every run of this recipe, before they are run.", autocompletion=completion.recipes
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the predictions of --recipe here, once.")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Hold predictions against these runs: a folder, or a table of `forget runs export`.")
    ] = None,
    as_json: Json = None,
) -> None:
    """Predict a loss, or the forgetting, from a fit.json.

    Example: forget predict fit.json --n 1.27e9 --d 3e7 --p 1%
    """
    if recipe is not None or measured is not None or output is not None:
        asked = {"--n": n, "--d": d, "--p": p, "--r": r, "--share": share, "--trainable": trainable, "--steps": steps}
        others = [name for name, value in {**asked, "--l-ft": l_ft, "--l0": l0, "--group": group}.items() if value is not None]
        if others:
            raise UserError(f"--recipe and --measured ask of whole runs: leave {', '.join(others)} out.")
        if (recipe is None) == (measured is None) or (measured is not None and (output is not None or level is not None)):
            raise UserError("Give --recipe with -o FILE to predict runs, or --measured RUNS to hold predictions against them.")
        if measured is not None:
            _hold_against(fit, measured, as_json=bool(as_json))
        else:
            _predict_runs(fit, str(recipe), output, level, as_json=bool(as_json))
        return
    import numpy as np

    from mlx_forget.laws.files import read_fit
    from mlx_forget.laws.predictor import describe_distance
    from mlx_forget.pipeline.shares import parse_law_share

    predictor = read_fit(fit).pick(group)
    shares = {"p": p, "r": r, "R": share}
    given: dict[str, float | None] = {"N": n, "D": d, "P": trainable, "steps": steps, "L_ft": l_ft}
    given |= {name: None if text is None else parse_law_share(text, name) for name, text in shares.items()}
    is_forgetting = "L0" in predictor.law.columns and l0 is None
    columns = question(predictor.law, {**given, "L0": 0.0 if is_forgetting else l0})
    value = float(predictor.predict(columns)[0])
    coverage = _coverage(level)
    low, high = (float(end[0]) for end in predictor.interval(columns, level=coverage))
    has_interval = len(predictor.draws) > 0 and bool(np.isfinite([low, high]).all())
    distance = describe_distance(predictor.distance(columns), predictor.data_range)
    what = "forgetting_nats" if is_forgetting else "loss"
    if as_json:
        emit(
            {
                "law": predictor.law.name,
                "quantity": what,
                "value": value,
                "low": low if has_interval else None,
                "high": high if has_interval else None,
                "level": coverage,
                "columns": {name: columns[name] for name in columns if not (is_forgetting and name == "L0")},
                "outside_data": distance,
                "unidentified": dict(predictor.unidentified),
            }
        )
    ends = f" [{low:.5g}, {high:.5g}]" if has_interval else " (no interval: the fit has no draws)"
    tell(f"{'forgetting' if is_forgetting else 'loss'} {value:.5g} nats per token{ends}")
    if distance:
        tell(f"outside the data: {distance}")
    for name, words in predictor.unidentified.items():
        tell(f"{name} is not determined: {words}")


def _coverage(level: float | None) -> float:
    from mlx_forget.laws.uncertainty import BootstrapOptions

    coverage = BootstrapOptions().level if level is None else level
    if not 0 < coverage < 1:
        raise UserError(f"--level must lie between 0 and 1, and it is {coverage:g}.")
    return coverage


def _predict_runs(fit: Path, recipe: str, output: Path | None, level: float | None, *, as_json: bool) -> None:
    from mlx_forget import resources
    from mlx_forget.config import scale_defaults
    from mlx_forget.studies.prospective import predict_recipe, prediction_lines, write_predictions
    from mlx_forget.sweeps.grid import read_recipe

    content = predict_recipe(fit, read_recipe(resources.recipe(recipe)), level=_coverage(level))
    if scale_defaults():
        say("FORGET_SCALE=smoke: of the recipe's test in seconds, whose numbers mean nothing.")
    if output is not None:
        write_predictions(output, content)
        say(f"Wrote {output}: commit it before the runs are made.")
    if as_json:
        emit(content)
    for line in prediction_lines(content):
        tell(line)


def _hold_against(path: Path, runs: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from mlx_forget.runs.export import read_export
    from mlx_forget.runs.index import read_index
    from mlx_forget.studies.prospective import compare, outcome_lines, read_predictions, summary

    content = read_predictions(path)
    if content is None:
        if not path.is_file():
            raise UserError(f"There is no file of predictions {path}: `forget predict FIT --recipe NAME -o {path}` makes one.")
        raise UserError(f"{path} holds no predictions: make them with `forget predict FIT --recipe NAME -o FILE`, and give FILE.")
    if not runs.exists():
        raise UserError(f"There are no runs at {runs}: give a folder of runs, or a table of `forget runs export`.")
    outcomes = compare(content, read_index(runs).rows if runs.is_dir() else read_export(runs))
    if as_json:
        emit(clean({"summary": summary(outcomes), "outcomes": [asdict(one) for one in outcomes]}))
    for line in outcome_lines(content, outcomes):
        tell(line)
