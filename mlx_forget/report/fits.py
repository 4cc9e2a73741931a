"""The laws that a report's runs allow, with intervals and hold-outs; and the shares p that they recommend."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_forget.errors import UserError
from mlx_forget.laws.advise import Advice, AdviceOptions, solve
from mlx_forget.laws.choice import Choice, choose_law
from mlx_forget.laws.fit import FitOptions, fit_law
from mlx_forget.laws.predictor import Predictor
from mlx_forget.laws.uncertainty import BootstrapOptions, Uncertainty, assess
from mlx_forget.laws.validate import HoldOut, leave_out
from mlx_forget.report.sources import unread_keys
from mlx_forget.runs.rows import METHODS_OF_THE_LAWS, Row, fitted_rows
from mlx_forget.table_files import table_from_rows

RESPONSES = {"pretraining": "Forgetting", "target": "Target loss"}
# Resamples for many rows: the ends of an interval that is this narrow need no more.
NUM_RESAMPLES, MANY_ROWS, FEW_RESAMPLES = 1000, 2000, 300
# Budgets where none is given, as shares of what is forgotten without replay.
BUDGET_SHARES = (0.75, 0.5, 0.25)
MOST_CELLS = 8
# Small models are meant: the numbers are counts, whatever they are.
_OPTIONS = FitOptions(allow_units=True)


@dataclass(frozen=True)
class Fitted:
    """A law fitted to the runs of one domain, or why there is none.

    Args:
        response: "pretraining" or "target".
        reason: why nothing was fitted; "" where it was.
        run_ids: of the rows.
    """

    domain: str
    response: str
    run_ids: list[str]
    choice: Choice | None = None
    uncertainty: Uncertainty | None = None
    hold_outs: list[HoldOut] = field(default_factory=list)
    reason: str = ""

    @property
    def predictor(self) -> Predictor | None:
        return None if self.uncertainty is None else Predictor.from_uncertainty(self.uncertainty)


def fit_all(rows: Sequence[Row]) -> list[Fitted]:
    """The law of forgetting and that of the target loss, for each domain."""
    made = []
    for response in RESPONSES:
        fitted, _ = fitted_rows(((str(row["run"]), row) for row in rows), response=response)
        others = {row["method"] for row in fitted} - set(METHODS_OF_THE_LAWS)
        for domain in sorted({row["domain"] for row in fitted}):
            part = [row for row in fitted if row["domain"] == domain]
            ids = [str(row["run"]) for row in part]
            try:
                if others:
                    raise UserError(
                        f"the runs are of {', '.join(sorted(others))}, and the laws describe finetuning with and without injected data"
                    )
                made.append(_fit(part, ids, domain, response))
            except UserError as error:
                made.append(Fitted(domain, response, ids, reason=str(error)))
    return made


def _fit(rows: list[Row], ids: list[str], domain: str, response: str) -> Fitted:
    unread = unread_keys(rows)
    if unread:
        raise UserError(
            f"the runs also differ in {', '.join(unread)}, which no law reads: report on runs that agree in it, as with "
            f"--where '{_condition(rows, unread[0])}'"
        )
    table = table_from_rows(rows)
    choice = choose_law(table, response=response)
    fit = fit_law(table, choice.law, constraints=choice.constraints, options=_OPTIONS)
    num_resamples = NUM_RESAMPLES if table.num_rows <= MANY_ROWS else FEW_RESAMPLES
    uncertainty = assess(fit, BootstrapOptions(num_resamples=num_resamples))
    held = leave_out(table, choice.law, constraints=choice.constraints, options=_OPTIONS)
    return Fitted(domain, response, ids, choice, uncertainty, held)


def _condition(rows: Sequence[Row], key: str) -> str:
    values = [row.get("learning_rate_asked" if key == "learning_rate" else key) for row in rows]
    most = max(set(values), key=values.count)
    name = "learning_rate_asked" if key == "learning_rate" else key
    return f'{name} == "{most}"' if isinstance(most, str) else f"{name} == {most}"


# ------------------------------------------------------------------------------------------------ recommended p


@dataclass(frozen=True)
class Measured:
    """The smallest share that was run and kept within a budget: the mean over its runs, nats."""

    share: float
    forgetting: float
    run_ids: list[str]


@dataclass(frozen=True)
class Recommendation:
    """The smallest p that keeps forgetting under a budget, for one model and one amount of data.

    Args:
        budget: nats per token.
        measured: from the runs alone; None where no share that was run keeps within it.
        advice: from the law; None with a reason.
        num_runs: that were made of this model with this amount of data.
    """

    domain: str
    size: float
    tokens: float
    budget: float
    measured: Measured | None
    advice: Advice | None
    reason: str
    num_runs: int


def recommend(
    rows: Sequence[Row], fits: Sequence[Fitted], budgets: Sequence[float], *, options: AdviceOptions
) -> list[Recommendation]:
    """Recommendations for the models and amounts of data that were run, evenly spread over them.

    Args:
        rows: runs of injection, and without.
        budgets: nats; empty takes shares of what is forgotten without replay.
    """
    cells: dict[tuple[str, float, float], list[Row]] = {}
    for row in rows:
        if row["method"] in METHODS_OF_THE_LAWS and row["D"] and row["p"] is not None:
            cells.setdefault((row["domain"], float(row["N"]), float(row["D"])), []).append(row)
    # Where the data is a continuum, a single run says nothing about p.
    told = {key: part for key, part in cells.items() if len({row["p_asked"] for row in part}) > 1}
    if not told and any(one.choice is not None and "p" in one.choice.law.columns for one in fits):
        told = cells
    keys = sorted(told)
    if len(keys) > MOST_CELLS:
        keys = [keys[round(number * (len(keys) - 1) / (MOST_CELLS - 1))] for number in range(MOST_CELLS)]
    made = []
    for key in keys:
        law = next((one for one in fits if one.domain == key[0] and one.response == "pretraining"), None)
        for budget in budgets or _usual_budgets(told[key], law, key):
            made.append(_recommend(key, told[key], law, budget, options))
    return made


def _usual_budgets(rows: Sequence[Row], law: Fitted | None, key: tuple[str, float, float]) -> list[float]:
    without = [float(row["forgetting_nats"]) for row in rows if not row["p"]]
    whole = float(np.mean(without)) if without else max(float(row["forgetting_nats"]) for row in rows)
    return [float(f"{share * whole:.2g}") for share in BUDGET_SHARES] if whole > 0 else []


def _recommend(
    key: tuple[str, float, float], rows: Sequence[Row], law: Fitted | None, budget: float, options: AdviceOptions
) -> Recommendation:
    domain, size, tokens = key
    by_share: dict[float, list[Row]] = {}
    for row in rows:
        by_share.setdefault(round(float(row["p"]), 6), []).append(row)
    measured = None
    for share, part in sorted(by_share.items()):
        mean = float(np.mean([row["forgetting_nats"] for row in part]))
        if mean <= budget:
            measured = Measured(share, mean, [str(row["run"]) for row in part])
            break
    advice, reason = None, ""
    predictor = None if law is None else law.predictor
    if law is None or predictor is None:
        reason = "no law: see above"
    elif "p" not in predictor.law.columns:
        reason = "the law has no p, since every run has the same"
    else:
        columns = {name: value for name, value in (("N", size), ("D", tokens)) if name in predictor.law.columns}
        try:
            advice = solve(predictor, columns, "p", max_forgetting=budget, options=options)
        except UserError as error:
            reason = str(error)
    return Recommendation(domain, size, tokens, budget, measured, advice, reason, len(rows))
