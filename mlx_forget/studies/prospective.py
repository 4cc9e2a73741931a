"""A prospective test: what laws predict of runs that do not exist yet, written to a file, and later held against the runs.

The file says when it was made and from which fit, by checksum, and is never overwritten. Forgetting is predicted, not the loss: the loss of
a base model that was not pretrained yet is unknown. Intervals are of one run: the law's own and the noise of a run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.config import TrainConfig
from mlx_forget.durable_files import read_object, sha256_of, write_text
from mlx_forget.errors import UserError
from mlx_forget.ladder import default_context, is_ladder_name, model_spec, num_params
from mlx_forget.laws.files import check_target, read_fit
from mlx_forget.laws.predictor import NEGLIGIBLE
from mlx_forget.pipeline.mixture import parse_share
from mlx_forget.pipeline.shares import constant_share
from mlx_forget.runs.rows import METHODS_OF_THE_LAWS, Row, fitted_rows
from mlx_forget.studies.law_study import left_out
from mlx_forget.sweeps.grid import Recipe

SCHEMA_VERSION = 1
KIND = "predictions"


@dataclass(frozen=True)
class Prediction:
    """What a law says of one configuration, nats per token.

    Args:
        domain: the target, and the group of the fit.
        model: the ladder name.
        N, D, p: the law's columns; p as asked.
        forgetting, low, high: the law's value and the ends of the interval of one run.
        outside: {column: the factor outside the fitted data}.
    """

    domain: str
    model: str
    N: int
    D: int
    p: str
    seed: int
    forgetting: float
    low: float
    high: float
    outside: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """A prediction beside what was measured.

    Args:
        prediction: as it was written down.
        run: the run's id; None where it has not been run.
        measured: forgetting, nats.
        loss: the pretraining loss at the minimum, nats.
        covered: the measured value lies inside the interval.
        before: the run had ended before the prediction was made, so it predicts nothing.
        note: why it does not count, or "".
    """

    prediction: Prediction
    run: str | None = None
    measured: float = float("nan")
    loss: float = float("nan")
    covered: bool = False
    before: bool = False
    note: str = ""

    @property
    def counts(self) -> bool:
        return self.run is not None and not self.before and not self.note

    @property
    def relative_error(self) -> float:
        """Of the loss, as laws are judged: (L0 + predicted forgetting) / loss - 1, with the run's own L0."""
        return (self.prediction.forgetting - self.measured) / self.loss


def predict_recipe(fit: Path, recipe: Recipe, *, level: float, now: datetime | None = None) -> dict[str, Any]:
    """What a saved fit says of every run of a recipe: the content of the predictions file.

    Raises:
        UserError: the fit has no intervals or no law of forgetting, or a run is of a model, a target or a kind that it does not know.
    """
    if recipe.stages:
        raise UserError(
            f"{recipe.name} has stages, of which the later start from finetunes: laws are of finetunes of a pretrained model."
        )
    saved = read_fit(fit)
    made = []
    for config in recipe.configs({}):
        if not is_ladder_name(config.model) or config.target_tokens is None:
            raise UserError(
                f"Predictions are of ladder models and amounts of target data, not of {config.model} on {config.target}."
            )
        others = {
            "pretraining": config.init == "scratch",
            config.fine_tune_type: config.fine_tune_type != "full",
            config.method: config.method not in METHODS_OF_THE_LAWS,
        }
        if what := next((name for name, is_other in others.items() if is_other), None):
            raise UserError(f"{recipe.name} has runs of {what}: predictions are of full finetunes with injection, as the laws are.")
        domain = "" if set(saved.predictors) == {""} else str(config.target)
        if domain not in saved.predictors:
            raise UserError(
                f"{fit} has no fit of {domain}, which {recipe.name} trains on, but of {', '.join(saved.predictors)}: fit it by domain "
                "to runs of every target of the recipe."
            )
        predictor = saved.predictors[domain]
        if not {"N", "L0"} <= set(predictor.law.columns):
            raise UserError(
                f"{fit} is a fit of {predictor.law.name}: predictions are of forgetting by size, of a law with N and L0."
            )
        asked = {"N": num_params_of(config), "D": float(config.target_tokens), "p": float(parse_share(str(config.p))), "L0": 0.0}
        columns = {name: asked[name] for name in predictor.law.columns}
        low, high = (float(end[0]) for end in predictor.run_interval(columns, level=level))
        if not np.isfinite([low, high]).all():
            raise UserError(f"{fit} has no draws or no noise, so no intervals: fit again.")
        outside = {name: factor for name, factor in predictor.distance(columns).items() if factor > NEGLIGIBLE}
        value = float(predictor.predict(columns)[0])
        made.append(
            Prediction(
                *(str(config.target), config.model, int(asked["N"]), config.target_tokens, str(config.p), config.seed),
                *(value, low, high, outside),
            )
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "made_at": (now or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "recipe": recipe.name,
        "fit": {"file": fit.name, "sha256": sha256_of(fit), "law": saved.content["law"], "num_rows": saved.content["num_rows"]},
        "level": level,
        "predictions": [asdict(one) for one in made],
    }


def num_params_of(config: TrainConfig) -> int:
    """The parameters of a run's model, from its configuration alone."""
    return num_params(model_spec(config.model, config.vocab_size, config.max_seq_length or default_context(config.model)))


def write_predictions(path: Path, content: Mapping[str, Any]) -> None:
    """Write a predictions file.

    Raises:
        UserError: it exists: what was predicted stays.
    """
    check_target(path)
    if path.exists():
        raise UserError(f"{path} exists, and predictions are made once: choose another file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_predictions(path: Path) -> dict[str, Any] | None:
    """A predictions file; None for any other file, a fit.json among them.

    Raises:
        UserError: it is of a newer schema, or damaged.
    """
    try:
        content = read_object(path)
    except (OSError, ValueError):
        return None
    if content.get("kind") != KIND:
        return None
    if content.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {content.get('schema_version')!r}, this release reads {SCHEMA_VERSION}.")
    try:
        predictions(content)
        datetime.fromisoformat(content["made_at"])
        return {**content, "level": float(content["level"])}
    except (TypeError, KeyError, ValueError, OverflowError):
        raise UserError(f"{path} is damaged: predictions that were changed predict nothing.") from None


def predictions(content: Mapping[str, Any]) -> list[Prediction]:
    """The predictions of a file's content.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: it has none, or others.
    """
    kinds = {
        "domain": str,
        "model": str,
        "N": int,
        "D": int,
        "p": str,
        "seed": int,
        "forgetting": float,
        "low": float,
        "high": float,
    }
    made = []
    for one in content["predictions"]:
        outside = {str(name): float(factor) for name, factor in dict(one["outside"]).items()}
        made.append(Prediction(**{**one, **{name: kind(one[name]) for name, kind in kinds.items()}, "outside": outside}))
        if made[-1].D < 1:
            raise ValueError
    return made


def compare(content: Mapping[str, Any], rows: Iterable[Row]) -> list[Outcome]:
    """Every prediction beside its run, the latest where several fit; D may differ by a row's length in a hundred.

    Args:
        rows: flat rows of records (`runs.rows`).
    """
    found, _ = fitted_rows(((str(row["run"]), row) for row in rows), response="pretraining", adapters=False)
    made = []
    for one in predictions(content):
        own = [row for row in found if _is_of(row, one)]
        if not own:
            made.append(Outcome(one))
            continue
        # A run that does not say when it ended may have been there before.
        row = max(own, key=lambda row: str(row["ended_at"] or ""))
        measured = float(row["loss"] - row["L0"])
        before = str(row["ended_at"] or "") <= content["made_at"]
        note = left_out(row)
        made.append(
            Outcome(one, str(row["run"]), measured, float(row["loss"]), one.low <= measured <= one.high, before=before, note=note)
        )
    return made


def _is_of(row: Row, one: Prediction) -> bool:
    same = (row["domain"], row["N"], row["seed"]) == (one.domain, one.N, one.seed)
    if not same or row["p_asked"] is None:
        return False
    return abs(row["D"] / one.D - 1) < 0.01 and constant_share(str(row["p_asked"])) == parse_share(one.p)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Coverage and errors over the predictions that count; NaN where there is none."""
    counted = [one for one in outcomes if one.counts]
    errors = [abs(one.relative_error) for one in counted]
    nats = [abs(one.prediction.forgetting - one.measured) for one in counted]
    return {
        "num_predictions": len(outcomes),
        "num_measured": len(counted),
        "num_covered": sum(one.covered for one in counted),
        "mre": float(np.mean(errors)) if errors else float("nan"),
        "worst": max(errors, default=float("nan")),
        "mean_error_nats": float(np.mean(nats)) if nats else float("nan"),
    }


def prediction_lines(content: Mapping[str, Any]) -> list[str]:
    """The predictions of a file's content as a Markdown table."""
    head = f"predicted forgetting (nats), {content['level']:.0%} interval of a run"
    rows = [f"| {_question(one)} | {_answer(one)} |" for one in predictions(content)]
    return [f"| configuration | {head} |", "| --- | --- |", *rows, "", f"{_provenance(content)}."]


def outcome_lines(content: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[str]:
    """The runs that were made after they were predicted as a Markdown table, how many others there are, and one sentence."""
    lines = [
        f"| configuration | predicted forgetting (nats), {content['level']:.0%} interval of a run | measured | error of the loss |",
        "| --- | --- | --- | --- |",
    ]
    for one in outcomes:
        if one.run is None or one.before:
            continue
        error = f"{one.relative_error:+.2%}" if one.counts else ""
        measured = f"{one.measured:.3f}{'' if one.covered else ' (outside)'}{f' (does not count: {one.note})' if one.note else ''}"
        lines.append(f"| {_question(one.prediction)} | {_answer(one.prediction)} | {measured} | {error} |")
    others = {
        "without a finished run": sum(one.run is None for one in outcomes),
        "run before they were predicted": sum(one.before for one in outcomes),
    }
    beside = ", ".join(f"{number} {what}" for what, number in others.items() if number)
    found = summary(outcomes)
    said = _provenance(content)
    if found["num_measured"]:
        said += (
            f": {found['num_covered']} of {found['num_measured']} measured values lie inside their {content['level']:.0%} intervals; "
            f"mean relative error of the loss {found['mre']:.2%}, largest {found['worst']:.2%}; of forgetting {found['mean_error_nats']:.3f} nats"
        )
    return [*lines, "", *([f"Of {len(outcomes)} predictions: {beside}.", ""] if beside else []), f"{said}."]


def _question(one: Prediction) -> str:
    outside = "; ".join(f"{column} {factor:.3g} times outside" for column, factor in one.outside.items())
    return f"{one.model}, {one.domain}, D = {one.D:,}, p = {one.p}{f' ({outside})' if outside else ''}"


def _answer(one: Prediction) -> str:
    return f"{one.forgetting:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _provenance(content: Mapping[str, Any]) -> str:
    return f"Predicted on {content['made_at']} from {content['fit']['file']} (sha256 {content['fit']['sha256'][:12]})"
