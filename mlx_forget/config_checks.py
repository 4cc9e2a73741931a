"""What the values of a configuration must be, by themselves and together, whatever they are used for."""

import dataclasses
import math

from mlx_forget.config_keys import REFERENCE_LIVE, ConfigKeys
from mlx_forget.errors import UserError, unknown
from mlx_forget.pipeline.reference_rows import parse_kind
from mlx_forget.pipeline.rows import LAYOUTS
from mlx_forget.pipeline.shares import parse_stages

# What users call a key where it is not its name.
_CALLED = {"lora_num_layers": "--num-layers"}


def check_config(config: ConfigKeys) -> None:
    """Refuse values that can mean nothing.

    Raises:
        UserError: which key, its value, and what it may be.
    """
    stages = parse_stages(config.p)
    for name in (
        "iters",
        "batch_size",
        "eval_rows",
        "pretrain_epochs",
        "steps_per_report",
        "vocab_size",
        "lora_rank",
        "lora_alpha",
    ):
        _positive(name, getattr(config, name))
    for name in (
        "target_tokens",
        "max_seq_length",
        "steps_per_eval",
        "save_every",
        "micro_batch_size",
        "num_threads",
        "learning_rate",
        "tokens_per_param",
        "stop_target_loss",
        "stop_patience",
        "stop_tokens",
        "stop_epochs",
        "stop_minutes",
        "max_forgetting",
        "memory_limit_gb",
        "replay_rows",
        "replay_tokens",
        "lora_num_layers",
        "beta2_half_life_tokens",
    ):
        if getattr(config, name) is not None:
            _positive(name, getattr(config, name))
    for name in ("weight_decay", "max_grad_norm", "max_skipped", "seed"):
        if not getattr(config, name) >= 0:
            raise UserError(f"{name} must not be negative, it is {getattr(config, name)}.")
    if not 0 <= config.lora_dropout < 1:
        raise UserError(f"lora_dropout must be at least 0 and below 1, it is {config.lora_dropout:g}.")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 0 and below 1, it is {getattr(config, name):g}.")
    if idle := _idle_lora_fields(config):
        has = "is full and has no adapters" if config.fine_tune_type == "full" else "is ia3, which has no rank"
        raise UserError(f"{idle[0]} is given, but --fine-tune-type {has}: give lora or dora.")
    for name in ("warmup", "lr_final", "lr_decay_share", "lr_cooldown_share", "lr_plateau"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{name} is a share, from 0 to 1, it is {getattr(config, name)}.")
    if config.optimizer != "adamw" and config.beta2_half_life_tokens is not None:
        raise UserError(f"--beta2-half-life-tokens is AdamW's: optimizer {config.optimizer!r} has no beta2.")
    if config.seed >= 2**63:
        raise UserError(f"seed must be below 2^63, it is {config.seed}.")
    if config.max_forgetting is not None and config.pretrain is None:
        raise UserError(
            f"max_forgetting is {config.max_forgetting:g}, but there is no pretraining loss to hold it to: give --pretrain."
        )
    if config.reference_log_probs != REFERENCE_LIVE:
        parse_kind(config.reference_log_probs)
    if config.rows not in LAYOUTS:
        raise unknown("rows", config.rows, LAYOUTS)
    if any(stage.first or stage.last for stage in stages) and config.pretrain is None:
        raise UserError(f"p is {config.p}, but there is no pretraining data to inject: give --pretrain, or --p 0.")


def _idle_lora_fields(config: ConfigKeys) -> list[str]:
    """Keys that say something of adapters that this run does not have."""
    read = {"full": ("lora_num_layers",), "ia3": ("lora_num_layers", "lora_target_modules")}.get(config.fine_tune_type)
    fields = [f for f in dataclasses.fields(config) if f.name.startswith("lora_")]
    given = [f.name for f in fields if getattr(config, f.name) != f.default]
    return [] if read is None else [name for name in given if name not in read]


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{_CALLED.get(name, name)} must be positive and finite, it is {value}.")
