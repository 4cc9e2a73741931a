"""`forget fit`, `forget predict`, `forget advise` and `forget laws`."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.errors import UserError, unknown

if TYPE_CHECKING:
    from mlx_forget.laws.fit import FitOptions
    from mlx_forget.laws.forms import Law
    from mlx_forget.laws.predictor import Predictor
    from mlx_forget.laws.table import Table
    from mlx_forget.laws.uncertainty import BootstrapOptions, Uncertainty


@dataclass(frozen=True)
class Defaults:
    """What the commands use where the user says nothing; the fits' own defaults live in `mlx_forget.laws`.

    Args:
        law: of `fit` and of `advise` on a table.
        num_resamples: of the bootstrap.
        probe_runs: short runs of a probe.
        next_runs: runs that `advise --next-runs` names.
    """

    law: str = "bethune-forgetting"
    advise_law: str = "forgetting-fixed-n"
    num_resamples: int = 1000
    probe_runs: int = 6
    next_runs: int = 5


DEFAULTS = Defaults()
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

Json = Annotated[bool | None, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def register(app: typer.Typer) -> None:
    """Add the law commands to the application."""
    app.command("fit")(fit_command)
    app.command("predict")(predict_command)
    app.command("advise")(advise_command)
    app.command("laws")(laws_command)


def say(text: str) -> None:
    """Human text goes to stderr."""
    print(text, file=sys.stderr)


def emit(content: Mapping[str, Any]) -> None:
    """The one JSON object of --json."""
    print(json.dumps(content, allow_nan=False))


def clean(value: Any) -> Any:
    """A value for JSON: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def pairs(items: list[str] | None, option: str) -> dict[str, str]:
    """`NAME=VALUE` options as a dictionary."""
    made = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{option} takes NAME=VALUE, not {item!r}.")
        made[name.strip()] = value.strip()
    return made


def numbers(items: list[str] | None, option: str) -> dict[str, float]:
    made = {}
    for name, value in pairs(items, option).items():
        try:
            made[name] = float(value)
        except ValueError:
            raise UserError(f"{option} {name}={value}: {value!r} is not a number.") from None
    return made


# ------------------------------------------------------------------------------------------------ fit


def fit_command(
    table: Annotated[Path, typer.Argument(help="CSV, Parquet, Arrow or JSONL, or a folder of runs.")],
    law: Annotated[str | None, typer.Option(help="A law of `forget laws`.")] = None,
    by: Annotated[str | None, typer.Option(help="Fit every value of this column.")] = None,
    shared: Annotated[list[str] | None, typer.Option(help="A parameter that all groups share (joint fit).")] = None,
    fix: Annotated[list[str] | None, typer.Option(help="Hold a parameter: NAME=VALUE.")] = None,
    tie: Annotated[list[str] | None, typer.Option(help="Tie parameters: FOLLOWER=LEADER.")] = None,
    mapping: Annotated[list[str] | None, typer.Option("--map", help="LAW_COLUMN=TABLE_COLUMN, or =NUMBER for a constant.")] = None,
    where: Annotated[str | None, typer.Option(help="Keep these rows, such as 'p > 0'.")] = None,
    train_on: Annotated[str | None, typer.Option(help="Fit these rows, predict the others.")] = None,
    leave_out: Annotated[bool | None, typer.Option("--leave-out", help="Largest-N, largest-D, each-p hold-outs.")] = None,
    select: Annotated[bool | None, typer.Option("--select", help="Compare the law with its rivals.")] = None,
    link: Annotated[str | None, typer.Option(help="log or linear.")] = None,
    delta: Annotated[float | None, typer.Option(help="Huber delta; inf for least squares.")] = None,
    bootstrap: Annotated[int | None, typer.Option(help="Resamples of the independent runs.")] = None,
    intervals: Annotated[str | None, typer.Option(help="auto, cluster, profile, residual or bayesian.")] = None,
    level: Annotated[float | None, typer.Option(help="Coverage of the intervals.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the resampling.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write figures into this folder.")] = None,
    allow_units: Annotated[bool | None, typer.Option("--allow-units", help="Accept very small N or D.")] = None,
    allow_duplicates: Annotated[bool | None, typer.Option("--allow-duplicates", help="Accept repeated rows.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write fit.json here.")] = None,
    as_json: Json = None,
) -> None:
    """Fit a law to a table of runs: parameters with honest intervals, and what not to trust."""
    import mlx_forget.laws  # noqa: F401  (registers the published laws)
    from mlx_forget.laws import validate
    from mlx_forget.laws.files import fit_json, write_fit
    from mlx_forget.laws.fit import fit_groups, fit_law
    from mlx_forget.laws.forms import get_law
    from mlx_forget.laws.model import Constraints
    from mlx_forget.laws.uncertainty import assess
    from mlx_forget.tables import read_table

    chosen = get_law(law or DEFAULTS.law)
    options = fit_options(link, delta, allow_units, allow_duplicates)
    resampling = bootstrap_options(bootstrap, intervals, level, seed)
    constraints = Constraints(numbers(fix, "--fix"), pairs(tie, "--tie"), tuple(shared or ()))
    rows = read_table(table, mapping=pairs(mapping, "--map"), response=chosen.response)
    if where is not None:
        rows = rows.select(rows.where(where))
        if not rows.num_rows:
            raise UserError(f"No row meets --where {where!r}.")
    train, extrapolation, lines = rows, None, []
    if train_on is not None:
        mask = rows.where(train_on)
        if mask.all() or not mask.any():
            raise UserError(f"--train-on {train_on!r} keeps {int(mask.sum())} of {len(mask)} rows: leave some to predict.")
        train = rows.select(mask)
    if by is None:
        fits = {"": assess(fit_law(train, chosen, constraints=constraints, options=options), resampling)}
    elif shared:
        joint = assess(fit_law(train, chosen, constraints=constraints, by=by, options=options), resampling)
        fits = dict.fromkeys(joint.fit.model.groups, joint)
    else:
        made = fit_groups(train, chosen, by=by, constraints=constraints, options=options)
        fits = {group: assess(fit, resampling) for group, fit in made.items()}
    if train_on is not None:
        extrapolation = extrapolate(rows.select(~mask), fits, by, train_on)
    content = fit_json(fits, by=by, extrapolation=extrapolation)
    for group, uncertainty in fits.items():
        lines.extend(describe_fit(uncertainty, group))
    if extrapolation is not None:
        lines.append(
            f"held out {extrapolation['num_test']} rows (trained on {train_on}): mean error "
            f"{100 * extrapolation['mre']:.3g}%, "
            f"largest {100 * extrapolation['max']:.3g}%"
        )
    if leave_out and by is None:
        held = validate.leave_out(train, chosen, constraints=constraints, options=options, bootstrap=resampling)
        content["hold_outs"] = [
            {
                "left_out": h.name,
                "num_test": h.test.num_rows,
                "mre": h.mre,
                "max": h.worst,
                "covered": h.covered,
            }
            for h in held
        ]
        lines.extend(
            f"without {h.name}: mean error {100 * h.mre:.3g}% over {h.test.num_rows} rows, "
            f"{100 * h.covered:.0f}% inside 95% intervals"
            for h in held
        )
    if select and by is None:
        verdict = validate.select(rows, chosen, condition=train_on, options=options)
        content["selection"] = {
            "chosen": verdict.chosen,
            "verdict": verdict.verdict,
            "rivals": [{"name": r.name, "aicc": r.aicc, "hold_out": r.hold_out} for r in verdict.rivals],
        }
        lines.append(verdict.verdict)
    content = clean(content)
    if output is not None:
        content["draws"] = write_fit(output, content, fits).with_suffix(".draws.npz").name
        lines.append(f"wrote {output}")
    if plot is not None:
        from mlx_forget.law_plots import plot_fits

        lines.extend(f"wrote {path}" for path in plot_fits(fits, plot))
    for line in lines:
        say(line)
    if as_json:
        emit(content)


def fit_options(link: str | None, delta: float | None, allow_units: bool | None, allow_duplicates: bool | None) -> "FitOptions":
    from dataclasses import replace

    from mlx_forget.laws.fit import FitOptions

    options = FitOptions()
    objective = options.objective
    if link is not None:
        objective = replace(objective, link=link)
    if delta is not None:
        objective = replace(objective, delta=delta)
    return replace(options, objective=objective, allow_units=bool(allow_units), allow_duplicates=bool(allow_duplicates))


def bootstrap_options(resamples: int | None, method: str | None, level: float | None, seed: int | None) -> "BootstrapOptions":
    from mlx_forget.laws.uncertainty import METHODS, BootstrapOptions

    usual = BootstrapOptions()
    options = BootstrapOptions(
        num_resamples=DEFAULTS.num_resamples if resamples is None else resamples,
        method=usual.method if method is None else method,
        level=usual.level if level is None else level,
        seed=usual.seed if seed is None else seed,
    )
    if options.method not in METHODS:
        raise unknown("interval method", options.method, METHODS)
    if options.num_resamples < 0 or not 0 < options.level < 1:
        raise UserError("--bootstrap must be 0 or more and --level between 0 and 1.")
    return options


def extrapolate(test: "Table", fits: "Mapping[str, Uncertainty]", by: str | None, condition: str) -> dict[str, Any]:
    """Errors over the rows held out, one entry per point."""
    points = []
    parts = test.groups(by) if by is not None else {"": test}
    for group, part in parts.items():
        if group not in fits:
            continue
        fit = fits[group].fit
        predicted = fit.predict(part.columns, group=group or None)
        for row, measured, value in zip(part.row_numbers.tolist(), part.columns["loss"].tolist(), predicted.tolist(), strict=True):
            points.append({"row": row, "loss": measured, "predicted": value, "error": value / measured - 1})
    if not points:
        raise UserError(f"No held-out row belongs to a fitted group: --train-on {condition!r}.")
    errors = [abs(point["error"]) for point in points]
    return {
        "train_on": condition,
        "num_test": len(points),
        "mre": sum(errors) / len(errors),
        "max": max(errors),
        "points": points,
    }


def describe_fit(uncertainty: "Uncertainty", group: str) -> list[str]:
    """A fit in lines: objective, parameters with intervals and reasons, flags, warnings."""
    fit = uncertainty.fit
    head = f"{group}: " if group else ""
    lines = [
        f"{head}{fit.law.name}: {fit.law.formula}",
        f"  {fit.objective.describe(fit.num_rows)}: {fit.value:.6g}; {fit.table.num_clusters} "
        "independent runs; "
        f"mean relative error {100 * fit.mre:.3g}%",
        f"  {fit.certificate.reason}",
        f"  {100 * uncertainty.level:g}% intervals by {uncertainty.method}:",
    ]
    suffix = f"[{group}]"
    for name, interval in uncertainty.params.items():
        if "[" in name and not name.endswith(suffix):
            continue
        low = "-inf" if interval.low is None else f"{interval.low:.5g}"
        high = "inf" if interval.high is None else f"{interval.high:.5g}"
        note = f"   NOT TO BE TRUSTED: {interval.reason}" if interval.reason else ""
        lines.append(f"    {name.removesuffix(suffix):8} {interval.value:12.6g}   [{low}, {high}]{note}")
    for flag in fit.flags:
        if flag.remedy:
            lines.append(f"  to tell {' and '.join(flag.parameters)} apart: {flag.remedy}")
        elif flag.kind == "data":
            lines.append(f"  {flag.words}")
    lines.extend(f"  warning: {warning}" for warning in uncertainty.warnings)
    return lines


# ------------------------------------------------------------------------------------------------ predict


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


def predict_command(
    fit: Annotated[Path, typer.Argument(help="A fit.json.")],
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
    as_json: Json = None,
) -> None:
    """Predict a loss, or the forgetting, from a fit.json."""
    import numpy as np

    import mlx_forget.laws  # noqa: F401
    from mlx_forget.laws.files import read_fit
    from mlx_forget.laws.predictor import describe_distance
    from mlx_forget.laws.uncertainty import BootstrapOptions
    from mlx_forget.tables import parse_share

    predictor = read_fit(fit).pick(group)
    shares = {"p": p, "r": r, "R": share}
    given: dict[str, float | None] = {"N": n, "D": d, "P": trainable, "steps": steps, "L_ft": l_ft}
    given |= {name: None if text is None else parse_share(text) for name, text in shares.items()}
    is_forgetting = "L0" in predictor.law.columns and l0 is None
    columns = question(predictor.law, {**given, "L0": 0.0 if is_forgetting else l0})
    value = float(predictor.predict(columns)[0])
    coverage = BootstrapOptions().level if level is None else level
    if not 0 < coverage < 1:
        raise UserError(f"--level must lie between 0 and 1, and it is {coverage:g}.")
    low, high = (float(end[0]) for end in predictor.interval(columns, level=coverage))
    has_interval = len(predictor.draws) > 0 and bool(np.isfinite([low, high]).all())
    distance = describe_distance(predictor.distance(columns), predictor.data_range)
    what = "forgetting_nats" if is_forgetting else "loss"
    if as_json:
        emit(
            clean(
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
        )
    ends = f" [{low:.5g}, {high:.5g}]" if has_interval else " (no interval: the fit has no draws)"
    say(f"{'forgetting' if is_forgetting else 'loss'} {value:.5g} nats per token{ends}")
    if distance:
        say(f"outside the data: {distance}")
    for name, words in predictor.unidentified.items():
        say(f"{name} is not determined: {words}")


# ------------------------------------------------------------------------------------------------ advise


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
    law: Annotated[str | None, typer.Option(help="The law, where the source is a table.")] = None,
    mapping: Annotated[list[str] | None, typer.Option("--map", help="LAW_COLUMN=TABLE_COLUMN.")] = None,
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
    """The smallest p (or the largest D, the smallest N) that keeps forgetting under a budget."""
    import mlx_forget.laws  # noqa: F401
    from mlx_forget.laws import advise
    from mlx_forget.laws.design import describe_plan
    from mlx_forget.tables import parse_share

    if probe is not None:
        write_probe(probe, d, num_runs, as_json)
        return
    if source is None:
        raise UserError("Give a fit.json or a table of runs; with neither, start with --probe runs.jsonl --d TOKENS.")
    if max_forgetting is None:
        raise UserError("Give the budget: --max-forgetting 0.02 (nats per token).")
    predictor, notes = load_source(source, law, mapping, group, allow_units)
    usual = advise.AdviceOptions()
    options = advise.AdviceOptions(
        allow_extrapolation=bool(allow_extrapolation),
        confidence=usual.confidence if confidence is None else confidence,
    )
    if not 0 < options.confidence < 1:
        raise UserError(f"--confidence must lie between 0 and 1, and it is {options.confidence:g}.")
    passes = 1.0 if epochs is None else epochs
    known = {"N": n, "D": d, "p": None if p is None else parse_share(p)}
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
    solve = {"p": advise.smallest_share, "D": advise.largest_data, "N": advise.smallest_model}[unknown_column]
    answer = solve(predictor, fixed, max_forgetting=max_forgetting, options=options, epochs=passes)
    content: dict[str, Any] = {
        "question": answer.question,
        "unknown": answer.unknown,
        "answer": answer.answer,
        "columns": {name: value for name, value in answer.columns.items() if name != "L0"},
        "expected_forgetting_nats": answer.expected,
        "upper_forgetting_nats": answer.upper,
        "forgetting_without_replay_nats": answer.without_replay,
        "confidence": options.confidence,
        "cost": dict(answer.cost.__dict__),
        "outside_data": answer.distance,
        "words": answer.words,
    }
    for note in notes:
        say(note)
    say(answer.words)
    say(
        f"expected {answer.expected:.3g} nats, at most {answer.upper:.3g} "
        f"({100 * options.confidence:g}%); without replay "
        f"{answer.without_replay:.3g}; {answer.cost.injected_tokens:.3g} injected tokens, "
        f"{answer.cost.train_flops:.3g} FLOPs"
    )
    if finetuning is not None:
        content["pareto"] = front(predictor, finetuning, group, answer.columns, passes)
    if next_runs is not None:
        plan = plan_next(predictor, answer.columns, next_runs)
        content["next_runs"] = [dict(run) for run in plan.runs]
        say("the runs that sharpen this answer most per FLOP:")
        for line in describe_plan(plan):
            say(f"  {line}")
    if plot is not None:
        from mlx_forget.law_plots import plot_advice

        say(f"wrote {plot_advice(predictor, answer, max_forgetting, options.confidence, plot)}")
    if as_json:
        emit(clean(content))


def write_probe(path: Path, tokens: float | None, num_runs: int | None, as_json: bool | None) -> None:
    """Write the runs of a probe, one JSON object per line, and say what to do with them."""
    from mlx_forget.laws.design import probe_runs

    if tokens is None:
        raise UserError("A probe needs the planned number of finetuning tokens: --d 3e7.")
    runs = probe_runs(tokens, DEFAULTS.probe_runs if num_runs is None else num_runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    for run in runs:
        say(f"forget train --target-tokens {run['D']:.0f} --p {run['p']:g} ...")
    say(f"wrote {path}: finetune your model once per line, then `forget advise RUNS --max-forgetting BUDGET --d {tokens:g}`")
    if as_json:
        emit({"probe": str(path), "runs": runs})


def load_source(
    source: Path, law: str | None, mapping: list[str] | None, group: str | None, allow_units: bool | None
) -> "tuple[Predictor, list[str]]":
    """The predictor of a fit.json, or of a fit made on the spot to a table or a folder of runs."""
    from mlx_forget.laws.files import read_fit
    from mlx_forget.laws.fit import fit_law
    from mlx_forget.laws.forms import get_law
    from mlx_forget.laws.model import Constraints
    from mlx_forget.laws.predictor import Predictor
    from mlx_forget.laws.uncertainty import assess
    from mlx_forget.tables import read_table

    if source.suffix == ".json" and not source.is_dir():
        return read_fit(source).pick(group), []
    chosen = get_law(law or DEFAULTS.advise_law)
    table = read_table(source, mapping=pairs(mapping, "--map"), response=chosen.response)
    if group is not None:
        labelled = [name for name in table.labels if group in table.labels[name]]
        if not labelled:
            raise UserError(f"No row of {source} is labelled {group!r}.")
        table = table.select(table.labels[labelled[0]] == group)
    notes = [f"fitting {chosen.name} to {table.num_rows} runs of {source}"]
    constraints = Constraints()
    if chosen.name == DEFAULTS.advise_law and "D" in table.columns and len(set(table.columns["D"].tolist())) == 1:
        constraints = Constraints({"beta": 0.0})
        notes.append("all runs have one D, so the answer holds at that D only")
    made = assess(
        fit_law(table, chosen, constraints=constraints, options=fit_options(None, None, allow_units, None)),
        bootstrap_options(None, None, None, None),
    )
    notes.extend(made.warnings)
    return Predictor.from_uncertainty(made), notes


def front(
    forgetting: "Predictor", path: Path, group: str | None, columns: Mapping[str, float], epochs: float
) -> list[dict[str, Any]]:
    """The Pareto front of the asked size: fewer tokens forget less and learn less, replay forgets less and
    costs.
    """
    import numpy as np

    from mlx_forget.laws.advise import pareto
    from mlx_forget.laws.files import read_fit

    if "N" not in forgetting.law.columns:
        raise UserError(f"{forgetting.law.name} knows one model only: a Pareto front needs a law with N.")
    fewest = min(forgetting.data_range["D"][0], columns["D"])
    shares = np.array([0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05])
    choices = pareto(
        forgetting,
        read_fit(path).pick(group),
        sizes=np.array([columns["N"]]),
        tokens=np.geomspace(fewest, columns["D"], 7),
        shares=shares[shares <= forgetting.data_range["p"][1]],
        epochs=epochs,
    )
    say("target loss against forgetting, the runs that nothing beats:")
    for choice in choices:
        say(
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


# ------------------------------------------------------------------------------------------------ laws


def laws_command(
    name: Annotated[str | None, typer.Argument(help="One law, in full.")] = None,
    as_json: Json = None,
) -> None:
    """The laws that can be fitted: formula, columns, parameters, source."""
    import mlx_forget.laws  # noqa: F401
    from mlx_forget.laws.forms import get_law, laws

    chosen = list(laws()) if name is None else [get_law(name)]
    if as_json:
        emit({"laws": [clean(law_json(law)) for law in chosen]})
        return
    for law in chosen:
        say(f"{law.name:26} {law.formula}")
        if name is not None:
            say(f"  source      {law.source}")
            say(f"  columns     {', '.join(law.columns)}, loss")
            say(f"  linear in   {', '.join(law.linear) or '-'}")
            for parameter in law.parameters:
                unit = f" [{parameter.unit}]" if parameter.unit else ""
                say(f"  {parameter.name:10}  {parameter.meaning}{unit}; {parameter.low:g} to {parameter.high:g}")
            if law.alternatives:
                say(f"  rivals      {', '.join(alternative.name for alternative in law.alternatives)}")


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


app = typer.Typer()
register(app)
