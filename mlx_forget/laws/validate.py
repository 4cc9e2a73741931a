"""How a law does where it was not fitted: hold-outs by construction, interval calibration, and selection among rivals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import fdtrc, ndtri

from mlx_forget.errors import UserError
from mlx_forget.laws.clusters import SAME, share_levels
from mlx_forget.laws.fit import DEFAULTS, FitOptions, fit_law, num_free
from mlx_forget.laws.fitted import Fit
from mlx_forget.laws.forms import Alternative, Array, Law, get_law
from mlx_forget.laws.model import FREE, Constraints
from mlx_forget.laws.noise import estimate_noise
from mlx_forget.laws.objective import Objective
from mlx_forget.laws.table import Table
from mlx_forget.laws.uncertainty import BootstrapOptions, assess, predict_intervals

NO_BOOTSTRAP = BootstrapOptions(num_resamples=0)
# Selection prefers the simpler of two nested laws unless the F test rejects it at this level: rivals are many.
SELECTION_LEVEL = 0.01
# AICc differences below this are no evidence (Burnham and Anderson 2002, section 2.6).
AICC_TIE = 2.0


@dataclass(frozen=True)
class HoldOut:
    """A fit on some rows and its errors on the others.

    Args:
        name: which rows were held out, in words.
        fit: the fit on the rest.
        test: the rows held out.
        predicted: float64[m].
        error: float64[m], relative, signed.
        covered: share of held-out points inside their 95% interval (parameters and noise); NaN without intervals.
    """

    name: str
    fit: Fit
    test: Table
    predicted: Array
    error: Array
    covered: float = float("nan")

    @property
    def mre(self) -> float:
        return float(np.mean(np.abs(self.error)))

    @property
    def worst(self) -> float:
        return float(np.max(np.abs(self.error)))


def hold_out(
    table: Table,
    law: str | Law,
    train: npt.NDArray[np.bool_],
    *,
    name: str = "",
    constraints: Constraints = FREE,
    options: FitOptions = DEFAULTS,
    bootstrap: BootstrapOptions = NO_BOOTSTRAP,
) -> HoldOut:
    """Fit the rows where `train` [n] is true and predict the others.

    Args:
        bootstrap: with resamples, the calibration of the intervals is measured too.

    Raises:
        UserError: nothing is left to train on, or to test.
    """
    if train.all() or not train.any():
        raise UserError(f"The hold-out {name!r} trains on {int(train.sum())} of {len(train)} rows: leave some on both sides.")
    fit = fit_law(table.select(train), law, constraints=constraints, options=options)
    test = table.select(~train)
    predicted = fit.predict(test.columns)
    loss = test.columns["loss"]
    covered = float("nan")
    if bootstrap.num_resamples:
        covered = calibration(fit, test, bootstrap)
    return HoldOut(name, fit, test, predicted, predicted / loss - 1, covered)


def calibration(fit: Fit, test: Table, options: BootstrapOptions) -> float:
    """The share of test rows whose loss lies inside the interval of the law widened by the residual noise."""
    found = assess(fit, options)
    intervals = predict_intervals(found, test.columns)
    response = fit.objective.transform(test.columns["loss"])
    noise = float(ndtri(0.5 + options.level / 2)) * fit.noise.residual
    inside = 0
    for interval, measured in zip(intervals, response.tolist(), strict=True):
        centre = float(fit.objective.transform(np.array([interval.value]))[0])
        low = -np.inf if interval.low is None else float(fit.objective.transform(np.array([interval.low]))[0])
        high = np.inf if interval.high is None else float(fit.objective.transform(np.array([interval.high]))[0])
        inside += centre - np.hypot(centre - low, noise) <= measured <= centre + np.hypot(high - centre, noise)
    return inside / test.num_rows


def leave_out(
    table: Table,
    law: str | Law,
    *,
    constraints: Constraints = FREE,
    options: FitOptions = DEFAULTS,
    bootstrap: BootstrapOptions = NO_BOOTSTRAP,
    domain: str | None = None,
) -> list[HoldOut]:
    """The standard hold-outs: the largest N, the largest D, each p, and each value of a domain column.

    Runs that asked for one p were served shares that differ a little: those are one, and so is what lies within a twentieth of the
    largest. Hold-outs that leave too few rows, or no test, are left
    out of the list.
    """
    law = get_law(law) if isinstance(law, str) else law
    masks: list[tuple[str, npt.NDArray[np.bool_]]] = []
    for column in ("N", "D", "P", "steps"):
        if column in law.columns and len(np.unique(table.columns[column])) > 2:
            top = table.columns[column].max()
            masks.append((f"largest {column} ({top:.3g})", table.columns[column] < top * (1 - SAME)))
    for column in ("p", "r", "R"):
        if column in law.columns and len(levels := share_levels(table.columns[column])) > 2:
            for level in levels:
                name = f"{100 * level[0]:g}%" if len(level) == 1 else f"{100 * np.median(level):.2g}%"
                masks.append((f"{column} = {name}", ~np.isin(table.columns[column], level)))
    if domain is not None:
        masks.extend(
            (f"{domain} = {name}", ~np.isin(table.row_numbers, part.row_numbers)) for name, part in table.groups(domain).items()
        )
    made = []
    for name, train in masks:
        try:
            made.append(
                hold_out(
                    table,
                    law,
                    train,
                    name=name,
                    constraints=constraints,
                    options=options,
                    bootstrap=bootstrap,
                )
            )
        except UserError:
            continue
    return made


def train_on(
    table: Table,
    law: str | Law,
    condition: str,
    *,
    constraints: Constraints = FREE,
    options: FitOptions = DEFAULTS,
    bootstrap: BootstrapOptions = NO_BOOTSTRAP,
) -> HoldOut:
    """Fit the rows that meet a condition such as `N<=3.4e8 and D<=3e6` and predict the others.

    Raises:
        UserError: the condition cannot be read, or leaves nothing on one side.
    """
    return hold_out(
        table,
        law,
        table.where(condition),
        name=condition,
        constraints=constraints,
        options=options,
        bootstrap=bootstrap,
    )


# ------------------------------------------------------------------------------------------------ selection


@dataclass(frozen=True)
class Rival:
    """One candidate of a selection.

    Args:
        name: of the alternative.
        fit: its fit at the common, efficient objective.
        aicc: corrected Akaike criterion from the robust deviance; only differences mean anything.
        hold_out: mean relative error over the held-out rows; NaN without a hold-out.
    """

    name: str
    fit: Fit
    aicc: float
    hold_out: float


@dataclass(frozen=True)
class FTest:
    """A nested comparison: is the smaller law rejected in favour of the larger one?

    Args:
        smaller, larger: names.
        statistic: the robust F ratio.
        p_value: its tail probability.
    """

    smaller: str
    larger: str
    statistic: float
    p_value: float


@dataclass(frozen=True)
class Selection:
    """A choice among rivals.

    Args:
        chosen: name of the chosen alternative.
        verdict: why, in words.
        rivals: all candidates, best AICc first.
        tests: the nested comparisons.
    """

    chosen: str
    verdict: str
    rivals: tuple[Rival, ...]
    tests: tuple[FTest, ...]


def select(
    table: Table,
    law: str | Law,
    *,
    condition: str | None = None,
    alternatives: Sequence[Alternative] | None = None,
    options: FitOptions = DEFAULTS,
) -> Selection:
    """Choose among a law and its rivals by F tests where they are nested, by AICc where they are not, and say why.

    All rivals are fitted with one Huber loss whose delta is 1.345 times the noise of the best of them: nearly as sharp as least
    squares under normal noise, where the usual delta of 1e-3 would throw information away, and still robust.

    Args:
        table: the rows.
        law: the law whose `alternatives` compete, unless others are given.
        condition: train on these rows and report the error over the others as well.
        alternatives: other candidates.
        options: link and effort of the fits.

    Raises:
        UserError: the law has no alternatives, or none can be fitted.
    """
    law = get_law(law) if isinstance(law, str) else law
    candidates = law.alternatives if alternatives is None else tuple(alternatives)
    if len(candidates) < 2:
        raise UserError(f"{law.name} has no rivals to select among: give alternatives.")
    first = _fit_all(table, candidates, options)
    if not first:
        raise UserError(f"None of the rivals of {law.name} can be fitted to {table.num_rows} rows.")
    scale = min(fit.noise.residual for fit in first.values())
    sharp = replace(options, objective=Objective(options.objective.link, max(1.345 * scale, 1e-12)))
    fits = _fit_all(table, candidates, sharp)
    n = table.num_rows
    largest = min(fits.values(), key=lambda fit: fit.value / max(n - fit.model.num_free, 1))
    # Rows that the law meets exactly have no noise.
    ratio = max(estimate_noise(largest.residual, largest.objective, largest.model.num_free).ratio, 1e-300)
    errors = dict.fromkeys(fits, float("nan"))
    if condition is not None:
        train = table.where(condition)
        for name, fit in fits.items():
            try:
                errors[name] = hold_out(table, fit.law, train, name=condition, constraints=fit.constraints, options=sharp).mre
            except UserError:
                continue
    rivals = []
    for name, fit in fits.items():
        k = fit.model.num_free + 1
        penalty = 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1)
        rivals.append(Rival(name, fit, 2 * fit.value / ratio + penalty, errors[name]))
    rivals.sort(key=lambda rival: rival.aicc)
    tests = _nested_tests(candidates, fits, n)
    chosen, steps = _choose(rivals, tests)
    return Selection(chosen, _verdict(chosen, rivals, tests, steps, condition), tuple(rivals), tuple(tests))


def _fit_all(table: Table, candidates: Sequence[Alternative], options: FitOptions) -> dict[str, Fit]:
    fits = {}
    for candidate in candidates:
        constraints = Constraints(dict(candidate.fixed), dict(candidate.tied))
        try:
            fits[candidate.name] = fit_law(table, candidate.law, constraints=constraints, options=options)
        except UserError:
            needed = num_free(get_law(candidate.law), constraints)
            if table.num_rows >= needed:
                raise
    return fits


def _nested_tests(candidates: Sequence[Alternative], fits: Mapping[str, Fit], n: int) -> list[FTest]:
    made = []
    for candidate in candidates:
        for larger in candidate.inside:
            if candidate.name not in fits or larger not in fits:
                continue
            small, large = fits[candidate.name], fits[larger]
            extra = large.model.num_free - small.model.num_free
            degrees = n - large.model.num_free
            if extra < 1 or degrees < 1:
                continue
            ratio = estimate_noise(large.residual, large.objective, large.model.num_free).ratio
            statistic = max(2 * (small.value - large.value) / max(ratio, 1e-300) / extra, 0.0)
            made.append(FTest(candidate.name, larger, float(statistic), float(fdtrc(extra, degrees, statistic))))
    return made


def _choose(rivals: Sequence[Rival], tests: Sequence[FTest]) -> tuple[str, list[FTest]]:
    """Of the rivals that tie with the lowest AICc take the one with fewest parameters, then step down to a simpler law for as long as
    an F test does not reject it.
    """
    tied = [rival for rival in rivals if rival.aicc <= rivals[0].aicc + AICC_TIE]
    chosen = min(tied, key=lambda rival: (rival.fit.model.num_free, rival.aicc)).name
    order = {rival.name: rival.aicc for rival in rivals}
    steps: list[FTest] = []
    while True:
        down = [test for test in tests if test.larger == chosen and test.p_value > SELECTION_LEVEL]
        if not down:
            return chosen, steps
        best = min(down, key=lambda test: order[test.smaller])
        steps.append(best)
        chosen = best.smaller


def _verdict(
    chosen: str,
    rivals: Sequence[Rival],
    tests: Sequence[FTest],
    steps: Sequence[FTest],
    condition: str | None,
) -> str:
    by_name = {rival.name: rival for rival in rivals}
    parts = [f"{chosen!r} is chosen"]
    if steps:
        last = steps[-1]
        parts.append(f"{last.larger!r} fits no better than chance would (F = {last.statistic:.2g}, p = {last.p_value:.2g})")
    rejected = [test for test in tests if test.smaller != chosen and test.larger == chosen and test.p_value <= SELECTION_LEVEL]
    for test in rejected:
        parts.append(f"the simpler {test.smaller!r} is rejected (F = {test.statistic:.3g}, p = {test.p_value:.1g})")
    related = {name for test in tests for name in (test.smaller, test.larger) if chosen in (test.smaller, test.larger)}
    others = [rival for rival in rivals if rival.name != chosen and rival.name not in related]
    if others:
        runner_up = others[0]
        gap = runner_up.aicc - by_name[chosen].aicc
        if gap < AICC_TIE:
            parts.append(f"but {runner_up.name!r} explains the data as well (AICc differs by {gap:.2g}): more runs must decide")
        else:
            parts.append(f"the best rival that it does not contain, {runner_up.name!r}, is {gap:.3g} AICc units worse")
    if condition is not None and np.isfinite(by_name[chosen].hold_out):
        outside = [rival for rival in rivals if np.isfinite(rival.hold_out)]
        best = min(outside, key=lambda rival: rival.hold_out)
        text = f"outside {condition!r} it errs by {100 * by_name[chosen].hold_out:.3g}%"
        if best.name != chosen:
            text += f" (least: {best.name!r}, {100 * best.hold_out:.3g}%)"
        parts.append(text)
    return "; ".join(parts) + "."
