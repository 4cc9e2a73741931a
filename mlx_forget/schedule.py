"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mlx_forget.errors import UserError

Decay = Literal["cosine", "constant", "wsd", "rewarm", "infinite"]
DECAYS: tuple[str, ...] = get_args(Decay)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak, then one of the shapes below. Shares are of all steps.

    Args:
        peak: highest learning rate.
        num_steps: length of the run.
        decay: `cosine` falls to `final_fraction * peak` over the whole run (pretraining); `constant` stays at the peak (finetuning);
            `wsd` stays at the peak and falls linearly to the final rate in the last `decay_fraction` of the steps (warm-up, stable,
            decay: Hu et al. 2024; linear: Haegele et al. 2024); `rewarm` is the cosine whose warm-up begins at the final rate, where an
            earlier cosine has ended (re-warming and re-decaying: Ibrahim et al. 2024); `infinite` falls by a cosine to
            `plateau_fraction * peak` within `cooldown_fraction` of the steps, stays there, and falls exponentially to the final rate in
            the last `decay_fraction` (Ibrahim et al. 2024).
        warmup_fraction: share of the steps that warm up (Bethune et al. 2025: 0.5%).
        final_fraction: the last rate over the peak (1/100; of the three that decay at the end, and of the cosine).
        decay_fraction: share of the steps in which `wsd` and `infinite` decay.
        cooldown_fraction: share of the steps in which `infinite` falls to its plateau.
        plateau_fraction: rate of that plateau over the peak.

    Raises:
        UserError: warm-up, cooldown and decay take more than all steps, or a final rate that its shape cannot have.
    """

    peak: float
    num_steps: int
    decay: Decay = "cosine"
    warmup_fraction: float = 0.005
    final_fraction: float = 0.01
    decay_fraction: float = 0.2
    cooldown_fraction: float = 0.25
    plateau_fraction: float = 0.5

    def __post_init__(self) -> None:
        phases = {
            "wsd": self.warmup_fraction + self.decay_fraction,
            "infinite": self.warmup_fraction + self.cooldown_fraction + self.decay_fraction,
        }
        taken = phases.get(self.decay, self.warmup_fraction)
        if taken > 1:
            raise UserError(f"Warm-up and decays of the schedule {self.decay!r} take {taken:.0%} of the steps: shorten them.")
        if self.decay == "infinite" and not 0 < self.final_fraction <= self.plateau_fraction <= 1:
            raise UserError(
                f"The schedule 'infinite' falls from 1 to lr_plateau {self.plateau_fraction:g} and on to lr_final {self.final_fraction:g}: "
                "they must fall, and end above 0."
            )

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., num_steps - 1; the first step already learns."""
        warmup = math.ceil(self.warmup_fraction * self.num_steps)
        if step < warmup:
            share = (step + 1) / warmup
            return self.peak * (self.final_fraction + (1 - self.final_fraction) * share if self.decay == "rewarm" else share)
        if self.decay == "constant":
            return self.peak
        if self.decay == "wsd":
            return self.peak * (1 - (1 - self.final_fraction) * self._end_phase(step))
        if self.decay == "infinite":
            cooldown = max(1.0, self.cooldown_fraction * self.num_steps)
            stable = _cosine((step - warmup) / cooldown, self.plateau_fraction)
            return self.peak * stable * math.pow(self.final_fraction / stable, self._end_phase(step))
        return self.peak * _cosine((step - warmup) / max(1, self.num_steps - warmup), self.final_fraction)

    def _end_phase(self, step: int) -> float:
        """How far the last phase is, 0 before it; the step after the last would be 1."""
        length = max(1, math.ceil(self.decay_fraction * self.num_steps))
        return max(0.0, (step - (self.num_steps - length)) / length)


def _cosine(progress: float, final: float) -> float:
    """From 1 to `final` as progress goes from 0 to 1; `final` after that."""
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
