"""The learning rate of a run: its peak where none is given, by the size of the model and by what it starts from; its schedule."""

import math

from mlx_forget.config import TrainConfig
from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec, num_params
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.schedule import Decay, Schedule


def default_peak(spec: ModelSpec | PretrainedSpec) -> float:
    """Peak pretraining rate by size, our choice (the paper's are not known): 3e-3 at 0.65M parameters, falling as N^-0.3."""
    return 3e-3 * math.pow(num_params(spec) / 656_448, -0.3)


def finetuning_ratio(spec: ModelSpec | PretrainedSpec) -> float:
    """Finetuning rate over pretraining peak: the paper's 1/30; 1/5 for models of at most 20M parameters, which run far fewer steps."""
    return 1 / 5 if num_params(spec) <= 20_000_000 else 1 / 30


def schedule(
    config: TrainConfig, spec: ModelSpec | PretrainedSpec, base_peak: float | None, *, default_peak_rate: float | None = None
) -> Schedule:
    """The learning-rate schedule of a run.

    Args:
        base_peak: of the pretraining run behind the start weights.
        default_peak_rate: for start weights that have no such run.

    Raises:
        UserError: a finetune whose start checkpoint does not say its peak rate, without a rate of its own.
    """
    factor = config.method_spec().learning_rate_factor
    if config.learning_rate is not None:
        peak = config.learning_rate * factor
    elif config.is_pretraining:
        peak = default_peak(spec)
    elif base_peak is not None:
        # Re-warming goes back to where pretraining had been.
        peak = base_peak * (1 if config.lr_schedule == "rewarm" else finetuning_ratio(spec)) * factor
    elif default_peak_rate is not None:
        peak = default_peak_rate * factor
    else:
        raise UserError("The start checkpoint does not say its peak learning rate: give --learning-rate.")
    decay: Decay = config.lr_schedule or ("cosine" if config.is_pretraining else "constant")
    return Schedule(
        peak=peak,
        num_steps=config.iters,
        decay=decay,
        warmup_fraction=config.warmup,
        final_fraction=config.lr_final,
        decay_fraction=config.lr_decay_share,
        cooldown_fraction=config.lr_cooldown_share,
        plateau_fraction=config.lr_plateau,
    )
