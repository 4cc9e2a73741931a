"""The kinds of parameter that the published laws are built of."""

from mlx_forget.laws.forms import Parameter

EXPONENTS = (0.03, 0.1, 0.25, 0.5, 1.0)
# Of the laws of forgetting and finetuning, which share parameters.
SOURCE_BETHUNE = "Bethune et al., ICML 2025, arXiv 2502.06042"


def amplitude(name: str, meaning: str, unit: str = "nats x units of the columns") -> Parameter:
    return Parameter(name, meaning, unit, log=True, low=1e-200, high=1e200, linear=True)


def exponent(name: str, meaning: str, *, grid: tuple[float, ...] = EXPONENTS, low: float = 0.0, high: float = 10.0) -> Parameter:
    return Parameter(name, meaning, low=low, high=high, grid=grid)


def floor(meaning: str = "loss that no amount of the columns removes") -> Parameter:
    return Parameter("E", meaning, "nats", low=0.0, high=50.0, linear=True)


REPLAY = Parameter(
    "B",
    "how much a share of pretraining data multiplies the capacity left for pretraining: (1 + B p)",
    log=True,
    low=1e-3,
    high=1e8,
    grid=(3.0, 50.0, 500.0, 5000.0),
)
