"""What ends a run before its last step."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Rule = Literal["max_forgetting", "target_loss", "patience", "time"]


class Stop(NamedTuple):
    """The rule that ends a run, and what it saw, in words."""

    rule: Rule
    reason: str


@dataclass(frozen=True)
class StopRules:
    """When a run ends before its last step; None switches a rule off.

    Args:
        num_steps: the last step; token and epoch limits are folded into it.
        target_loss: stop at or below this target validation loss.
        patience: stop after this many evaluations without a new minimum.
        max_forgetting: stop once pretraining loss has risen by more than this many nats.
        max_seconds: stop after this much training time.
        max_skipped: more masked updates than this are divergence.
    """

    num_steps: int
    target_loss: float | None = None
    patience: int | None = None
    max_forgetting: float | None = None
    max_seconds: float | None = None
    max_skipped: int = 0

    def is_too_much(self, forgetting: float | None) -> bool:
        """Whether the pretraining loss has risen by more than is allowed; None is what is not read."""
        return self.max_forgetting is not None and forgetting is not None and forgetting > self.max_forgetting

    def met(self, target_val: float, forgetting: float | None, evaluations_since_best: int) -> Stop | None:
        """The rule that an evaluation meets, if any.

        Args:
            target_val: the target validation loss, nats.
            forgetting: the rise of the pretraining loss since the start, nats; None where it is not read.
            evaluations_since_best: evaluations since the least target validation loss.
        """
        if self.is_too_much(forgetting):
            return Stop(
                "max_forgetting", f"pretraining loss rose by {forgetting:.3f} nats, over the limit of {self.max_forgetting:g}"
            )
        if self.target_loss is not None and target_val <= self.target_loss:
            return Stop("target_loss", f"target validation loss {target_val:.4f} reached {self.target_loss:g}")
        if self.patience is not None and evaluations_since_best >= self.patience:
            return Stop("patience", f"no better target validation loss in {self.patience} evaluations")
        return None
