"""Everything that a report says, gathered before anything is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget.errors import UserError
from mlx_forget.laws.advise import AdviceOptions
from mlx_forget.laws.files import fit_json
from mlx_forget.records import Run, installed_versions, read_record
from mlx_forget.report.curves import Panel, make_panels
from mlx_forget.report.fits import Fitted, Recommendation, fit_all, recommend
from mlx_forget.report.sources import Recipe, Runs, read_source, recipe_of
from mlx_forget.runs.rows import METHODS_OF_THE_LAWS, Row
from mlx_forget.studies.method_comparison import Row as MethodRow
from mlx_forget.studies.method_comparison import Trajectory, load_trajectories
from mlx_forget.studies.method_comparison import table as compare_methods

# Histories of more runs than this are not read to compare methods.
MOST_TRAJECTORIES = 300


@dataclass(frozen=True)
class Methods:
    """Methods against each other, or why not."""

    rows: list[MethodRow]
    trajectories: list[Trajectory]
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """A report.

    Args:
        panels: U-curves; `num_panels` of them there would be.
        curve_reason: why there are none.
        methods: None where the runs are of one method.
        confidence: that the law's recommendations keep within their budgets.
        versions: of this tool and its libraries as the report is made.
    """

    runs: Runs
    recipe: Recipe
    panels: list[Panel]
    num_panels: int
    curve_reason: str
    methods: Methods | None
    fits: list[Fitted]
    recommendations: list[Recommendation]
    confidence: float
    versions: dict[str, str]

    @property
    def finetunes(self) -> list[Row]:
        return self.runs.finetunes

    def distinct(self, column: str) -> list[Any]:
        """The values of a column over all runs, in order of appearance; of fingerprints, those of each source."""
        found = [value for value in dict.fromkeys(row.get(column) for row in self.runs.rows) if value is not None]
        if column != "fingerprints":
            return found
        return list(dict.fromkeys(source for value in found for source in str(value).split(", ")))

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "source": str(self.runs.source),
            "num_runs": len(self.runs.rows),
            "num_finetunes": len(self.finetunes),
            "num_diverged": len(self.runs.diverged),
            "left_out": self.runs.problems,
            "begun": self.runs.begun,
            "recipe": {"config": self.recipe.config, "axes": self.recipe.axes, "is_grid": self.recipe.is_grid},
            "curves": [_panel_json(panel) for panel in self.panels],
            "fits": [_fit_json(one) for one in self.fits],
            "recommendations": [_recommendation_json(one) for one in self.recommendations],
        }


def make_report(
    source: Path,
    *,
    where: str | None = None,
    status: str | None = None,
    budgets: Sequence[float] = (),
    confidence: float | None = None,
) -> Report:
    """Read runs, fit what they allow, and gather what there is to say.

    Raises:
        UserError: no runs, or none that finetuned and measured what was forgotten.
    """
    if any(not budget > 0 for budget in budgets):
        raise UserError("A budget of forgetting is a positive number of nats per token.")
    options = AdviceOptions() if confidence is None else AdviceOptions(confidence=confidence)
    if not 0 < options.confidence < 1:
        raise UserError(f"--confidence must lie between 0 and 1, and it is {options.confidence:g}.")
    runs = read_source(source, where=where, status=status)
    finetunes = runs.finetunes
    if not finetunes:
        raise UserError(
            f"{source} holds {len(runs.rows)} runs, and none is a finetune that ended well and measured a pretraining loss."
        )
    panels: list[Panel] = []
    num_panels, reason = 0, "This report was made from a table, which holds no histories: make it from the folder of the runs."
    methods = None
    if runs.root is not None:
        panels, num_panels = make_panels(finetunes, runs.root)
        reason = "" if panels else "No history can be read."
        if len({row["method"] for row in finetunes}) > 1:
            methods = _methods(finetunes, runs.root)
    described = [row for row in finetunes if row["method"] in METHODS_OF_THE_LAWS]
    fits = fit_all(finetunes)
    return Report(
        runs=runs,
        recipe=recipe_of(finetunes),
        panels=panels,
        num_panels=num_panels,
        curve_reason=reason,
        methods=methods,
        fits=fits,
        recommendations=recommend(described, fits, budgets, options=options),
        confidence=options.confidence,
        versions=installed_versions(),
    )


def _methods(rows: Sequence[Row], root: Path) -> Methods:
    if len(rows) > MOST_TRAJECTORIES:
        return Methods([], [], f"{len(rows):,} runs are too many to compare by method here: choose some with --where.")
    records = [(root / row["folder"], read_record(root / row["folder"])) for row in rows]
    try:
        trajectories = load_trajectories([Run(folder, record) for folder, record in records if record is not None])
        return Methods(compare_methods(trajectories), trajectories)
    except (UserError, KeyError, ValueError) as error:
        return Methods([], [], str(error))


def _panel_json(panel: Panel) -> dict[str, Any]:
    return {
        "name": panel.name,
        "by": list(panel.by),
        "runs": [
            {
                "name": name,
                "run_id": reading.curve.record["run_id"],
                "step": reading.curve.at_best["step"],
                "target_val": reading.target.mean,
                "pretrain_val": reading.pretrain.mean,
                "forgetting_nats": reading.forgetting.mean,
                "forgetting_stderr": reading.forgetting.stderr,
                "rise": reading.rise,
            }
            for name, reading in zip(panel.names, panel.readings, strict=True)
        ],
        "not_drawn": panel.left_out,
    }


def _fit_json(one: Fitted) -> dict[str, Any]:
    content: dict[str, Any] = {
        "domain": one.domain,
        "response": one.response,
        "num_runs": len(one.run_ids),
        "reason": one.reason or None,
    }
    if one.uncertainty is not None:
        content["fit"] = fit_json({"": one.uncertainty})
        content["hold_outs"] = [
            {"left_out": held.name, "num_test": held.test.num_rows, "mre": held.mre, "max": held.worst} for held in one.hold_outs
        ]
    return content


def _recommendation_json(one: Recommendation) -> dict[str, Any]:
    return {
        "domain": one.domain,
        "N": one.size,
        "D": one.tokens,
        "budget_nats": one.budget,
        "measured": None
        if one.measured is None
        else {"p": one.measured.share, "forgetting_nats": one.measured.forgetting, "run_ids": one.measured.run_ids},
        "law": None
        if one.advice is None
        else {"p": one.advice.answer, "expected": one.advice.expected, "upper": one.advice.upper, "words": one.advice.words},
        "reason": one.reason or None,
    }
