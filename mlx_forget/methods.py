"""What keeps a finetune from forgetting, as data: backends read a `MethodSpec`, they do not know method names.

The objective of a step is the sum over terms of `coefficient * token_sum / token_count`. Injection needs no term of its own:
its pretraining rows are rows of the task term that come from another source.
"""

from dataclasses import dataclass
from typing import Literal

TERM_TASK, TERM_REPLAY_NTP, TERM_REPLAY_KL = 0, 1, 2
NUM_TERMS = 3

SOURCE_TARGET, SOURCE_PRETRAIN = 0, 1
NUM_SOURCES = 2
SOURCES = ("target", "pretrain")

Reference = Literal["start", "adapters_off"]


@dataclass(frozen=True)
class MethodSpec:
    """The penalties of a run.

    Args:
        name: the method's name in records.
        coefficients: c of each term: task, next-token replay, KL replay. A term of 0 is never computed.
        reference: the frozen model that the KL term needs, or None.
        anchor_decay: lambda of Anchored AdamW: decoupled decay toward the start weights instead of toward zero
            (Bethune et al. 2025); 0 is ordinary AdamW.
    """

    name: str = "injection"
    coefficients: tuple[float, float, float] = (1.0, 0.0, 0.0)
    reference: Reference | None = None
    anchor_decay: float = 0.0


METHODS: dict[str, MethodSpec] = {
    "plain": MethodSpec(name="plain"),
    "injection": MethodSpec(name="injection"),
}
