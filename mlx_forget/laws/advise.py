"""From a forgetting law to a decision: the smallest p, the largest D, the smallest N that keep forgetting under a budget.

Every answer holds with a stated confidence: the budget is compared with an upper quantile of the law's draws, not with its central
value. An answer far outside the data is refused unless asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mlx_forget.errors import UserError
from mlx_forget.laws.forms import Array
from mlx_forget.laws.predictor import Predictor, describe_distance
from mlx_forget.laws.table import SHARES

# Values between the ends of the reach that are tried before one is bisected.
LOOKS = 25
# How far outside the data an answer may lie where extrapolation is allowed.
FARTHEST = 1e6


@dataclass(frozen=True)
class AdviceOptions:
    """The one source of advice's defaults.

    Args:
        confidence: that forgetting stays within the budget.
        max_distance: refuse an answer whose N or D lies more than this factor outside the data.
        max_share_distance: the same for p.
        allow_extrapolation: answer anyway, and say how far.
        max_share: the largest p considered.
    """

    confidence: float = 0.9
    max_distance: float = 10.0
    max_share_distance: float = 2.0
    allow_extrapolation: bool = False
    max_share: float = 0.5


DEFAULTS = AdviceOptions()


@dataclass(frozen=True)
class Cost:
    """What a finetuning run costs.

    Args:
        target_tokens: unique target tokens, seen once (multiply by epochs).
        injected_tokens: pretraining tokens served beside them at fixed target tokens: p / (1 - p) of them.
        train_flops: 6 N per token of both.
        overhead: injected tokens as a share of the target tokens.
    """

    target_tokens: float
    injected_tokens: float
    train_flops: float
    overhead: float


@dataclass(frozen=True)
class Advice:
    """An answer.

    Args:
        question: in words.
        answer: the number, or None where no value in reach meets the budget.
        unknown: which column was solved for: "p", "D" or "N".
        columns: the run advised, as law columns; where there is no answer, the furthest one that was tried.
        expected: central forgetting there, nats.
        upper: forgetting that is not exceeded with the asked confidence, nats.
        without_replay: central forgetting at p = 0, nats; NaN where the law has no p.
        cost: of that run.
        distance: how far outside the data it lies, in words, or "".
        words: the answer in a sentence.
    """

    question: str
    answer: float | None
    unknown: str
    columns: Mapping[str, float]
    expected: float
    upper: float
    without_replay: float
    cost: Cost
    distance: str
    words: str


def run_cost(columns: Mapping[str, float], *, epochs: float = 1.0) -> Cost:
    """The cost of a run at fixed target tokens; N missing (a law of one model) gives NaN FLOPs.

    Args:
        columns: D and, where known, N and p.
        epochs: passes over the target tokens.
    """
    share = float(columns.get("p", 0.0))
    target = float(columns["D"]) * epochs
    injected = target * share / (1 - share) if share < 1 else float("inf")
    flops = 6.0 * float(columns.get("N", float("nan"))) * (target + injected)
    return Cost(target, injected, flops, share / (1 - share) if share < 1 else float("inf"))


def refuse_distance(predictor: Predictor, columns: Mapping[str, float], options: AdviceOptions) -> str:
    """The distance of a question from the data in words.

    Raises:
        UserError: it is further than the options allow.
    """
    distance = predictor.distance(columns)
    text = describe_distance(distance, predictor.data_range)
    too_far = [
        name
        for name, factor in distance.items()
        if factor > (options.max_share_distance if name in SHARES else options.max_distance)
    ]
    if too_far and not options.allow_extrapolation:
        raise UserError(
            f"The question lies too far outside the data: {text}. Run closer to it, or pass --allow-extrapolation to answer anyway."
        )
    return text


def _upper(predictor: Predictor, columns: Mapping[str, float], confidence: float) -> float:
    return float(predictor.upper({**columns, "L0": 0.0}, confidence=confidence)[0])


def _hardest_fine(is_fine: Callable[[float], bool], easy: float, hard: float, *, log: bool) -> float | None:
    """The fine value nearest to the hard end, to 0.1%; None where none is.

    With few draws an upper quantile may turn back on the way: values all along it are looked at, not the ends alone.
    """
    values = np.geomspace(hard, easy, LOOKS) if log else np.linspace(hard, easy, LOOKS)
    # Rounding must not make the ends others.
    values[[0, -1]] = hard, easy
    first = next((number for number, value in enumerate(values.tolist()) if is_fine(value)), None)
    if first is None:
        return None
    return hard if first == 0 else _bisect(is_fine, float(values[first]), float(values[first - 1]), log=log)


def _bisect(is_fine: Callable[[float], bool], fine_end: float, bad_end: float, *, log: bool) -> float:
    """The last fine value between a fine and a bad end, to 0.1%, by bisection."""
    for _ in range(60):
        middle = float(np.sqrt(fine_end * bad_end)) if log else (fine_end + bad_end) / 2
        if is_fine(middle):
            fine_end = middle
        else:
            bad_end = middle
        if abs(fine_end - bad_end) <= 1e-3 * abs(fine_end):
            break
    return fine_end


@dataclass(frozen=True)
class Unknown:
    """What can be solved for: its extreme in words, and what else lowers forgetting."""

    extreme: str
    remedy: str


UNKNOWNS = {
    "p": Unknown("smallest p", "take fewer tokens or a larger model"),
    "D": Unknown("largest D", "raise p or take a larger model"),
    "N": Unknown("smallest N", "raise p or take fewer tokens"),
}


def solve(
    predictor: Predictor,
    columns: Mapping[str, float],
    unknown: str,
    *,
    max_forgetting: float,
    options: AdviceOptions = DEFAULTS,
    epochs: float = 1.0,
) -> Advice:
    """The smallest p, the largest D or the smallest N whose forgetting stays within the budget with the asked confidence.

    Args:
        predictor: of a forgetting law.
        columns: the run's other columns.
        unknown: "p", "D" or "N".
        max_forgetting: the budget, nats.
        options: confidence and distances.
        epochs: passes over the target tokens, for the cost.

    Raises:
        UserError: not a forgetting law, no two values of p, or the question is too far outside the data.
    """
    if "L0" not in predictor.law.columns:
        raise UserError(f"{predictor.law.name} predicts no forgetting (it reads no L0): advise from a forgetting law.")
    if unknown not in predictor.law.columns:
        raise UserError(f"{predictor.law.name} does not know {unknown}, so it cannot be solved for.")
    if not (max_forgetting > 0 and np.isfinite(max_forgetting)):
        raise UserError(f"The budget of forgetting must be positive, in nats per token, and it is {max_forgetting:g}.")
    if unknown == "p" and len(set(predictor.data_range["p"])) == 1:
        seen = _show("p", predictor.data_range["p"][0])
        raise UserError(
            f"These runs cannot say what p does: every one has p = {seen}. Run one more, at p = {'1%' if seen == '0%' else '0'}."
        )
    base = {name: float(value) for name, value in columns.items()}
    refuse_distance(predictor, base, options)
    easy, hard = _reach(predictor, unknown, options)
    confident = f"{100 * options.confidence:g}% confidence"
    within = f"within {max_forgetting:g} nats with {confident}"

    def is_fine(value: float) -> bool:
        return _upper(predictor, {**base, unknown: value}, options.confidence) <= max_forgetting

    answer: float | None
    hardest = _hardest_fine(is_fine, easy, hard, log=unknown != "p")
    if hardest is None:
        answer = None
        words = f"No {unknown} {'up to' if unknown != 'D' else 'down to'} {_show(unknown, easy)} keeps forgetting {within}: "
        if not options.allow_extrapolation:
            low, high = predictor.data_range[unknown]
            words += f"beyond it the data ({_show(unknown, low)} to {_show(unknown, high)}) say too little; "
        words += UNKNOWNS[unknown].remedy + "."
    elif hardest == hard:
        answer = hard
        words = f"Forgetting stays {within} at {unknown} = {_show(unknown, hard)}"
        words += ": no replay is needed." if hard == 0 else ", the farthest that these data can answer for: the limit lies beyond."
    else:
        answer = hardest
        words = f"The {UNKNOWNS[unknown].extreme} that keeps forgetting {within} is {_show(unknown, answer)}"
        words += f", for {100 * run_cost({**base, 'p': answer}).overhead:.2g}% more tokens." if unknown == "p" else "."
    run = {**base, unknown: easy if answer is None else answer}
    distance = refuse_distance(predictor, run, options)
    if predictor.unidentified:
        names = ", ".join(predictor.unidentified)
        words += f" These runs do not determine {names}: the answer is one for the middle of the data, and no law to carry further."
    if not len(predictor.draws):
        words += " The fit carries no draws, so this is the central value without confidence: fit with --bootstrap."
    if distance and answer is not None:
        words += f" Outside the data: {distance}."
    return Advice(
        question=f"{UNKNOWNS[unknown].extreme} with forgetting <= {max_forgetting:g} nats at {confident}",
        answer=answer,
        unknown=unknown,
        columns=run,
        expected=float(predictor.forgetting(run)[0]),
        upper=_upper(predictor, run, options.confidence),
        without_replay=float(predictor.forgetting({**run, "p": 0.0})[0]) if "p" in predictor.law.columns else float("nan"),
        cost=run_cost(run, epochs=epochs),
        distance=distance,
        words=words,
    )


def _reach(predictor: Predictor, unknown: str, options: AdviceOptions) -> tuple[float, float]:
    """The ends of the values considered: where forgetting is least, and where it is most."""
    low, high = predictor.data_range[unknown]
    if unknown == "p":
        # Where alpha and B cannot be told apart, the effect of p is known between the shares that were run, and not beyond.
        known = (
            1.0 if options.allow_extrapolation else high * (1.0 if "B" in predictor.unidentified else options.max_share_distance)
        )
        # Without a run at p = 0, the law is asked for no less than this much below the smallest share.
        least = (
            0.0
            if low == 0 or options.allow_extrapolation
            else low / (1.0 if "B" in predictor.unidentified else options.max_share_distance)
        )
        return min(options.max_share, known), least
    # A hair inside, so that rounding does not make the ends too far.
    reach = FARTHEST if options.allow_extrapolation else options.max_distance * (1 - 1e-9)
    return (low / reach, high * reach) if unknown == "D" else (high * reach, low / reach)


def _show(name: str, value: float) -> str:
    return f"{100 * value:.3g}%" if name in SHARES else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------ Pareto front


@dataclass(frozen=True)
class Choice:
    """One point of the front of target loss against forgetting: the run's columns, what it reaches and what it costs."""

    columns: Mapping[str, float]
    target_loss: float
    forgetting: float
    cost: Cost


def pareto(
    forgetting: Predictor,
    target: Predictor,
    *,
    sizes: Array,
    tokens: Array,
    shares: Array,
    max_flops: float | None = None,
    epochs: float = 1.0,
) -> list[Choice]:
    """The runs that no other run beats in target loss and in forgetting, ascending in target loss.

    More tokens lower the target loss and forget more; replay forgets less and costs FLOPs.

    Args:
        forgetting, target: predictors of the forgetting and the finetuning law.
        sizes, tokens, shares: the grids of N, D and p to choose from.
        max_flops: leave out runs that cost more.
        epochs: passes over the target tokens.
    """
    choices = []
    for n in np.atleast_1d(sizes).tolist():
        for d in np.atleast_1d(tokens).tolist():
            for p in np.atleast_1d(shares).tolist():
                columns = {"N": n, "D": d, "p": p}
                cost = run_cost(columns, epochs=epochs)
                if max_flops is not None and cost.train_flops > max_flops:
                    continue
                choices.append(
                    Choice(
                        columns,
                        float(target.predict(columns)[0]),
                        float(forgetting.forgetting(columns)[0]),
                        cost,
                    )
                )
    choices.sort(key=lambda choice: (choice.target_loss, choice.forgetting, choice.cost.train_flops))
    front: list[Choice] = []
    least = np.inf
    for choice in choices:
        if choice.forgetting < least:
            front.append(choice)
            least = choice.forgetting
    return front
