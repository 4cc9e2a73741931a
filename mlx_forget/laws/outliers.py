"""Rows far off a fit, and the fit without them. Dropping a handful of points can move an amplitude sixfold, so both fits are shown."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.laws.fit import DEFAULTS, FitOptions, fit_law
from mlx_forget.laws.fitted import Fit

# In standard deviations of the noise, which is read from the median and so does not grow with the outliers.
FAR = 5.0


@dataclass(frozen=True)
class Pair:
    """One law fitted with some rows and without them.

    Args:
        rows: the numbers of those rows, int[m].
        names: what to call each: its run where the table names runs, otherwise its number.
        with_rows, without_rows: the two fits.
    """

    rows: npt.NDArray[np.int64]
    names: tuple[str, ...]
    with_rows: Fit
    without_rows: Fit

    def describe(self) -> str:
        """The parameters that both fits have, in a line."""
        values = self.without_rows.params
        moved = "; ".join(
            f"{name} {value:.4g} / {values[name]:.4g}" for name, value in self.with_rows.params.items() if name in values
        )
        return f"with / without {'it' if len(self.rows) == 1 else 'them'}: {moved}"


def far_rows(fit: Fit) -> npt.NDArray[np.bool_]:
    """The rows [n] more than 5 standard deviations of the noise off their prediction."""
    return np.asarray(np.abs(fit.residual) > FAR * max(fit.noise.residual, 1e-9))


def compare(whole: Fit, part: Fit) -> Pair | None:
    """A fit beside one to fewer of its rows; None where they are the same rows."""
    rows = np.setdiff1d(whole.table.row_numbers, part.table.row_numbers)
    gone = np.isin(whole.table.row_numbers, rows)
    names = [f"row {number}" for number in whole.table.row_numbers] if whole.table.run is None else whole.table.run.tolist()
    return Pair(rows, tuple(names[i] for i in np.flatnonzero(gone)), whole, part) if len(rows) else None


def without_far_rows(fit: Fit, *, by: str | None = None, options: FitOptions = DEFAULTS) -> Pair | None:
    """The fit beside one without its outliers; None where it has none, or too few other rows.

    Args:
        fit: the fit.
        by: the column of the groups of a joint fit.
        options: of the fit.
    """
    far = far_rows(fit)
    if not far.any():
        return None
    try:
        other = fit_law(fit.table.select(~far), fit.law, constraints=fit.constraints, by=by, options=options)
    except UserError:
        return None
    return compare(fit, other)
