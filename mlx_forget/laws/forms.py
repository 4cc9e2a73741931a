"""What a law is, as data: its formula, columns, parameters, gradient, and the registry of laws.

A law is written in *internal* coordinates: a positive amplitude enters as its logarithm, and every column that the law sees through
a logarithm is divided by a reference (its geometric mean over the table). Centred this way, an amplitude is the size of its term in
the middle of the data and no longer moves with its exponent, which takes the condition number of the normal matrix from 1e13 to
about 1e3. `to_natural` undoes both for the reader.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError, unknown

Array = npt.NDArray[np.float64]
Features = Mapping[str, Array]
Partial = Array | float
Evaluate = Callable[[Features, Sequence[Array]], tuple[Array, Sequence[Partial]]]

COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "N": "parameters of the model",
        "D": "unique training tokens",
        "p": "share of pretraining or replay data, 0 to 1",
        "r": "share of the training data that is the corpus whose loss is predicted, 0 to 1",
        "R": "share of domain data in the mixture, 0 to 1",
        "P": "trainable parameters",
        "steps": "update steps",
        "L0": "pretraining loss before finetuning, nats per token",
        "L_ft": "finetuning loss, nats per token",
        "loss": "the measured loss, nats per token",
        "run": "the run that a row belongs to",
        "base": "the base model that the run started from",
    }
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law.

    Args:
        name: its symbol.
        meaning: what it says, in words.
        unit: its unit as text; empty for a pure number.
        log: whether it is positive and searched by its logarithm.
        low, high: natural bounds; a fit may end on one and then says so.
        linear: whether the law is linear in it, given the rest (amplitudes and offsets).
        grid: natural starting values of a parameter that is not linear.
    """

    name: str
    meaning: str
    unit: str = ""
    log: bool = False
    low: float = -np.inf
    high: float = np.inf
    linear: bool = False
    grid: tuple[float, ...] = ()

    @property
    def internal_low(self) -> float:
        return self.encode(self.low)

    @property
    def internal_high(self) -> float:
        return self.encode(self.high)

    def encode(self, value: float) -> float:
        """The internal coordinate of a natural value, before centring."""
        if not self.log:
            return float(value)
        with np.errstate(divide="ignore"):
            return float(np.log(value))


@dataclass(frozen=True)
class Rescale:
    """How an amplitude moves when a column is divided by its reference: amplitude_natural = amplitude_internal * reference^power.

    Args:
        amplitude: the parameter that absorbs the reference.
        column: the column that is divided.
        power: the exponent's parameter name, or None for the constant power 1.
        sign: +1 or -1, the sign of the power.
    """

    amplitude: str
    column: str
    power: str | None
    sign: float


@dataclass(frozen=True)
class Alternative:
    """A rival of a law, for selection: another law, or the same one with parameters fixed or tied.

    Args:
        name: what the verdict calls it.
        law: name of the law to fit.
        fixed: parameters held at a natural value.
        tied: parameters set equal to another, {follower: leader}.
        inside: names of the alternatives that contain this one as a special case (F tests compare these).
    """

    name: str
    law: str
    fixed: Mapping[str, float] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    inside: tuple[str, ...] = ()


ToNatural = Callable[[Array, Mapping[str, float]], Array]
Starts = Callable[[Features, Array, Array], Array]


@dataclass(frozen=True)
class Law:
    """A scaling law as data.

    Args:
        name: its name on the command line.
        formula: as text, in the symbols of `parameters` and `columns`.
        latex: the same for a figure or a paper.
        source: paper and equation.
        columns: the columns it reads, the response aside.
        parameters: in the order that `evaluate` takes them.
        evaluate: `(features, theta) -> (value, partials)`. `features` holds one array per column, shape [1 or R, n]; a column named
            in `logs` is the logarithm of column / reference, and `features["ref:" + column]` is the logarithm of the reference.
            `theta` holds one internal coordinate per parameter, shape [R, 1] or [R, n]. `value` and the partials (derivatives with
            respect to the internal coordinates) broadcast to [R, n].
        logs: columns seen through a logarithm.
        rescales: how amplitudes absorb the references.
        alternatives: rivals for selection, this law included.
        response: what is predicted: "pretraining", "target", "forgetting" (cross-entropy to the start model) or "loss".
        to_natural, to_internal: own change of coordinates, for laws where `rescales` cannot say it.
        starts: own starting points, `(features, response[n], weights[n]) -> internal[S, k]`.
        mixed: parameters that `to_natural` makes of several coordinates, so that they are no better known than the worst of those.
        plain: the same law in coordinates of which each is one parameter, for a law with `to_natural`: what is fixed or tied is
            held there. None where nothing can be held.
    """

    name: str
    formula: str
    latex: str
    source: str
    columns: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    evaluate: Evaluate
    logs: tuple[str, ...] = ()
    rescales: tuple[Rescale, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    response: str = "loss"
    to_natural: ToNatural | None = None
    to_internal: ToNatural | None = None
    starts: Starts | None = None
    mixed: tuple[str, ...] = ()
    plain: "Law | None" = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def linear(self) -> tuple[str, ...]:
        """The parameters in which the law is linear, given the rest."""
        return tuple(parameter.name for parameter in self.parameters if parameter.linear)

    def index(self, name: str) -> int:
        """The position of a parameter.

        Raises:
            UserError: the law has no such parameter.
        """
        if name not in self.names:
            raise unknown(f"parameter of {self.name}", name, self.names)
        return self.names.index(name)

    def features(self, columns: Mapping[str, npt.ArrayLike], references: Mapping[str, float]) -> dict[str, Array]:
        """What `evaluate` reads, from natural columns of shape [n] or [R, n] and the references."""
        made: dict[str, Array] = {}
        for column in self.columns:
            values = np.atleast_2d(np.asarray(columns[column], dtype=np.float64))
            if column in self.logs:
                reference = np.log(references[column])
                made["ref:" + column] = np.atleast_2d(reference)
                values = np.log(values) - reference
            made[column] = values
        return made

    def natural(self, theta: Array, references: Mapping[str, float]) -> Array:
        """Natural parameters [..., k] of internal coordinates [..., k]."""
        if self.to_natural is not None:
            return self.to_natural(theta, references)
        values = np.array(theta, dtype=np.float64)
        with np.errstate(over="ignore"):
            for j, parameter in enumerate(self.parameters):
                shift = self._shift(theta, parameter.name, references)
                values[..., j] = np.exp(values[..., j] + shift) if parameter.log else values[..., j] * np.exp(shift)
        return values

    def internal(self, values: npt.ArrayLike, references: Mapping[str, float]) -> Array:
        """Internal coordinates [..., k] of natural parameters [..., k]: the inverse of `natural`."""
        natural = np.asarray(values, dtype=np.float64)
        if self.to_internal is not None:
            return self.to_internal(natural, references)
        theta = np.array(natural)
        for j, parameter in enumerate(self.parameters):
            shift = self._shift(natural, parameter.name, references)
            with np.errstate(divide="ignore"):
                theta[..., j] = np.log(natural[..., j]) - shift if parameter.log else natural[..., j] * np.exp(-shift)
        return theta

    def _shift(self, exponents: Array, name: str, references: Mapping[str, float]) -> Array:
        shift: Array = np.zeros(exponents.shape[:-1])
        for rule in self.rescales:
            if rule.amplitude == name:
                power = 1.0 if rule.power is None else exponents[..., self.index(rule.power)]
                shift = shift + rule.sign * power * np.log(references[rule.column])
        return shift

    def predict(self, params: Mapping[str, float], columns: Mapping[str, npt.ArrayLike]) -> Array:
        """The law's value [n] for natural parameters and natural columns of shape [n] (or scalars)."""
        references = dict.fromkeys(self.logs, 1.0)
        sizes = [np.size(columns[column]) for column in self.columns]
        arrays = {column: np.broadcast_to(np.asarray(columns[column], float), (max(sizes),)) for column in self.columns}
        theta = self.internal(np.array([[params[name] for name in self.names]]), references)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            value, _ = self.evaluate(self.features(arrays, references), [theta[:, j, None] for j in range(theta.shape[1])])
        return np.array(np.broadcast_to(value, (1, max(sizes)))[0])

    def gradient(self, params: Mapping[str, float], columns: Mapping[str, npt.ArrayLike]) -> Array:
        """The derivatives [n, k] of the value with respect to the natural parameters."""
        references = dict.fromkeys(self.logs, 1.0)
        arrays = {column: np.atleast_1d(np.asarray(columns[column], float)) for column in self.columns}
        natural = np.array([params[name] for name in self.names], dtype=np.float64)
        theta = self.internal(natural[None], references)
        value, partials = self.evaluate(self.features(arrays, references), [theta[:, j, None] for j in range(len(natural))])
        jacobian = np.stack([np.broadcast_to(partial, value.shape)[0] for partial in partials], axis=1)
        if self.to_internal is None:
            return jacobian / np.where([parameter.log for parameter in self.parameters], natural, 1.0)
        # One's own change of coordinates: its matrix by central differences of exact logarithms.
        matrix = np.empty((len(natural), len(natural)))
        for j in range(len(natural)):
            step = np.zeros(len(natural))
            step[j] = 1e-6 * max(abs(natural[j]), 1e-12)
            both = self.internal(np.stack([natural + step, natural - step]), references)
            matrix[:, j] = (both[0] - both[1]) / (2 * step[j])
        return jacobian @ matrix


_LAWS: dict[str, Law] = {}


def register(law: Law) -> Law:
    """Add a law (or replace one of the same name), so that fits, files and the command line know it by name.

    Raises:
        UserError: the law reads a column or moves a parameter that it does not declare.
    """
    for rule in law.rescales:
        if rule.amplitude not in law.names or (rule.power is not None and rule.power not in law.names):
            raise UserError(
                f"Law {law.name!r}: a rescale names {rule.amplitude!r} or {rule.power!r}, which are no parameters of it."
            )
        if rule.column not in law.logs:
            raise UserError(f"Law {law.name!r}: column {rule.column!r} is rescaled, so it must be listed in `logs`.")
    for column in law.logs:
        if column not in law.columns:
            raise UserError(f"Law {law.name!r}: {column!r} is in `logs` and not in `columns`.")
    _LAWS[law.name] = law
    return law


def get_law(name: str) -> Law:
    """The law of that name.

    Raises:
        UserError: no such law; the nearest name is suggested.
    """
    if name not in _LAWS:
        raise unknown("law", name, [known for known in _LAWS if "/" not in known])
    return _LAWS[name]


def laws() -> Iterator[Law]:
    """All laws that are not mere rivals of another (those carry a slash in their name), in order of registration."""
    return (law for name, law in _LAWS.items() if "/" not in name)


def law_from_function(
    name: str,
    function: Callable[
        [Mapping[str, npt.NDArray[np.generic]], Mapping[str, npt.NDArray[np.generic]]],
        npt.NDArray[np.generic],
    ],
    *,
    parameters: tuple[Parameter, ...],
    columns: tuple[str, ...],
    formula: str,
    source: str = "user",
    latex: str = "",
    response: str = "loss",
    alternatives: tuple[Alternative, ...] = (),
) -> Law:
    """A law from an ordinary function `f(columns, params) -> values` of natural columns and parameters.

    Derivatives come from the complex step (exact to rounding), so `function` must be built of NumPy operations that accept complex
    numbers: `+ - * / **`, `exp`, `log`, `sqrt`; not `abs`, `maximum` or `log1p` of a complex array.
    """

    def evaluate(features: Features, theta: Sequence[Array]) -> tuple[Array, Sequence[Partial]]:
        read = {column: features[column].astype(complex) for column in columns}

        def at(shifted: int) -> npt.NDArray[np.complex128]:
            params = {}
            for j, parameter in enumerate(parameters):
                coordinate = theta[j] + (1e-30j if j == shifted else 0.0)
                params[parameter.name] = np.exp(coordinate) if parameter.log else coordinate
            return np.asarray(function(read, params), dtype=np.complex128)

        results = [at(j) for j in range(len(parameters))]
        return results[0].real, [result.imag / 1e-30 for result in results]

    return Law(
        name=name,
        formula=formula,
        latex=latex or formula,
        source=source,
        columns=columns,
        parameters=parameters,
        evaluate=evaluate,
        response=response,
        alternatives=alternatives,
    )
