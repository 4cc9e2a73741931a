"""`forget plot`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_forget.cli.answers import clean, emit, say, works_in
from mlx_forget.token_counts import short_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_forget.records import Run
    from mlx_forget.studies.capacity_slices import Axis
    from mlx_forget.studies.method_comparison import Trajectory

app = typer.Typer()

# What a figure is made of: plain values, and the same as lines.
_Answer = tuple[dict[str, Any], list[str]]

SLICES = ("model-size", "pretrain-length")
KINDS = ("figure1", "methods", "learning-rate", *SLICES, "stages", "toy", "ranks", "laws")


@app.command()
def plot(
    sweep: Annotated[
        Path,
        typer.Argument(help="Folder of a sweep over p, methods or learning rates; for laws also a table of `forget runs export`."),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the files. \\[default: figures]")] = None,
    name: Annotated[str | None, typer.Option(help="Stem of the files. \\[default: the name of the folder or table]")] = None,
    seed: Annotated[int | None, typer.Option(help="The only seed that is read. \\[default: all]")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="figure1 (runs that differ in p), methods, learning-rate, model-size, pretrain-length, stages, toy (of "
            "mlx_forget.studies.toy_continual), ranks (runs compared with their start model), or laws (sizes, amounts of target data "
            "and p). \\[default: what the runs differ in]",
            autocompletion=lambda: list(KINDS),
        ),
    ] = None,
    max_forgetting: Annotated[
        float | None,
        typer.Option(
            help="Methods: also read each at its best evaluation that forgot at most so many nats. \\[default: the runs' own]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as one JSON object.")] = False,
) -> None:
    """Draw Figure 1, methods or learning rates from the runs of a sweep, and print what is read at the minimum.

    Writes PNG, PDF and CSV; for laws also a fit.json and the study as JSON, of which its tables in Markdown are made.

    Example: forget plot runs/figure1 --output figures
    """
    from dataclasses import asdict

    from mlx_forget.durable_files import folder_for
    from mlx_forget.errors import UserError, unknown
    from mlx_forget.records import find_runs
    from mlx_forget.runs.missing import missing_lines, missing_runs

    is_table = sweep.is_file() and kind == "laws"
    if sweep.is_file() and not is_table:
        raise UserError(f"{sweep} is a file: --kind laws draws an exported table, every other kind a folder of runs.")
    if not sweep.is_dir() and not is_table:
        raise UserError(f"There is no sweep folder {sweep}.")
    runs = list(find_runs(sweep))
    said = next((name for name in ("stages", "toy") if (sweep / f"{name}.json").is_file()), None)
    chosen = kind or said or _kind_of(runs)
    if chosen not in KINDS:
        raise unknown("kind of figure", chosen, KINDS)
    if seed is not None and chosen in ("stages", "toy"):
        raise UserError(f"A figure of {chosen} has one seed, that of its folder: leave --seed out.")
    folder, stem = output or Path("figures"), name or (sweep.stem if is_table else sweep.resolve().name)
    works_in(folder)
    missing = [] if is_table else missing_runs(sweep)
    for line in missing_lines(missing):
        say(line)
    with folder_for(folder):
        content, lines = _draw(chosen, sweep, runs, folder / stem, seed, max_forgetting)
    suffixes = (".png", ".pdf", *((".csv",) if not is_table else ()), *((".json", ".fit.json") if chosen == "laws" else ()))
    files = [path for path in (f"{folder / stem}{suffix}" for suffix in suffixes) if Path(path).is_file()]
    if as_json:
        emit({**content, "files": files, "missing": [asdict(one) for one in missing]})
    else:
        print("\n".join(lines))
    say(f"Wrote {', '.join([files[0], *(path.removeprefix(str(folder / stem)) for path in files[1:])])}")


def _draw(kind: str, sweep: Path, runs: "list[Run]", stem: Path, seed: int | None, max_forgetting: float | None) -> _Answer:
    if kind == "stages":
        return _plot_stages(sweep, stem)
    if kind == "toy":
        return _plot_toy(sweep, stem)
    if kind == "methods":
        return _plot_methods(runs, stem, seed, max_forgetting)
    if kind == "laws":
        return _plot_laws(sweep, runs, stem, seed)
    if kind in SLICES:
        return _plot_slices(runs, stem, seed, kind)
    draw = {"ranks": _plot_ranks, "learning-rate": _plot_rates, "figure1": _plot_figure1}[kind]
    return draw(runs, stem, seed)


def _plot_figure1(runs: "list[Run]", stem: Path, seed: int | None) -> _Answer:
    from mlx_forget.plots import draw_figure1
    from mlx_forget.studies.figure1 import as_json, load_curves, table, table_lines, write_csv

    curves = load_curves(runs, seed)
    rows = table(curves)
    record = curves[0].record
    config = record["config"]
    seeds = sorted({curve.seed for curve in curves})
    title = (
        f"{short_count(record['num_params'])} parameters, {config['pretrain']} to {config['target']}, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    )
    _save(draw_figure1(curves, title=title), stem)
    write_csv(curves, stem.with_name(f"{stem.name}.csv"))
    return as_json(rows), table_lines(rows)


def _plot_methods(runs: "list[Run]", stem: Path, seed: int | None, max_forgetting: float | None) -> _Answer:
    from mlx_forget.studies.method_comparison import as_json, load_trajectories, table, table_lines, write_csv
    from mlx_forget.studies.method_plots import draw_methods

    trajectories = load_trajectories(runs, seed)
    rows = table(trajectories, max_forgetting=max_forgetting)
    figure = draw_methods(trajectories, title=f"{_setting(trajectories)}, seed {trajectories[0].seed}")
    _save(figure, stem)
    write_csv(trajectories, stem.with_name(f"{stem.name}.csv"))
    return {"rows": as_json(rows)}, table_lines(rows)


def _plot_rates(runs: "list[Run]", stem: Path, seed: int | None) -> _Answer:
    from mlx_forget.studies.method_comparison import load_trajectories, write_csv
    from mlx_forget.studies.method_plots import draw_rates
    from mlx_forget.studies.rate_tradeoff import common_target_loss, point_lines, points, points_as_json

    trajectories = load_trajectories(runs, seed)
    level, found = common_target_loss(trajectories), points(trajectories)
    figure = draw_rates(found, level, title=_setting(trajectories))
    _save(figure, stem)
    write_csv(trajectories, stem.with_name(f"{stem.name}.csv"))
    return points_as_json(found, level), point_lines(found, level)


def _plot_slices(runs: "list[Run]", stem: Path, seed: int | None, kind: str) -> _Answer:
    from mlx_forget.studies.capacity_slices import slice_lines, slice_points, slices_as_json, target_loss
    from mlx_forget.studies.method_comparison import load_trajectories, write_csv
    from mlx_forget.studies.method_plots import draw_slices

    axis: Axis = "model-size" if kind == "model-size" else "pretrain-length"
    trajectories = load_trajectories(runs, seed)
    level = target_loss(trajectories)
    found = slice_points(trajectories, axis, level)
    config = trajectories[0].record["config"]
    figure = draw_slices(found, axis, level, title=f"{config['pretrain']} to {config['target']}")
    _save(figure, stem)
    write_csv(trajectories, stem.with_name(f"{stem.name}.csv"))
    return slices_as_json(found, axis, level), slice_lines(found, axis, level)


def _plot_ranks(runs: "list[Run]", stem: Path, seed: int | None) -> _Answer:
    from mlx_forget.studies import rank_study
    from mlx_forget.studies.rank_plots import draw_study

    points = rank_study.load_points(runs, seed)
    lines, joint = rank_study.fit_lines(points), rank_study.fit_joint(points)
    beside = rank_study.hold_beside(points, lines)
    record = next(run.record for run in runs if run.record["run_id"] == points[0].run)
    title = f"{short_count(record['num_params'])} parameters, pretrained on {record['config']['pretrain']}"
    figure = draw_study(points, lines, joint, title=title)
    _save(figure, stem)
    rank_study.write_csv(points, stem.with_name(f"{stem.name}.csv"))
    return rank_study.as_json(lines, beside, joint), rank_study.study_lines(lines, beside, joint)


def _plot_laws(sweep: Path, runs: "list[Run]", stem: Path, seed: int | None) -> _Answer:
    """From run folders, or from an exported table, with the evaluations that stand beside it as a CSV file of that name."""
    import json

    from mlx_forget.durable_files import write_text
    from mlx_forget.laws.files import fit_json, write_fit
    from mlx_forget.runs.export import read_export
    from mlx_forget.studies.evaluations import read_evaluations, write_evaluations
    from mlx_forget.studies.law_study import analyse, load_cells, make_cells, smoothed_reading
    from mlx_forget.studies.law_study_plot import draw_law_study
    from mlx_forget.studies.law_study_text import study_lines
    from mlx_forget.tables import describe_left_out

    runs = [run for run in runs if seed in (None, run.record["seed"])]
    if sweep.is_file():
        beside = sweep.with_suffix(".csv")
        evaluations = read_evaluations(beside) if beside.is_file() and beside != sweep else {}
        rows = [row for row in read_export(sweep) if seed in (None, row["seed"])]
        cells, others = make_cells(rows, {run: smoothed_reading(own) for run, own in evaluations.items()})
    else:
        cells, others = load_cells(runs)
    for phrase in describe_left_out(others):
        say(f"left out: {phrase}")
    study = analyse(cells)
    content = clean(study.content)
    row = cells[0].row
    title = f"{row['pretrain']} to {', '.join(content['axes']['domain'])}: {len(cells)} runs"
    _save(draw_law_study(content, title=title), stem)
    write_text(stem.with_name(f"{stem.name}.json"), json.dumps(content, indent=1, allow_nan=False) + "\n")
    if study.fits:
        write_fit(stem.with_name(f"{stem.name}.fit.json"), clean(fit_json(study.fits, by="domain")), study.fits)
    if runs:
        write_evaluations(runs, stem.with_name(f"{stem.name}.csv"))
    return content, study_lines(content)


def _plot_stages(sweep: Path, stem: Path) -> _Answer:
    from mlx_forget.errors import UserError
    from mlx_forget.studies.loss_matrix import FILE, read_matrices, summary, table_lines, write_csv
    from mlx_forget.studies.stage_plots import draw_stages

    matrices = read_matrices(sweep / FILE)
    if not matrices:
        raise UserError(f"{sweep} holds no finished stages ({FILE}): run a recipe with stages into it.")
    figure = draw_stages(
        matrices, title=f"{sweep.resolve().name}: {', then '.join(matrices[0].columns[matrices[0].first_stage :])}"
    )
    _save(figure, stem)
    write_csv(matrices, stem.with_name(f"{stem.name}.csv"))
    return {"chains": [summary(matrix) for matrix in matrices]}, table_lines(matrices)


def _plot_toy(sweep: Path, stem: Path) -> _Answer:
    from mlx_forget.errors import UserError
    from mlx_forget.studies.stage_plots import draw_exact_match
    from mlx_forget.studies.toy_continual import FILE, read_outcome, table_lines, write_csv

    outcome = read_outcome(sweep)
    if outcome is None:
        raise UserError(f"{sweep} holds no {FILE}: python -m mlx_forget.studies.toy_continual --output {sweep}")
    _save(draw_exact_match(outcome, title=f"{', then '.join(outcome.spec.tasks)}, one after another"), stem)
    write_csv(outcome, stem.with_name(f"{stem.name}.csv"))
    return outcome.as_json(), table_lines(outcome)


def _kind_of(runs: "list[Run]") -> str:
    """The figure that shows what the runs differ in."""

    def values(key: str) -> int:
        return len({str(run.record["config"].get(key)) for run in runs})

    if len(runs) > 1 and all(run.record["config"].get("compare_to_start") for run in runs):
        return "ranks"
    if any(run.record["config"].get("fine_tune_type", "full") != "full" for run in runs):
        return "methods"
    if values("method") == 1 and values("model") > 1 and values("target_tokens") > 1:
        return "laws"
    if values("method") > 1 and (values("model") > 1 or values("base") > 1):
        return "model-size" if values("model") > 1 else "pretrain-length"
    return "learning-rate" if values("learning_rate") > 1 else "methods" if values("method") > 1 else "figure1"


def _setting(trajectories: "list[Trajectory]") -> str:
    record = trajectories[0].record
    return f"{short_count(record['num_params'])} parameters, {record['config']['pretrain']} to {record['config']['target']}"


def _save(figure: "Figure", stem: Path) -> None:
    from mlx_forget.plots import save_figure

    for suffix in (".png", ".pdf"):
        save_figure(figure, stem.with_name(stem.name + suffix))
