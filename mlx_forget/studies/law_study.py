"""What a sweep over sizes, domains, amounts of data and shares p says about the laws of forgetting and of the target loss.

The laws are fitted to each domain by `mlx_forget.laws`, on total and on non-embedding parameters, held out at the largest size and the
largest D, and compared with their rivals. A run that has no minimum to read, or that had seen fewer than `LEAST_INJECTED_ROWS` rows of
pretraining data there, is listed and left out; the same fits with those runs, and with the minimum of a smoothed target loss, stand beside.
Bethune et al. (ICML 2025) report 0.83% and 2.01% at their held-out largest size and D, for the two laws.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_forget.errors import UserError
from mlx_forget.history import read_history
from mlx_forget.laws.choice import Choice, choose_law
from mlx_forget.laws.fit import FitOptions, fit_law
from mlx_forget.laws.fitted import Fit
from mlx_forget.laws.forms import Alternative, Law
from mlx_forget.laws.profiles import Interval
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, Uncertainty, assess
from mlx_forget.laws.validate import HoldOut, leave_out, select
from mlx_forget.pipeline.mixture import parse_share
from mlx_forget.pipeline.shares import constant_share
from mlx_forget.records import Run
from mlx_forget.runs.rows import Row, fitted_rows, record_row
from mlx_forget.table_files import table_from_rows

# A share of pretraining data that put fewer rows than these into the run is no measurement of it.
LEAST_INJECTED_ROWS = 8
# Evaluations that a smoothed loss is the mean of.
SMOOTHED_OVER = 5
# The largest share in the paper. Above it, a base that saw few tokens may be pretrained further rather than kept.
LARGEST_PAPER_SHARE = 0.05
# The paper's held-out errors (Table 4: fitted up to 334M parameters and 3M tokens, asked for 1.27B and 30M), by response.
PAPER_HELD_OUT = {"pretraining": 0.0083, "target": 0.0201}
READINGS = {
    "total": "at the minimum, N of all parameters",
    "non-embedding": "at the minimum, N without embeddings",
    "p to 5%": "without p above 5%, the paper's largest",
    "smoothed": f"at the minimum of the mean of {SMOOTHED_OVER} evaluations",
    "all runs": "with the runs that are left out",
}
# What competes besides the rivals that the law names itself. With an exponent of its own, p divides N or D, or neither.
_OWN_EXPONENT = "own exponent of p"
_INSIDE_OWN_EXPONENT = ("p on N", "p on D")
_MORE_RIVALS = {
    "bethune-forgetting": (
        Alternative("no D", "bethune-forgetting", fixed={"beta": 0.0}, inside=("p on N", "p saturates", "with E")),
        Alternative("no N", "forgetting-fixed-n", inside=(_OWN_EXPONENT,)),
        Alternative(_OWN_EXPONENT, "bethune-forgetting/own-exponent"),
    ),
    "bethune-finetuning": (
        Alternative("no N", "bethune-finetuning", fixed={"alpha": 0.0}, inside=("finetuning",)),
        Alternative("no D", "bethune-finetuning", fixed={"beta": 0.0}, inside=("finetuning",)),
    ),
}
_OPTIONS = FitOptions(allow_units=True)
# Rows of hold-outs are few: their share inside the intervals needs no more.
_FEW_RESAMPLES = 200


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Args:
        row: its record as one flat row (`runs.rows`).
        injected_rows: rows of pretraining data that it had seen at its minimum.
        left_out: why the fits leave it out; "" where they do not.
        smoothed: what is read at the minimum of the smoothed target loss, {steps, L_ft, loss}; None without a history.
    """

    row: Row
    injected_rows: float
    left_out: str
    smoothed: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Study:
    """The result: everything that is printed and drawn, as plain values, and the fits that predict.

    Args:
        content: what `law_study_text` and `law_study_plot` read.
        fits: the law of forgetting by domain, on total N.
    """

    content: dict[str, Any]
    fits: dict[str, Uncertainty]


def load_cells(runs: Sequence[Run]) -> tuple[list[Cell], dict[str, list[str]]]:
    """The finetuning runs of a sweep with the reading of their histories, and the ids of the others by reason.

    Raises:
        UserError: there is none that a law could be fitted to.
    """
    return make_cells(
        [record_row(run.record) for run in runs],
        {run.record["run_id"]: smoothed_reading(read_history(run.history).to_pylist()) for run in runs},
    )


def make_cells(
    rows: Iterable[Row], smoothed: Mapping[str, Mapping[str, float] | None] | None = None
) -> tuple[list[Cell], dict[str, list[str]]]:
    """The cells of flat rows, as of a table that `forget runs export` wrote, ordered by domain, N, D, p and seed.

    Also the ids of the rows that are no cells, by reason, a phrase that follows a number.

    Args:
        smoothed: the smoothed reading by run id.

    Raises:
        UserError: there is no finetuning run with a constant p among them that measured a pretraining loss.
    """
    constant, without_share = list[Row](), dict[str, list[str]]()
    for row in rows:
        if row["p_asked"] is None:
            without_share.setdefault("whose p is not said", []).append(str(row["run"]))
        elif constant_share(str(row["p_asked"])) is None:
            without_share.setdefault("whose p changes along the run, which is no p of the laws", []).append(str(row["run"]))
        else:
            constant.append(row)
    found, others = fitted_rows(((str(row["run"]), row) for row in constant), response="pretraining", adapters=False)
    others |= without_share
    if not found:
        raise UserError("There are no finished finetuning runs here that measured a pretraining loss.")
    cells = []
    for row in sorted(found, key=lambda row: (row["domain"], row["N"], row["D"], row["p"], row["seed"])):
        cells.append(Cell(row, injected_rows(row), left_out(row), (smoothed or {}).get(row["run"])))
    return cells, others


def injected_rows(row: Row) -> float:
    """The rows of pretraining data that a run had seen at its minimum."""
    return float(row["steps"] * row["batch_size"] * (row["p_rows"] or 0.0))


def left_out(row: Row) -> str:
    """Why a run measures no point of a law, or "": it ended before its stop rule had seen a minimum, or p came to too few rows."""
    if row["stop_patience"] and (row["status"] == "finished" or row.get("stopped_by") not in (None, "patience")):
        by = "" if row["status"] == "finished" else f", where {str(row['stopped_by']).replace('_', ' ')} stopped it"
        return f"no minimum within {row['num_steps']:,} steps{by}"
    if parse_share(str(row["p_asked"])) > 0 and injected_rows(row) < LEAST_INJECTED_ROWS:
        return f"{injected_rows(row):.0f} injected rows at the minimum"
    return ""


def smoothed_reading(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """What is read where the mean target loss of neighbouring evaluations of a run is lowest; None where they are few."""
    rows = [row for row in evaluations if row["step"] > 0 and row["pretrain_val_loss"] is not None]
    if len(rows) < SMOOTHED_OVER:
        return None
    kernel = np.full(SMOOTHED_OVER, 1 / SMOOTHED_OVER)
    steps, target, pretraining = (
        np.convolve([row[name] for row in rows], kernel, mode="valid") for name in ("step", "target_val_loss", "pretrain_val_loss")
    )
    best = int(np.argmin(target))
    return {"steps": float(steps[best]), "L_ft": float(target[best]), "loss": float(pretraining[best])}


# ------------------------------------------------------------------------------------------------ the analysis


def analyse(cells: Sequence[Cell], *, num_resamples: int = 1000) -> Study:
    """Fit the laws to every domain in every reading, hold out, compare with rivals, and measure the domains' distances."""
    kept = [cell for cell in cells if not cell.left_out]
    domains = list(dict.fromkeys(cell.row["domain"] for cell in cells))
    one_size = len({cell.row["N"] for cell in cells}) == 1
    fits: list[dict[str, Any]] = []
    predicting: dict[str, Uncertainty] = {}
    for response in ("pretraining", "target"):
        for reading in READINGS:
            rows = _rows(cells if reading == "all runs" else kept, reading)
            # A reading that changes nothing is none.
            if (reading in ("all runs", "p to 5%") and len(rows) == len(kept)) or (reading == "non-embedding" and one_size):
                continue
            for domain in domains:
                own = [row for row in rows if row["domain"] == domain]
                resampling = BootstrapOptions(num_resamples=num_resamples if reading in ("total", "non-embedding") else 0)
                found, uncertainty = _describe(own, domain, response, reading, resampling)
                fits.append(found)
                if uncertainty is not None and (response, reading) == ("pretraining", "total"):
                    predicting[domain] = uncertainty
    content = {
        "num_runs": len(cells),
        "num_kept": len(kept),
        "axes": {
            "N": sorted({int(cell.row["N"]) for cell in cells}),
            "domain": domains,
            "D": sorted({int(cell.row["D"]) for cell in cells}),
            "p": sorted({str(cell.row["p_asked"]) for cell in cells}, key=parse_share),
            "seed": sorted({int(cell.row["seed"]) for cell in cells}),
        },
        "hours": sum(float(cell.row["wall_seconds"]) for cell in cells) / 3600,
        "cells": _cell_rows(cells, predicting),
        "fits": fits,
        "domains": {domain: _distance([c.row for c in cells if c.row["domain"] == domain]) for domain in domains},
    }
    return Study(content, predicting)


def _rows(cells: Sequence[Cell], reading: str) -> list[Row]:
    if reading == "non-embedding":
        return [{**cell.row, "N": cell.row["num_non_embedding_params"]} for cell in cells]
    if reading == "p to 5%":
        return [cell.row for cell in cells if parse_share(str(cell.row["p_asked"])) <= LARGEST_PAPER_SHARE]
    if reading == "smoothed":
        return [{**cell.row, **cell.smoothed} for cell in cells if cell.smoothed is not None]
    return [cell.row for cell in cells]


def _describe(
    rows: Sequence[Row], domain: str, response: str, reading: str, resampling: BootstrapOptions
) -> tuple[dict[str, Any], Uncertainty | None]:
    """One fit as plain values, or the reason why there is none."""
    head = {"domain": domain, "response": response, "reading": reading, "num_runs": len(rows)}
    try:
        if not rows:
            raise UserError("no run is left")
        made, _ = fitted_rows(((str(row["run"]), row) for row in rows), response=response, adapters=False)
        table = table_from_rows(made)
        choice = choose_law(table, response=response)
        fit = fit_law(table, choice.law, constraints=choice.constraints, options=_OPTIONS)
    except UserError as error:
        return {**head, "law": None, "reason": str(error)}, None
    uncertainty = assess(fit, resampling)
    whole = resampling.num_resamples > 0
    return {
        **head,
        "law": fit.law.name,
        "formula": fit.law.formula,
        "reason": choice.why,
        "params": {name: _interval(interval, whole) for name, interval in uncertainty.params.items()},
        "held": list(choice.constraints.fixed),
        "intervals": uncertainty.method if whole else None,
        "clusters": uncertainty.clusters.describe(),
        "mre": fit.mre,
        "bootstrapped_mre": None if uncertainty.draws is None else float(uncertainty.draws.out_of_bag_mre),
        "explained": _explained(fit),
        "error_by_p": _error_by_share([str(row["p_asked"]) for row in made], fit),
        "status": fit.certificate.status,
        "at_bounds": list(fit.certificate.at_bounds),
        "flags": [{"kind": flag.kind, "words": flag.words, "remedy": flag.remedy} for flag in fit.flags],
        "warnings": list(uncertainty.warnings) if whole else [],
        "hold_outs": _hold_outs(table, choice) if whole else [],
        "selection": _selection(table, choice) if whole else None,
    }, uncertainty


def _interval(interval: Interval, whole: bool) -> dict[str, Any]:
    return {"value": interval.value, "low": interval.low if whole else None, "high": interval.high if whole else None}


def _explained(fit: Fit) -> float:
    """The share of the variance that the law explains: of forgetting where it has an L0, of the loss elsewhere."""
    columns = fit.table.columns
    response = columns["loss"] - (columns["L0"] if "L0" in fit.law.columns else 0.0)
    spread = float(np.sum((response - response.mean()) ** 2))
    return 1 - float(np.sum((columns["loss"] - fit.predicted) ** 2)) / spread if spread > 0 else float("nan")


def _error_by_share(asked: Sequence[str], fit: Fit) -> dict[str, float]:
    """The mean signed relative error of the law by p as asked, measured over predicted: where p does what the law has no place for."""
    error = fit.table.columns["loss"] / fit.predicted - 1
    shares = sorted(set(asked), key=parse_share)
    return {share: float(np.mean(error[[one == share for one in asked]])) for share in shares}


def _hold_outs(table: Table, choice: Choice) -> list[dict[str, Any]]:
    made = leave_out(
        table,
        choice.law,
        constraints=choice.constraints,
        options=_OPTIONS,
        bootstrap=BootstrapOptions(num_resamples=_FEW_RESAMPLES),
    )
    return [
        {
            "left_out": held.name,
            "num_test": held.test.num_rows,
            "mre": held.mre,
            "worst": held.worst,
            "nats": float(np.mean(np.abs(held.predicted - held.test.columns["loss"]))),
            "mean_forgetting": _mean_forgetting(held),
            "covered": held.covered,
        }
        for held in made
    ]


def _mean_forgetting(held: HoldOut) -> float | None:
    columns = held.test.columns
    return float(np.mean(columns["loss"] - columns["L0"])) if "L0" in held.fit.law.columns else None


def _selection(table: Table, choice: Choice) -> dict[str, Any] | None:
    """The law among its rivals, best first; None where what nothing varies is held."""
    if choice.constraints.fixed or len(choice.law.alternatives) < 2:
        return None
    found = select(table, choice.law, alternatives=rivals_of(choice.law), options=_OPTIONS)
    best = found.rivals[0].aicc
    return {
        "chosen": found.chosen,
        "verdict": found.verdict,
        "rivals": [
            {"name": one.name, "law": one.fit.law.name, "aicc_above_best": one.aicc - best, "mre": one.fit.mre}
            for one in found.rivals
        ],
    }


def rivals_of(law: Law) -> list[Alternative]:
    """What competes with a law: its own rivals and those of this study, each with the ones that contain it."""
    every = (*law.alternatives, *_MORE_RIVALS.get(law.name, ()))
    return [replace(one, inside=(*one.inside, _OWN_EXPONENT)) if one.name in _INSIDE_OWN_EXPONENT else one for one in every]


# ------------------------------------------------------------------------------------------------ cells and domains


def _cell_rows(cells: Sequence[Cell], fits: Mapping[str, Uncertainty]) -> list[dict[str, Any]]:
    """What is measured, and what the law of forgetting says of it, one mapping a run."""
    made = []
    for cell in cells:
        row = cell.row
        fit = fits[row["domain"]].fit if row["domain"] in fits else None
        predicted = None if fit is None else float(fit.predict({name: row[name] for name in fit.law.columns})[0] - row["L0"])
        made.append(
            {
                **{name: row[name] for name in ("run", "domain", "N", "D", "p", "p_asked", "seed", "L0", "L_ft", "loss", "steps")},
                "num_steps": row["num_steps"],
                "injected_rows": round(cell.injected_rows, 1),
                "injected_share": _injected_share(cell),
                "forgetting": row["loss"] - row["L0"],
                "predicted_forgetting": predicted,
                "loss_fraction_lost": row["loss_fraction_lost"],
                "token_equivalent_lost": row["token_equivalent_lost"],
                "left_out": cell.left_out,
            }
        )
    return made


def _injected_share(cell: Cell) -> float | None:
    """Tokens of pretraining data seen by the minimum over those that the base was pretrained on; None where the recipe says no number."""
    row = cell.row
    seen = row["steps"] * row["tokens_seen"] / row["num_steps"] * row["p"]
    per_param = row.get("base_tokens_per_param")
    return None if per_param is None else float(seen / (float(per_param) * row["N"]))


def _distance(rows: Sequence[Row]) -> dict[str, Any]:
    """How far a domain lies from the pretraining data: what finetuning without injection takes off the target loss.

    It is read at the largest D that every size has.

    The loss of the base on the target is the target's own entropy plus the divergence of the base from it. The finetuned loss estimates
    the entropy, so the difference estimates the divergence, KL(target || base), in nats per token; the loss alone would call a text far
    that is only hard to predict.
    """
    plain = [row for row in rows if parse_share(str(row["p_asked"])) == 0]
    sizes = sorted({row["N"] for row in plain})
    shared = set.intersection(*({row["D"] for row in plain if row["N"] == size} for size in sizes)) if sizes else set()
    gains = []
    for size in sizes:
        own = [row for row in plain if row["N"] == size]
        most = max(shared or (row["D"] for row in own))
        gains.append(float(np.mean([row["target_val_start"] - row["L_ft"] for row in own if row["D"] == most])))
    return {"distance_nats": float(np.mean(gains)) if gains else None, "by_size": gains}


def held_out(fit: Mapping[str, Any], column: str) -> Mapping[str, Any] | None:
    """The hold-out of a described fit whose largest `column` was left out; None where there was none."""
    return next((one for one in fit.get("hold_outs", []) if one["left_out"].startswith(f"largest {column} ")), None)


def find_fit(content: Mapping[str, Any], domain: str, response: str, reading: str) -> Mapping[str, Any] | None:
    """The described fit of a domain, or None where no law could be fitted."""
    return next(
        (
            fit
            for fit in content["fits"]
            if (fit["domain"], fit["response"], fit["reading"]) == (domain, response, reading) and fit["law"] is not None
        ),
        None,
    )
