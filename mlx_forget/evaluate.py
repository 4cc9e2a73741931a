"""Losses on frozen windows: the same rows at every evaluation of every run, summed in float64, with standard errors.

A standard error treats windows as independent draws. Differences between two evaluations of the same windows are paired: most of
the spread between windows cancels.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.pipeline.sides import Side, read_masked
from mlx_forget.trainer import Trainer

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Windows:
    """Frozen evaluation rows, int32[num_windows, T+1].

    Args:
        loss_mask: uint8[num_windows, T], 1 where a label counts; None where all do.
        segment: int32[num_windows, T] as in a `Batch`, or None.
    """

    name: str
    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8] | None = None
    segment: npt.NDArray[np.int32] | None = None

    @classmethod
    def of(cls, name: str, subset: Side, num_windows: int) -> "Windows":
        """The first windows of a subset, in the order that no seed changes; fewer if there are fewer."""
        tokens, loss_mask, segment = read_masked(subset, subset.window_ids(num_windows))
        if loss_mask is not None and not loss_mask.any():
            raise UserError(f"The {name} windows hold no token to learn: raise --eval-rows, or give --no-mask-prompt.")
        return cls(name, tokens, loss_mask, segment)


@dataclass(frozen=True)
class Estimate:
    """A mean in nats per token and its standard error."""

    mean: float
    stderr: float


def window_losses(trainer: Trainer, windows: Windows) -> Losses:
    """Mean loss of each window in nats per token, float64[num_windows]; ranks share the work.

    Where not every label counts, the mean over tokens is a ratio of two sums over windows. A window's value is then that mean and what
    the window adds to it, (its sum - mean * its labels) / labels of a window on average: the mean over windows is that over tokens, and
    their spread gives the standard error of the ratio, not the spread of the numbers of labels.
    """
    losses = np.zeros(len(windows.tokens))
    mine = slice(trainer.group.rank, None, trainer.group.size)
    # Ranks that share one model read together, those without a window too.
    if len(windows.tokens[mine]) or trainer.group.size > 1:
        segment = None if windows.segment is None else windows.segment[mine]
        token_losses = trainer.token_losses(windows.tokens[mine], segment)
        if windows.loss_mask is None:
            losses[mine] = token_losses.mean(axis=1, dtype=np.float64)
        else:
            losses[mine] = (token_losses * windows.loss_mask[mine]).sum(axis=1, dtype=np.float64)
    losses = trainer.group.all_sum(losses)
    if windows.loss_mask is None:
        return losses
    counts = windows.loss_mask.sum(axis=1, dtype=np.float64)
    mean = losses.sum() / counts.sum()
    return np.asarray(mean + (losses - mean * counts) / counts.mean())


# Columns of the history, with the measure of `Comparison` behind each.
START_MEASURES = {
    "forgetting_ce": "soft_ce",
    "forgetting_ce_hard": "hard_ce",
    "forgetting_kl": "kl",
    "start_agreement": "agreement",
}


def compare_with_start(trainer: Trainer, windows: Windows) -> dict[str, float]:
    """Means over the tokens of some windows of what a model says against its reference, the start model; ranks share the work.

    `forgetting_ce` is the cross-entropy of the model to the start model's distribution, the forgetting L_f of Kalajdzievski 2024, and
    `forgetting_ce_hard` that to its most likely token; `forgetting_kl` is the first without the start model's own entropy. Nats per token.
    """
    mine = slice(trainer.group.rank, None, trainer.group.size)
    tokens = windows.tokens[mine]
    mask = np.ones((len(tokens), tokens.shape[1] - 1), np.uint8) if windows.loss_mask is None else windows.loss_mask[mine]
    sums = np.zeros(1 + len(START_MEASURES))
    if len(tokens):
        found = trainer.compare(tokens, mask)
        sums[:] = mask.sum(), *(getattr(found, name).sum(dtype=np.float64) for name in START_MEASURES.values())
    count, *totals = trainer.group.all_sum(sums)
    return {column: float(total / count) for column, total in zip(START_MEASURES, totals, strict=True)}


def estimate(losses: Losses) -> Estimate:
    """Mean over windows and its standard error (nan for a single window)."""
    spread = float(losses.std(ddof=1)) if len(losses) > 1 else math.nan
    return Estimate(float(losses.mean()), spread / math.sqrt(len(losses)))


def paired_difference(after: Losses, before: Losses) -> Estimate:
    """Mean of `after - before` over the same windows and the standard error of that mean."""
    return estimate(np.asarray(after) - np.asarray(before))


@dataclass(frozen=True)
class ProgressLost:
    """Two readings of the share of pretraining progress that a finetune undid; the paper does not define its own.

    Args:
        loss_fraction: (L_after - L_before) / (L_random - L_before), L_random being the loss at initialisation.
        token_equivalent: 1 - D'/D, where the pretraining run had the loss L_after at D' of its D tokens.
    """

    loss_fraction: float | None
    token_equivalent: float | None


def progress_lost(curve: list[tuple[float, float]], before: float, after: float) -> ProgressLost:
    """Both readings from a pretraining curve of (tokens, pretraining validation loss), first point at initialisation.

    The curve is inverted on its running minimum, linearly in log tokens (linearly in tokens before the first evaluation). Nothing
    lost is 0; without a curve both are None.
    """
    if len(curve) < 2:
        return ProgressLost(None, None)
    loss_fraction = (after - before) / (curve[0][1] - before)
    tokens = np.array([point[0] for point in curve], np.float64)
    best = np.minimum.accumulate([point[1] for point in curve])
    if after <= best[-1]:
        return ProgressLost(loss_fraction, 0.0)
    if after >= best[0]:
        return ProgressLost(loss_fraction, 1.0)
    later = int(np.argmax(best <= after))
    share = (best[later - 1] - after) / (best[later - 1] - best[later])
    if tokens[later - 1] == 0:
        equivalent = share * tokens[later]
    else:
        equivalent = tokens[later - 1] * (tokens[later] / tokens[later - 1]) ** share
    return ProgressLost(loss_fraction, float(1 - equivalent / tokens[-1]))
