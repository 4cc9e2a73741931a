"""Fit a law to a table: global by construction, with a certificate of how the fit ended.

Variable projection gives starts over a grid of exponents; a batched Newton method carries the best of them to the optimum; the ends
that agree are counted. Groups that share nothing are fitted in the same batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.laws.fitted import Certificate, Fit
from mlx_forget.laws.forms import Array, Law, get_law
from mlx_forget.laws.identify import fit_flags
from mlx_forget.laws.model import FREE, Constraints, Model, bind
from mlx_forget.laws.noise import estimate_noise
from mlx_forget.laws.objective import LawProblem, Objective
from mlx_forget.laws.solver import CONVERGED, ROUNDING, STATUS_NAMES, Solution, minimise
from mlx_forget.laws.starts import projected_starts
from mlx_forget.laws.table import Table, check

AGREEMENT = 1e-6


@dataclass(frozen=True)
class FitOptions:
    """The one source of the fit's defaults.

    Args:
        objective: link and delta.
        num_starts: starts that are carried some steps; None for what a law of its size needs.
        num_first_steps: those steps; None likewise.
        num_finalists: starts that are carried to the end; None likewise.
        first_delta: the Huber delta of those steps, at least: far from the optimum a nearly absolute loss has local minima that a
            smoother one has not.
        max_steps: evaluations per finalist at most.
        allow_duplicates, allow_units: skip the checks of those names (see `table.check`).
    """

    objective: Objective = field(default_factory=Objective)
    num_starts: int | None = None
    num_first_steps: int | None = None
    num_finalists: int | None = None
    first_delta: float = 0.05
    max_steps: int = 200
    allow_duplicates: bool = False
    allow_units: bool = False

    def effort(self, num_free: int) -> tuple[int, int, int]:
        """(starts, first steps, finalists) for a law of `num_free` coordinates.

        Measured on 60 exact data sets per law: up to 5 coordinates 10 starts always reach the optimum; the 12 of the overfitting
        gap need about 100.
        """
        usual = (10, 6, 4) if num_free <= 5 else (12 * (num_free - 3), 20, num_free + 2)
        asked = (self.num_starts, self.num_first_steps, self.num_finalists)
        starts, steps, finalists = (own if own is not None else default for own, default in zip(asked, usual, strict=True))
        return starts, steps, finalists


DEFAULTS = FitOptions()


def fit_law(
    table: Table,
    law: str | Law,
    *,
    constraints: Constraints = FREE,
    by: str | None = None,
    options: FitOptions = DEFAULTS,
    weights: Array | None = None,
) -> Fit:
    """Fit one law to one table.

    Args:
        table: the rows.
        law: a law or its name.
        constraints: fixed, tied and shared parameters; shared ones need `by`.
        by: a column whose values are groups of one joint fit.
        options: objective and effort.
        weights: float64[n], weights of the rows; None weighs all alike.

    Raises:
        UserError: see `table.check`.
    """
    law = get_law(law) if isinstance(law, str) else law
    if by is None:
        if constraints.shared:
            raise UserError("Parameters are shared across groups: name the column of the groups with by (--by COLUMN).")
        return _fit_separately([table], law, constraints, options, None if weights is None else [weights])[0]
    return _fit_jointly(table, law, constraints, by, options)


def fit_groups(
    table: Table, law: str | Law, *, by: str, constraints: Constraints = FREE, options: FitOptions = DEFAULTS
) -> dict[str, Fit]:
    """Fit one law to every group of a table, all in one batch; nothing is shared.

    Raises:
        UserError: see `table.check`; the sentence names the group.
    """
    law = get_law(law) if isinstance(law, str) else law
    groups = table.groups(by)
    fits = _fit_separately(list(groups.values()), law, constraints, options, None, list(groups))
    return dict(zip(groups, fits, strict=True))


def num_free(law: Law, constraints: Constraints) -> int:
    return len(law.parameters) - len({*constraints.fixed, *constraints.tied})


def _check(table: Table, law: Law, constraints: Constraints, options: FitOptions) -> None:
    check(
        table,
        law,
        num_free=num_free(law, constraints),
        allow_duplicates=options.allow_duplicates,
        allow_units=options.allow_units,
    )


def _fit_separately(
    tables: Sequence[Table],
    law: Law,
    constraints: Constraints,
    options: FitOptions,
    weights: Sequence[Array] | None = None,
    names: Sequence[str] | None = None,
) -> list[Fit]:
    models = []
    for i, table in enumerate(tables):
        try:
            _check(table, law, constraints, options)
        except UserError as error:
            raise UserError(f"Group {names[i]!r}: {error}" if names else str(error)) from None
        models.append(bind(law, table.columns, constraints=constraints))
    longest = max(table.num_rows for table in tables)
    num_starts, num_first_steps, num_finalists = options.effort(models[0].num_free)
    features: dict[str, list[Array]] = {}
    response, weight_rows, starts, dataset = [], [], [], []
    for i, (table, model) in enumerate(zip(tables, models, strict=True)):
        own = law.features(table.columns, model.references)
        own_weights = np.ones(table.num_rows) if weights is None else weights[i]
        u = _starts(model, own, table.columns["loss"], own_weights, num_starts)
        starts.append(u)
        dataset.extend([i] * len(u))
        for name, values in own.items():
            features.setdefault(name, []).append(
                _pad(values[0], longest) if values.shape[1] > 1 or table.num_rows == 1 else values[0]
            )
        response.append(_pad(options.objective.transform(table.columns["loss"]), longest))
        weight_rows.append(np.pad(own_weights, (0, longest - table.num_rows)))
    which = np.asarray(dataset)
    single = len(tables) == 1
    problem = LawProblem(
        models[0],
        Objective(options.objective.link, max(options.objective.delta, options.first_delta)),
        {name: np.stack(values) for name, values in features.items()},
        np.stack(response) if single else np.stack(response)[which],
        np.stack(weight_rows)[which],
        dataset=None if single else which,
    )
    low, high = models[0].low, models[0].high
    first = minimise(problem, np.concatenate(starts), low=low, high=high, max_steps=num_first_steps)
    finalists = np.concatenate(
        [np.flatnonzero(which == i)[np.argsort(first.value[which == i])[:num_finalists]] for i in range(len(tables))]
    )
    subset = replace(
        problem,
        objective=options.objective,
        weights=problem.weights[finalists],
        response=problem.response if single else problem.response[finalists],
        dataset=None if single else which[finalists],
    )
    last = minimise(subset, first.u[finalists], low=low, high=high, max_steps=options.max_steps, damping=0.1)
    fits = []
    for i, (table, model) in enumerate(zip(tables, models, strict=True)):
        mine = last.take(np.flatnonzero(which[finalists] == i))
        fits.append(
            _finish(
                model,
                options.objective,
                constraints,
                table,
                None,
                mine,
                None if weights is None else weights[i],
            )
        )
    return fits


def _starts(model: Model, features: Mapping[str, Array], loss: Array, weights: Array, count: int) -> Array:
    theta: Array = projected_starts(model.law, features, loss, weights[None], count=count)[0]
    if model.is_plain:
        return theta
    # A held parameter makes some starts coincide; the least-squares projection keeps the others close to theirs.
    flat = model.matrix.reshape(-1, model.num_free)
    return np.asarray((theta - model.offset[0]) @ np.linalg.pinv(flat).T)


def _pad(values: Array, length: int) -> Array:
    """Repeat the first row up to `length`; its copies weigh nothing."""
    return np.concatenate([values, np.full(length - len(values), values[0])])


def _fit_jointly(table: Table, law: Law, constraints: Constraints, by: str, options: FitOptions) -> Fit:
    groups = table.groups(by)
    names = list(groups)
    alone = Constraints(constraints.fixed, constraints.tied)
    for name, part in groups.items():
        try:
            _check(part, law, constraints, options)
        except UserError as error:
            raise UserError(f"Group {name!r}: {error}") from None
    order = np.concatenate([np.flatnonzero(np.isin(table.row_numbers, part.row_numbers)) for part in groups.values()])
    group = np.empty(table.num_rows, np.int64)
    start = 0
    for g, part in enumerate(groups.values()):
        group[order[start : start + part.num_rows]] = g
        start += part.num_rows
    model = bind(law, table.columns, constraints=constraints, groups=names)
    separate = _fit_separately(list(groups.values()), law, alone, options, None, names)
    natural = np.stack([fit.model.natural(fit.u)[0] for fit in separate])
    candidates = [model.free(natural), *(model.free(np.tile(row, (len(names), 1))) for row in natural)]
    # Each group's amplitudes with the median of what is shared, then every group's fit tried for all.
    starts = np.stack(candidates)
    starts = np.where(np.isfinite(starts), starts, 0.0)
    problem = LawProblem(
        model,
        options.objective,
        law.features(table.columns, model.references),
        options.objective.transform(table.columns["loss"])[None],
        np.ones((len(starts), table.num_rows)),
        group=group,
    )
    solution = minimise(problem, starts, low=model.low, high=model.high, max_steps=options.max_steps)
    return _finish(model, options.objective, constraints, table, group, solution, None)


def _finish(
    model: Model,
    objective: Objective,
    constraints: Constraints,
    table: Table,
    group: npt.NDArray[np.int64] | None,
    ends: Solution,
    weights: Array | None,
) -> Fit:
    best = int(np.argmin(ends.value))
    u, value = ends.u[best], float(ends.value[best])
    if not np.isfinite(value):
        raise UserError(
            f"{model.law.name} gives no positive loss anywhere near these data: is 'loss' (or 'L0') in the right column?"
        )
    row_weights = np.ones(table.num_rows) if weights is None else weights
    problem = LawProblem(
        model,
        objective,
        model.law.features(table.columns, model.references),
        objective.transform(table.columns["loss"])[None],
        row_weights[None],
        group=group,
    )
    with np.errstate(all="ignore"):
        residual, jacobian = problem.residual(np.array([0]), u[None])
    curvature = problem(np.array([0]), u[None])
    agree = int(np.sum(ends.value <= value * (1 + AGREEMENT) + ROUNDING * table.num_rows))
    at_low, at_high = u <= model.low, u >= model.high
    bounds = tuple(name for name, low, high in zip(model.coordinates, at_low, at_high, strict=True) if low or high)
    inside = ~(at_low | at_high)
    gradient, outer = curvature.gradient[0][inside], curvature.outer[0][np.ix_(inside, inside)]
    squared = float(gradient @ np.linalg.pinv(outer, rcond=1e-12) @ gradient) if inside.any() else 0.0
    scale = max(value, ROUNDING * table.num_rows)
    status = STATUS_NAMES[ends.status[best]]
    excess = float(min(ends.decrement[best], 1.0)) if np.isfinite(ends.decrement[best]) else 1.0
    if ends.status[best] == CONVERGED:
        reason = f"converged in {ends.steps[best]} evaluations; {agree} of {len(ends.value)} starts reach the same objective"
    else:
        reason = f"{status} after {ends.steps[best]} evaluations: the objective may still fall; look at the ridges"
    if bounds:
        reason += f"; on a bound: {', '.join(bounds)}"
    certificate = Certificate(
        status,
        reason,
        len(ends.value),
        agree,
        excess,
        float(np.sqrt(max(squared, 0.0) / scale)),
        bounds,
        int(ends.steps[best]),
    )
    used = row_weights > 0
    noise = estimate_noise(residual[0][used], objective, model.num_free)
    made = Fit(
        model.law,
        model,
        objective,
        constraints,
        table,
        group,
        u,
        value,
        residual[0],
        jacobian[0].T.copy(),
        noise,
        certificate,
    )
    return replace(made, flags=fit_flags(made.model, made.u, made.jacobian[used], made.noise, table, bounds))
