"""`forget advise`: from a budget of forgetting to a run, and the runs to do first where there is no law yet."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.cli import completion
from mlx_forget.cli.answers import Json, emit, pairs, say, tell
from mlx_forget.cli.fit import bootstrap_options, fit_options, report_left_out
from mlx_forget.cli.options import ColumnMap
from mlx_forget.cli.predict import COLUMN_OPTIONS, question
from mlx_forget.errors import UserError

if TYPE_CHECKING:
    from mlx_forget.laws.predictor import Predictor

PROBE_RUNS = 6
# How far, relatively, a question may be from the only D that was run.
SAME_D = 0.05

app = typer.Typer()


@app.command("advise")
def advise_command(
    source: Annotated[Path | None, typer.Argument(help="A fit.json, or the table or folder of a probe's runs.")] = None,
    max_forgetting: Annotated[float | None, typer.Option("--max-forgetting", help="Budget, nats per token.")] = None,
    n: Annotated[float | None, typer.Option("--n", help="Parameters N.")] = None,
    d: Annotated[float | None, typer.Option("--d", help="Unique finetuning tokens D.")] = None,
    p: Annotated[str | None, typer.Option("--p", help="Share of pretraining data; leave out to have it chosen.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the target tokens, for the cost.")] = None,
    confidence: Annotated[float | None, typer.Option(help="That the budget holds.")] = None,
    finetuning: Annotated[Path | None, typer.Option(help="fit.json of the finetuning law: adds the Pareto front.")] = None,
    group: Annotated[str | None, typer.Option(help="The group, where the fit has several.")] = None,
    law: Annotated[
        str | None,
        typer.Option(
            help="The law, where the source is a table. \\[default: the one that its runs allow]", autocompletion=completion.laws
        ),
    ] = None,
    mapping: ColumnMap = None,
    allow_extrapolation: Annotated[bool | None, typer.Option("--allow-extrapolation", help="Answer far outside the data.")] = None,
    next_runs: Annotated[
        int | None, typer.Option("--next-runs", help="Name the runs that sharpen the answer most per FLOP.")
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="Write the short runs to do first, as JSONL, and stop.")] = None,
    num_runs: Annotated[int | None, typer.Option("--num-runs", help="Runs of a probe, 3 to 6.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the figure of the advice here (a folder).")] = None,
    allow_units: Annotated[bool | None, typer.Option("--allow-units", help="Accept very small N or D.")] = None,
    as_json: Json = None,
) -> None:
    """The smallest p (or the largest D, the smallest N) that keeps forgetting under a budget.

    Example: forget advise fit.json --max-forgetting 0.02 --n 3.3e8 --d 3e6
    """
    from mlx_forget.laws import advise
    from mlx_forget.laws.design import describe_plan
    from mlx_forget.pipeline.shares import parse_law_share

    if probe is not None:
        write_probe(probe, d, num_runs, as_json)
        return
    if source is None:
        raise UserError("Give a fit.json or a table of runs; with neither, start with --probe runs.jsonl --d TOKENS.")
    if max_forgetting is None:
        raise UserError("Give the budget: --max-forgetting 0.02 (nats per token).")
    predictor, notes = load_source(source, law, mapping, group, allow_units, d)
    usual = advise.AdviceOptions()
    options = advise.AdviceOptions(
        allow_extrapolation=bool(allow_extrapolation),
        confidence=usual.confidence if confidence is None else confidence,
    )
    if not 0 < options.confidence < 1:
        raise UserError(f"--confidence must lie between 0 and 1, and it is {options.confidence:g}.")
    passes = 1.0 if epochs is None else epochs
    if not (passes > 0 and math.isfinite(passes)):
        raise UserError(f"--epochs must be a positive number, and it is {passes:g}.")
    known = {"N": n, "D": d, "p": None if p is None else parse_law_share(p, "p")}
    if known["p"] is not None and "p" not in predictor.law.columns:
        raise UserError(f"{predictor.law.name} does not know p, as runs of one share cannot: leave --p out.")
    open_columns = [name for name in ("N", "D", "p") if name in predictor.law.columns and known[name] is None]
    if len(open_columns) > 1 and "p" in open_columns:
        middle = [name for name in open_columns if name != "p"]
        for name in middle:
            known[name] = predictor.data_range[name][1]
            notes.append(f"no {COLUMN_OPTIONS[name]} given: answering at the largest {name} of the data, {known[name]:.3g}")
        open_columns = ["p"]
    if len(open_columns) != 1:
        raise UserError("Leave exactly one of --n, --d and --p out: that one is solved for.")
    unknown_column = open_columns[0]
    fixed = question(
        predictor.law,
        known,
        need=tuple(c for c in ("N", "D", "p") if c in predictor.law.columns and c != unknown_column),
    )
    answer = advise.solve(predictor, fixed, unknown_column, max_forgetting=max_forgetting, options=options, epochs=passes)
    found = answer.answer is not None
    content: dict[str, Any] = {
        "question": answer.question,
        "unknown": answer.unknown,
        "answer": answer.answer,
        "columns": {name: value for name, value in answer.columns.items() if name != "L0"} if found else None,
        "expected_forgetting_nats": answer.expected if found else None,
        "upper_forgetting_nats": answer.upper if found else None,
        "forgetting_without_replay_nats": answer.without_replay if found else None,
        "confidence": options.confidence,
        "cost": dict(answer.cost.__dict__) if found else None,
        "outside_data": answer.distance if found else "",
        "words": answer.words,
    }
    for note in notes:
        say(note)
    tell(answer.words)
    if found:
        tell(
            f"expected {answer.expected:.3g} nats, at most {answer.upper:.3g} ({100 * options.confidence:g}%); without replay "
            f"{answer.without_replay:.3g}; {answer.cost.injected_tokens:.3g} injected tokens"
            + (f", {answer.cost.train_flops:.3g} FLOPs" if math.isfinite(answer.cost.train_flops) else "")
        )
    if finetuning is not None:
        content["pareto"] = front(predictor, finetuning, group, answer.columns, passes)
    if next_runs is not None:
        plan = plan_next(predictor, answer.columns, next_runs)
        content["next_runs"] = [dict(run) for run in plan.runs]
        tell("the runs that sharpen the prediction there most per FLOP, and how well the loss is known after each:")
        for line in describe_plan(plan):
            tell(f"  {line}")
    if plot is not None:
        from mlx_forget.law_plots import plot_advice

        say(f"Wrote {plot_advice(predictor, answer, max_forgetting, options.confidence, plot)}")
    if as_json:
        emit(content)


def write_probe(path: Path, tokens: float | None, num_runs: int | None, as_json: bool | None) -> None:
    """Write the runs of a probe, one JSON object per line, and say what to do with them."""
    from mlx_forget.durable_files import write_text
    from mlx_forget.laws.design import probe_runs
    from mlx_forget.laws.files import check_target

    if tokens is None:
        raise UserError("A probe needs the planned number of finetuning tokens: --d 3e7.")
    check_target(path)
    runs = probe_runs(tokens, PROBE_RUNS if num_runs is None else num_runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(run) + "\n" for run in runs))
    for run in runs:
        tell(f"forget train --target-tokens {run['D']:.0f} --p {run['p']:g} ...")
    say(f"Wrote {path}: finetune your model once per line, then `forget advise RUNS --max-forgetting BUDGET --d {tokens:g}`")
    if as_json:
        emit({"probe": str(path), "runs": runs})


def load_source(
    source: Path, law: str | None, mapping: list[str] | None, group: str | None, allow_units: bool | None, tokens: float | None
) -> "tuple[Predictor, list[str]]":
    """The predictor of a fit.json, or of a fit made on the spot to a table or a folder of runs."""
    from mlx_forget.laws.choice import Choice, choose_law
    from mlx_forget.laws.files import read_fit
    from mlx_forget.laws.fit import fit_law
    from mlx_forget.laws.forms import get_law
    from mlx_forget.laws.model import Constraints
    from mlx_forget.laws.predictor import Predictor
    from mlx_forget.laws.uncertainty import assess
    from mlx_forget.tables import read_table

    if source.suffix == ".json" and not source.is_dir():
        return read_fit(source).pick(group), []
    table = read_table(source, mapping=pairs(mapping, "--map"), response="pretraining")
    report_left_out(table)
    if group is not None:
        labelled = [name for name in table.labels if group in table.labels[name]]
        if not labelled:
            raise UserError(f"No row of {source} is labelled {group!r}.")
        table = table.select(table.labels[labelled[0]] == group)
    domains = sorted(set(table.labels.get("domain", [])))
    if len(domains) > 1:
        raise UserError(
            f"{source} holds runs of several domains, each with a law of its own: name one with --group ({', '.join(domains)})."
        )
    try:
        choice = choose_law(table, response="pretraining")
    except UserError as error:
        raise UserError(f"No law can be chosen for {source}: {error}.") from None
    if law is not None and law != choice.law.name:
        named = get_law(law)
        sizes = len(set(table.columns["N"].tolist())) if "N" in table.columns else 0
        if sizes > 1 and "N" not in named.columns and named.response == "pretraining":
            raise UserError(f"{named.name} is the law of one model, and {source} holds {sizes} sizes: leave --law out.")
        choice = Choice(named, Constraints(), "")
    notes = [f"fitting {choice.law.name} to {table.num_rows} runs of {source}", *([choice.why] if choice.why else [])]
    if "beta" in choice.constraints.fixed and "D" in table.columns:
        only = float(table.columns["D"][0])
        if tokens is None or not abs(tokens / only - 1) <= SAME_D:
            raise UserError(
                f"All runs have D = {only:.3g}, so nothing says what other D do: ask with --d {only:g}, or run one more."
            )
    made = assess(
        fit_law(table, choice.law, constraints=choice.constraints, options=fit_options(None, None, allow_units, None)),
        bootstrap_options(None, None, None, None, None),
    )
    notes.extend(made.warnings)
    return Predictor.from_uncertainty(made), notes


def front(
    forgetting: "Predictor", path: Path, group: str | None, columns: Mapping[str, float], epochs: float
) -> list[dict[str, Any]]:
    """The Pareto front of the asked size: fewer tokens forget less and learn less, replay forgets less and costs."""
    import numpy as np

    from mlx_forget.laws.advise import pareto
    from mlx_forget.laws.files import read_fit

    if "N" not in forgetting.law.columns:
        raise UserError(f"{forgetting.law.name} knows one model only: a Pareto front needs a law with N.")
    target = read_fit(path).pick(group)
    if target.law.response != "target":
        raise UserError(
            f"--finetuning takes a fit of a law of the target loss, such as bethune-finetuning; {path} is of {target.law.name}."
        )
    fewest = min(forgetting.data_range["D"][0], columns["D"])
    shares = np.array([0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05])
    choices = pareto(
        forgetting,
        target,
        sizes=np.array([columns["N"]]),
        tokens=np.geomspace(fewest, columns["D"], 7),
        shares=shares[shares <= forgetting.data_range["p"][1]],
        epochs=epochs,
    )
    tell("target loss against forgetting, the runs that nothing beats:")
    for choice in choices:
        tell(
            f"  D={choice.columns['D']:.3g} p={100 * choice.columns['p']:g}%: target "
            f"{choice.target_loss:.4g}, "
            f"forgetting {choice.forgetting:.3g}, {choice.cost.train_flops:.2g} FLOPs"
        )
    return [
        {
            "columns": dict(c.columns),
            "target_loss": c.target_loss,
            "forgetting_nats": c.forgetting,
            "train_flops": c.cost.train_flops,
        }
        for c in choices
    ]


def plan_next(predictor: "Predictor", columns: Mapping[str, float], count: int) -> Any:
    """The next runs among a grid that spans the data."""
    from itertools import product

    import numpy as np

    from mlx_forget.laws.design import next_runs

    axes: dict[str, list[float]] = {}
    for name in predictor.law.columns:
        low, high = predictor.data_range[name]
        if name in ("N", "D"):
            axes[name] = np.geomspace(low, high, 5).tolist()
        elif name == "p":
            axes[name] = [0.0, 0.001, 0.005, 0.01, 0.05]
        elif name == "L0":
            axes[name] = [(low + high) / 2]
        else:
            axes[name] = np.linspace(low, high, 4).tolist()
    grid = np.array(list(product(*axes.values())))
    candidates = {name: grid[:, i] for i, name in enumerate(axes)}
    middle = sum(predictor.data_range["L0"]) / 2 if "L0" in predictor.data_range else 0.0
    return next_runs(predictor, {"L0": middle, **columns}, candidates, count=count)
