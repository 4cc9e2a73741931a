"""What keeps a finetune from forgetting, as data: backends read a `MethodSpec`, they do not know method names.

The objective of a step is the sum over terms of `coefficient * token_sum / token_count`, plus the penalties on the weights. Injection
needs no term of its own: its pretraining rows are rows of the task term that come from another source.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlx_forget.errors import UserError, unknown

TERM_TASK, TERM_REPLAY_NTP, TERM_REPLAY_KL = 0, 1, 2
NUM_TERMS = 3

SOURCE_TARGET, SOURCE_PRETRAIN = 0, 1
NUM_SOURCES = 2

Reference = Literal["start", "adapters_off"]


@dataclass(frozen=True)
class MethodSpec:
    """The penalties of a run.

    Args:
        name: the method's name in records.
        coefficients: c of each term: task, next-token replay, KL replay. A term of 0 is never computed.
        kl_on_task: the KL term is taken on the task rows themselves (learning without forgetting) besides rows of its own.
        reference: the frozen model that the KL term and the anchors need, or None.
        anchor_decay: lambda of Anchored AdamW: decoupled decay of every weight toward the reference
            (Bethune et al. 2025): theta <- theta - lr (adam + lambda (theta - theta0)); lr lambda counts as at most 1.
        l2_sp: lambda of L2-SP (Li et al. 2018): lambda / 2 |theta - theta0|^2 is added to the objective.
        ewc: lambda of elastic weight consolidation (Kirkpatrick et al. 2017): lambda / 2 sum F (theta - theta0)^2 is added, F being
            the diagonal of the Fisher information per token.
        decays_to_zero: AdamW's own decay stays on.
        learning_rate_factor: what the learning rate is multiplied by.
        anchor_precision: how the anchor is kept: `bf16` halves its memory and rounds it to 8 bits.
    """

    name: str = "injection"
    coefficients: tuple[float, float, float] = (1.0, 0.0, 0.0)
    kl_on_task: bool = False
    reference: Reference | None = None
    anchor_decay: float = 0.0
    l2_sp: float = 0.0
    ewc: float = 0.0
    decays_to_zero: bool = True
    learning_rate_factor: float = 1.0
    anchor_precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def has_kl(self) -> bool:
        return self.coefficients[TERM_REPLAY_KL] != 0

    @property
    def has_anchor(self) -> bool:
        """Whether the weights are held near the reference."""
        return bool(self.anchor_decay or self.l2_sp or self.ewc)

    @property
    def replay_term(self) -> int | None:
        """The term of the replay rows that are added to each step, or None."""
        if self.kl_on_task:
            return None
        return next((term for term in (TERM_REPLAY_NTP, TERM_REPLAY_KL) if self.coefficients[term]), None)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        text: what it does, for help.
        strength: what its coefficient is called, or None where it has none.
        default: that coefficient by default.
        make: the penalties for a coefficient.
        reads_replay: it needs replay rows: a term's, or those that the Fisher information is measured on.
    """

    text: str
    make: Callable[[float], MethodSpec]
    strength: str | None = None
    default: float = 0.0
    reads_replay: bool = False


METHODS: dict[str, Method] = {
    "plain": Method("no protection", lambda c: MethodSpec(name="plain")),
    "injection": Method("a share p of the rows is pretraining data", lambda c: MethodSpec(name="injection")),
    "anchored-adamw": Method(
        "AdamW decays toward the start weights instead of toward zero",
        lambda c: MethodSpec(name="anchored-adamw", reference="start", anchor_decay=c, decays_to_zero=False),
        strength="lambda",
        default=10.0,
    ),
    "l2-sp": Method(
        "lambda / 2 times the squared distance from the start weights is added",
        lambda c: MethodSpec(name="l2-sp", reference="start", l2_sp=c),
        strength="lambda",
        default=1e-2,
    ),
    "ewc": Method(
        "as l2-sp, each weight counting by its Fisher information",
        lambda c: MethodSpec(name="ewc", reference="start", ewc=c),
        strength="lambda",
        default=1.0,
        reads_replay=True,
    ),
    "ntp-replay": Method(
        "the next-token loss of replay rows is added",
        lambda c: MethodSpec(name="ntp-replay", coefficients=(1.0, c, 0.0)),
        strength="c",
        default=1.0,
        reads_replay=True,
    ),
    "kl-replay": Method(
        "KL(start model || model) on replay rows is added",
        lambda c: MethodSpec(name="kl-replay", coefficients=(1.0, 0.0, c), reference="start"),
        strength="c",
        default=1.0,
        reads_replay=True,
    ),
    "lwf": Method(
        "KL(start model || model) on the target rows is added (learning without forgetting)",
        lambda c: MethodSpec(name="lwf", coefficients=(1.0, 0.0, c), kl_on_task=True, reference="start"),
        strength="c",
        default=1.0,
    ),
    "low-lr": Method(
        "the learning rate is multiplied by the coefficient",
        lambda c: MethodSpec(name="low-lr", learning_rate_factor=c),
        strength="factor",
        default=0.1,
    ),
}


def method_spec(name: str, coefficient: float | None = None) -> MethodSpec:
    """The penalties of a method; `coefficient` None takes its default.

    Raises:
        UserError: an unknown method, or a coefficient that is negative or that the method does not have.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method = METHODS[name]
    if coefficient is None:
        return method.make(method.default)
    if method.strength is None:
        raise UserError(f"Method {name!r} has no coefficient: leave --coefficient out (it is {coefficient:g}).")
    if not 0 <= coefficient < float("inf"):
        raise UserError(f"--coefficient ({method.strength} of {name}) must be finite and not negative, it is {coefficient:g}.")
    if name == "low-lr" and not coefficient:
        raise UserError("--coefficient (factor of low-lr) must be positive: at 0 nothing is learnt.")
    return method.make(coefficient)
