"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["cosine", "constant"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine decay or a constant rate.

    Args:
        peak: highest learning rate.
        num_steps: length of the run.
        decay: `cosine` ends at `final_fraction * peak` (pretraining); `constant` stays at the peak (finetuning).
        warmup_fraction: share of the steps that warm up (Bethune et al. 2025: 0.5%).
        final_fraction: where the cosine ends (1/100 of the peak).
    """

    peak: float
    num_steps: int
    decay: Decay = "cosine"
    warmup_fraction: float = 0.005
    final_fraction: float = 0.01

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., num_steps - 1; the first step already learns."""
        warmup = math.ceil(self.warmup_fraction * self.num_steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        if self.decay == "constant":
            return self.peak
        progress = (step - warmup) / max(1, self.num_steps - warmup)
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2)
