"""`forget fit`: a law, a table of runs, and what they say together."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.cli import completion
from mlx_forget.cli.answers import Json, clean, emit, numbers, pairs, say, tell
from mlx_forget.cli.options import ColumnMap
from mlx_forget.errors import UserError, unknown

if TYPE_CHECKING:
    from mlx_forget.laws.fit import FitOptions
    from mlx_forget.laws.forms import Law
    from mlx_forget.laws.model import Constraints
    from mlx_forget.laws.outliers import Pair
    from mlx_forget.laws.table import Table
    from mlx_forget.laws.uncertainty import BootstrapOptions, Uncertainty

DEFAULT_LAW = "bethune-forgetting"

app = typer.Typer()


@app.command("fit")
def fit_command(
    table: Annotated[Path, typer.Argument(help="CSV, Parquet, Arrow or JSONL, or a folder of runs.")],
    law: Annotated[
        str | None, typer.Option(help=f"A law of `forget laws`. \\[default: {DEFAULT_LAW}]", autocompletion=completion.laws)
    ] = None,
    by: Annotated[str | None, typer.Option(help="Fit every value of this column.")] = None,
    shared: Annotated[list[str] | None, typer.Option(help="A parameter that all groups share (joint fit).")] = None,
    fix: Annotated[list[str] | None, typer.Option(help="Hold a parameter: NAME=VALUE.")] = None,
    tie: Annotated[list[str] | None, typer.Option(help="Tie parameters: FOLLOWER=LEADER.")] = None,
    mapping: ColumnMap = None,
    where: Annotated[str | None, typer.Option(help="Keep these rows, such as 'p > 0'.")] = None,
    evaluations: Annotated[
        bool | None, typer.Option("--evaluations", help="Of run folders: every evaluation is a row, instead of each run's best.")
    ] = None,
    drop: Annotated[str | None, typer.Option(help="Leave these rows out as outliers; the fit with them is printed beside.")] = None,
    train_on: Annotated[str | None, typer.Option(help="Fit these rows, predict the others.")] = None,
    leave_out: Annotated[
        bool | None, typer.Option("--leave-out", help="Largest-N, largest-D, each-p, each-domain hold-outs.")
    ] = None,
    select: Annotated[bool | None, typer.Option("--select", help="Compare the law with its rivals.")] = None,
    link: Annotated[str | None, typer.Option(help="log or linear.")] = None,
    delta: Annotated[float | None, typer.Option(help="Huber delta; inf for least squares.")] = None,
    bootstrap: Annotated[int | None, typer.Option(help="Resamples of the independent observations.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="What one observation is: auto, row, run, repeat or base.", autocompletion=completion.cluster_levels),
    ] = None,
    intervals: Annotated[
        str | None, typer.Option(help="auto, cluster, profile, residual or bayesian.", autocompletion=completion.interval_methods)
    ] = None,
    level: Annotated[float | None, typer.Option(help="Coverage of the intervals.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the resampling.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write figures into this folder.")] = None,
    allow_units: Annotated[bool | None, typer.Option("--allow-units", help="Accept very small N or D.")] = None,
    allow_duplicates: Annotated[bool | None, typer.Option("--allow-duplicates", help="Accept repeated rows.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write fit.json here.")] = None,
    as_json: Json = None,
) -> None:
    """Fit a law to a table of runs: parameters with honest intervals, and what not to trust.

    Example: forget fit runs.csv --law bethune-forgetting --by domain -o fit.json
    """
    from mlx_forget.laws.files import check_target, fit_json, write_fit
    from mlx_forget.laws.fit import num_free
    from mlx_forget.laws.forms import get_law
    from mlx_forget.laws.model import Constraints
    from mlx_forget.laws.outliers import compare, without_far_rows
    from mlx_forget.laws.uncertainty import assess
    from mlx_forget.tables import read_table

    chosen = get_law(law or DEFAULT_LAW)
    options = fit_options(link, delta, allow_units, allow_duplicates)
    resampling = bootstrap_options(bootstrap, cluster, intervals, level, seed)
    constraints = Constraints(numbers(fix, "--fix"), pairs(tie, "--tie"), tuple(shared or ()))
    if shared and (leave_out or select):
        raise UserError("--leave-out and --select judge separate fits: give them without --shared.")
    if select and (fix or tie):
        raise UserError("--select compares whole laws with each other: give it without --fix and --tie.")
    for target in (output, None if plot is None else plot / "fit.png"):
        if target is not None:
            check_target(target)
    rows = read_table(
        table,
        mapping=pairs(mapping, "--map"),
        response=chosen.response,
        evaluations=bool(evaluations),
        adapters=not {"P", "L_ft"}.isdisjoint(chosen.columns),
    )
    if where is not None:
        rows = keep(rows, where)
    if by is not None:
        rows = without_small_groups(rows, by, num_free(chosen, constraints))
    report_left_out(rows)
    kept = rows if drop is None else without(rows, drop)
    train = kept if train_on is None else split(kept, train_on)[0]

    def fitted(part: "Table") -> "dict[str, Any]":
        return fit_all(part, chosen, by, constraints, options)

    fits: dict[str, Uncertainty] = {}
    for group, fit in fitted(train).items():
        # The groups of a joint fit share one fit, which is assessed once.
        first = next(iter(fits.values()), None)
        fits[group] = first if first is not None and first.fit is fit else assess(fit, resampling)
    extrapolation = None if train_on is None else extrapolate(split(kept, train_on)[1], fits, by, train_on)
    content = fit_json(fits, by=by, extrapolation=extrapolation)
    content["left_out"] = {reason: len(sources) for reason, sources in rows.left_out.items()}
    if drop is None:
        pairs_found = {
            group: without_far_rows(made.fit, by=by if shared else None, options=options) for group, made in fits.items()
        }
    else:
        whole = fitted(rows if train_on is None else split(rows, train_on)[0])
        pairs_found = {group: compare(whole[group], made.fit) for group, made in fits.items()}
    beside = {group: pair for group, pair in pairs_found.items() if pair is not None}
    content["outliers"] = {
        group: {"rows": pair.rows.tolist(), "params_with": pair.with_rows.params, "params_without": pair.without_rows.params}
        for group, pair in beside.items()
    }
    for hint in hints(train, chosen, by):
        say(f"note: {hint}")
    for group, uncertainty in fits.items():
        for line in describe_fit(uncertainty, group):
            tell(line)
        if group in beside:
            tell(describe_outliers(beside[group], dropped=drop is not None))
    if extrapolation is not None:
        tell(
            f"held out {extrapolation['num_test']} rows (trained on {train_on}): mean error "
            f"{100 * extrapolation['mre']:.3g}%, largest {100 * extrapolation['max']:.3g}%"
        )
    parts = {"": train} if by is None else train.groups(by)
    if leave_out:
        content["hold_outs"] = hold_outs(parts, chosen, constraints, options, resampling)
    if select:
        content["selection"] = selections({"": kept} if by is None else kept.groups(by), chosen, train_on, options)
    content = clean(content)
    if output is not None:
        content["draws"] = write_fit(output, content, fits).with_suffix(".draws.npz").name
        say(f"Wrote {output}")
    if plot is not None:
        from mlx_forget.law_plots import plot_fits

        for path in plot_fits(fits, plot):
            say(f"Wrote {path}")
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


def bootstrap_options(
    resamples: int | None, cluster: str | None, method: str | None, level: float | None, seed: int | None
) -> "BootstrapOptions":
    """The options of the bootstrap, with its own defaults where nothing was asked for."""
    from dataclasses import replace

    from mlx_forget.laws.clusters import AUTO, LEVELS
    from mlx_forget.laws.uncertainty import METHODS, BootstrapOptions

    asked = {"num_resamples": resamples, "cluster": cluster, "method": method, "level": level, "seed": seed}
    options = replace(BootstrapOptions(), **{name: value for name, value in asked.items() if value is not None})  # type: ignore[arg-type]
    if options.method not in METHODS:
        raise unknown("interval method", options.method, METHODS)
    if options.cluster not in (AUTO, *LEVELS):
        raise unknown("cluster level", options.cluster, (AUTO, *LEVELS))
    if options.num_resamples < 0 or not 0 < options.level < 1 or options.seed < 0:
        raise UserError("--bootstrap and --seed must be 0 or more, and --level between 0 and 1.")
    return options


def hints(table: "Table", law: "Law", by: str | None) -> list[str]:
    """What a user of such a table should know: domains fitted as one, and a law of sizes for one size."""
    made = []
    domains = sorted(set(table.labels.get("domain", [])))
    if by is None and len(domains) > 1:
        shown = ", ".join(domains[:4]) + (", ..." if len(domains) > 4 else "")
        made.append(f"{len(domains)} domains ({shown}) are fitted as one; --by domain fits a law to each")
    if law.name.startswith("bethune-forgetting") and len(set(table.columns["N"].tolist())) == 1:
        made.append("these runs have one model size, which cannot tell alpha; --law forgetting-fixed-n needs no sizes")
    return made


def report_left_out(table: "Table") -> None:
    """Say which runs of a folder are not in the table, and why."""
    from mlx_forget.tables import describe_left_out

    for phrase in describe_left_out(table.left_out):
        say(f"left out: {phrase}")


def keep(table: "Table", condition: str) -> "Table":
    kept = table.select(table.where(condition))
    if not kept.num_rows:
        raise UserError(f"No row meets --where {condition!r}.")
    return kept


def without_small_groups(table: "Table", by: str, num_free: int) -> "Table":
    """The rows of the groups that have at least as many rows as the law has free parameters; all of them where none has."""
    from dataclasses import replace

    import numpy as np

    groups = table.groups(by)
    small = {name: part.row_numbers for name, part in groups.items() if part.num_rows < num_free}
    if not small or len(small) == len(groups):
        return table
    reasons = {
        f"rows of {name}, too few for {num_free} free parameters": tuple(f"row {number}" for number in numbers)
        for name, numbers in small.items()
    }
    rest = table.select(~np.isin(table.row_numbers, np.concatenate(list(small.values()))))
    return replace(rest, left_out={**table.left_out, **reasons})


def without(table: "Table", condition: str) -> "Table":
    gone = table.where(condition)
    if gone.all() or not gone.any():
        raise UserError(f"--drop {condition!r} names {int(gone.sum())} of {len(gone)} rows: name some, and leave some.")
    return table.select(~gone)


def split(table: "Table", condition: str) -> "tuple[Table, Table]":
    """The rows that meet a condition, and the others."""
    mask = table.where(condition)
    if mask.all() or not mask.any():
        raise UserError(f"--train-on {condition!r} keeps {int(mask.sum())} of {len(mask)} rows: leave some to predict.")
    return table.select(mask), table.select(~mask)


def fit_all(table: "Table", law: "Law", by: str | None, constraints: "Constraints", options: "FitOptions") -> "dict[str, Any]":
    """The fits by group: one named "" without groups; the same one under every name for a joint fit."""
    from mlx_forget.laws.fit import fit_groups, fit_law

    if by is None:
        return {"": fit_law(table, law, constraints=constraints, options=options)}
    if constraints.shared:
        joint = fit_law(table, law, constraints=constraints, by=by, options=options)
        return dict.fromkeys(joint.model.groups, joint)
    return dict(fit_groups(table, law, by=by, constraints=constraints, options=options))


def extrapolate(test: "Table", fits: "Mapping[str, Uncertainty]", by: str | None, condition: str) -> dict[str, Any]:
    """Errors over the rows held out, one entry per point."""
    points = []
    from mlx_forget.laws.table import check_columns

    check_columns(test, (*next(iter(fits.values())).fit.law.columns, "loss"), allow_units=True)
    parts = test.groups(by) if by is not None else {"": test}
    for group, part in parts.items():
        if group not in fits:
            continue
        predicted = fits[group].fit.predict(part.columns, group=group or None)
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


def hold_outs(
    parts: "Mapping[str, Table]", law: "Law", constraints: "Constraints", options: "FitOptions", resampling: "BootstrapOptions"
) -> list[dict[str, Any]]:
    """The standard hold-outs of every group, said and returned."""
    from mlx_forget.laws.validate import leave_out

    made = []
    for group, part in parts.items():
        domain = "domain" if len(set(part.labels.get("domain", []))) > 1 else None
        for held in leave_out(part, law, constraints=constraints, options=options, bootstrap=resampling, domain=domain):
            made.append(
                {
                    "group": group,
                    "left_out": held.name,
                    "num_test": held.test.num_rows,
                    "mre": held.mre,
                    "max": held.worst,
                    "covered": held.covered,
                }
            )
            inside = (
                f", {100 * held.covered:.0f}% inside {100 * resampling.level:.3g}% intervals" if resampling.num_resamples else ""
            )
            words = f"without {held.name}: mean error {100 * held.mre:.3g}% over {held.test.num_rows} rows"
            tell(f"{group}: " * bool(group) + words + inside)
    return made


def selections(parts: "Mapping[str, Table]", law: "Law", condition: str | None, options: "FitOptions") -> Any:
    """The choice among the law's rivals, said and returned: one for an ordinary fit, one per group otherwise."""
    from mlx_forget.laws.validate import select

    made = {}
    for group, part in parts.items():
        verdict = select(part, law, condition=condition, options=options)
        tell(f"{group}: " * bool(group) + verdict.verdict)
        made[group] = {
            "chosen": verdict.chosen,
            "verdict": verdict.verdict,
            "rivals": [{"name": r.name, "aicc": r.aicc, "hold_out": r.hold_out} for r in verdict.rivals],
        }
    return made[""] if set(made) == {""} else made


def describe_fit(uncertainty: "Uncertainty", group: str) -> list[str]:
    """A fit in lines: objective, parameters with intervals and reasons, flags, warnings."""
    fit = uncertainty.fit
    head = f"{group}: " if group else ""
    lines = [
        f"{head}{fit.law.name}: {fit.law.formula}",
        f"  {fit.objective.describe(fit.num_rows)}: {fit.value:.6g}; {uncertainty.clusters.describe()}; "
        f"mean relative error {100 * fit.mre:.3g}%",
        f"  {fit.certificate.reason}",
        f"  {100 * uncertainty.level:g}% intervals by {uncertainty.method}:",
    ]
    suffix = f"[{group}]"
    said: dict[str, str] = {}
    for name, interval in uncertainty.params.items():
        if "[" in name and not name.endswith(suffix):
            continue
        short = name.removesuffix(suffix)
        low = "-inf" if interval.low is None else f"{interval.low:.5g}"
        high = "inf" if interval.high is None else f"{interval.high:.5g}"
        note = ""
        if name.split("[")[0] in fit.constraints.fixed:
            note = "   fixed"
        elif interval.reason:
            note = f"   NOT TO BE TRUSTED: {f'as {said[interval.reason]}' if interval.reason in said else interval.reason}"
            said.setdefault(interval.reason, short)
        lines.append(f"    {short:8} {interval.value:12.6g}   [{low}, {high}]{note}")
    remedies: dict[str, list[str]] = {}
    for flag in fit.flags:
        if flag.remedy:
            remedies.setdefault(flag.remedy, []).extend(flag.parameters)
        elif flag.kind == "data":
            lines.append(f"  {flag.words}")
    lines.extend(f"  to determine {', '.join(names)}: {remedy}" for remedy, names in remedies.items())
    lines.extend(f"  warning: {warning}" for warning in uncertainty.warnings)
    return lines


def describe_outliers(pair: "Pair", *, dropped: bool) -> str:
    from mlx_forget.laws.outliers import FAR

    count, names = len(pair.names), list(dict.fromkeys(pair.names))
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    named = f"{count} row{'' if count == 1 else 's'} ({shown})"
    what = "left out by --drop" if dropped else f"more than {FAR:g} noise standard deviations off the law, and in the fit"
    return f"  outliers: {named}, {what}; {pair.describe()}"
