"""The configuration of a run: its keys (`config_keys`), checked (`config_checks`), and what follows from them.

A value comes from the command line, else from the YAML file, else from `config_keys`, the only source of every default that no other key
decides. Keys are strict: an unknown one is an error that names the nearest (`config_layers`). Which keys name a run is the affair of `training.identity`.
"""

import dataclasses
import os
import typing
from dataclasses import dataclass
from typing import Any

from mlx_forget.adapters import ATTENTION
from mlx_forget.config_checks import check_config
from mlx_forget.config_keys import INJECTED_SHARE, ConfigKeys
from mlx_forget.config_layers import from_layers
from mlx_forget.errors import UserError
from mlx_forget.ladder import is_ladder_name
from mlx_forget.methods import MethodSpec, method_spec
from mlx_forget.specs import AdapterSpec, OptimSpec, Precision, RuntimeSpec


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ConfigKeys):
    """The keys of a run, checked, and what follows from them."""

    def __post_init__(self) -> None:
        self.method_spec()
        if typing.cast("str | None", self.p) is None:
            injects = self.method == "injection" and not self.is_pretraining
            object.__setattr__(self, "p", INJECTED_SHARE if injects else "0")
        check_config(self)

    @property
    def is_pretraining(self) -> bool:
        return self.init == "scratch"

    @property
    def trained_layers(self) -> int | None:
        """Without adapters, the last so many blocks, whose weights alone are trained; None where all are."""
        return self.lora_num_layers if self.fine_tune_type == "full" else None

    @property
    def start_name(self) -> str | None:
        """The checkpoint to start from, as the user named it; None where the model is trained here first."""
        if self.init not in ("auto", "scratch"):
            return self.init
        return None if is_ladder_name(self.model) else self.model

    def method_spec(self) -> MethodSpec:
        spec = method_spec(self.method, self.coefficient)
        if self.anchor_precision != "fp32" and not spec.has_anchor:
            raise UserError(f"--anchor-precision {self.anchor_precision}: method {self.method!r} holds no anchor; leave it out.")
        return dataclasses.replace(spec, anchor_precision=self.anchor_precision)

    def adapter(self) -> AdapterSpec | None:
        """The adapters that are trained, or None where every weight is."""
        if self.fine_tune_type == "full":
            return None
        # The vectors of IA3 have a place of their own.
        by_default = self.fine_tune_type == "ia3" and self.lora_target_modules == ATTENTION
        return AdapterSpec(
            kind=self.fine_tune_type,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            scaling=self.lora_scaling,
            dropout=self.lora_dropout,
            target_modules=() if by_default else tuple(name.strip() for name in self.lora_target_modules.split(",")),
            num_layers=self.lora_num_layers,
        )

    def optim(self) -> OptimSpec:
        return OptimSpec(
            name=self.optimizer,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay if self.method_spec().decays_to_zero else 0.0,
            max_grad_norm=self.max_grad_norm,
        )

    def runtime(self, precision: Precision) -> RuntimeSpec:
        return RuntimeSpec(
            precision=precision,
            device=self.device,
            compile=self.compile,
            micro_batch_size=self.micro_batch_size,
            grad_checkpoint=self.grad_checkpoint,
            shard=self.shard,
            num_threads=self.num_threads,
            memory_limit_gb=self.memory_limit_gb,
        )

    def base_config(self) -> "TrainConfig":
        """The pretraining run that `init: auto` stands for: this run's model and pretraining data, and the keys of `base`."""
        if self.pretrain is None:
            raise UserError("init: auto trains a base model on --pretrain, which is none: give --init FOLDER or scratch.")
        shared = (
            "backend",
            "model",
            "tokenizer",
            "vocab_size",
            "max_seq_length",
            "eval_rows",
            "precision",
            "device",
            "compile",
            "micro_batch_size",
            "grad_checkpoint",
            "shard",
            "num_threads",
            "memory_limit_gb",
            "steps_per_report",
        )
        values = {name: getattr(self, name) for name in shared}
        values |= {
            "init": "scratch",
            "target": self.pretrain,
            "pretrain": None,
            "p": "0",
            "target_tokens": None,
            "iters": 2500,
            "steps_per_eval": 125,
        }
        return from_layers(TrainConfig, values, self.base, where="base")


# The defaults of FORGET_SCALE=smoke: every command runs end to end in seconds, and its numbers mean nothing.
SMOKE: dict[str, Any] = {
    "model": "0.16m",
    "vocab_size": 512,
    "iters": 24,
    "batch_size": 8,
    "eval_rows": 16,
    "steps_per_eval": 6,
    "base": {"iters": 24, "batch_size": 8, "steps_per_eval": 6},
}


def scale_defaults() -> dict[str, Any]:
    """What the environment's FORGET_SCALE lays over the defaults: nothing, or the smoke scale."""
    return SMOKE if os.environ.get("FORGET_SCALE") == "smoke" else {}
