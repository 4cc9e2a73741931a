"""Combinations of a law's parameters that data of ordinary design determine, unlike the raw amplitudes."""

from collections.abc import Callable, Iterator

import numpy as np

from mlx_forget.laws.forms import Law

# From {parameter: natural value} and {column: reference} to the value.
Contrast = Callable[[dict, dict], np.ndarray]


def contrasts(law: Law) -> Iterator[tuple[str, Contrast]]:
    """Each by a name: the exponents, and each amplitude at the middle of the data; for Kalajdzievski's laws slopes and size there."""
    if law.mixed == ("a", "b"):
        yield "slope in log P", lambda params, references: _slope(params, *_terms(params, references))
        yield "slope in log steps", lambda params, references: _slope(params, *_terms(params, references)[::-1])
        yield "size of the term", lambda params, references: sum(value for value, _ in _terms(params, references)) ** params["rho"]
        return
    if law.to_natural is not None:
        return
    for j, parameter in enumerate(law.parameters):

        def centred(params, references, j=j, is_log=parameter.log):
            value = law.internal(np.stack([np.asarray(params[name], float) for name in law.names], axis=-1), references)[..., j]
            return np.exp(value) if is_log else value

        yield parameter.name, centred


def _terms(params, references):
    """(value, exponent) of the two terms within the bracket, at the middle of the data."""
    return [
        ((params[name] / references[column]) ** params[power], params[power])
        for name, column, power in (("a", "P", "alpha"), ("b", "steps", "beta"))
    ]


def _slope(params, own, other):
    value, power = own
    return params["rho"] * (value + other[0]) ** (params["rho"] - 1) * value * power
