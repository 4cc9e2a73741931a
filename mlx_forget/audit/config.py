"""The configuration of an audit: the only source of its defaults."""

import math
from dataclasses import dataclass, field
from typing import Any

from mlx_forget.errors import UserError


def _key(default: Any, text: str, *, aliases: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "aliases": aliases})


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Every key of `forget audit` that is a single value, in the order of `--help`."""

    backend: str = _key("auto", "mlx, cuda (PyTorch, also on a CPU) or auto.")
    max_tokens: int = _key(1_000_000, "Tokens to read of each text, in whole documents.")
    max_seq_length: int | None = _key(None, "Tokens per window; default: the models' context.", aliases=("sequence_len",))
    top: int = _key(10, "How many tokens and documents to list.")
    fail_above: float | None = _key(None, "Exit with 1 if the loss of any text rose by more than this, in nats per token.")
    tasks: str | None = _key(None, "lm-eval tasks to run before and after, such as arc_easy,hellaswag (extra: eval).")
    task_limit: int | None = _key(None, "Examples of each task; default: all.")
    refusals: str | None = _key(
        None, "A file of prompts, a line or a JSON object with a prompt key each: how many are refused before and after."
    )
    refusal_tokens: int = _key(48, "Tokens to answer each prompt with.")
    device: str | None = _key(None, "Insist on a device such as cuda:1 or cpu.")
    num_threads: int | None = _key(None, "CPU threads.")
    trust_remote_code: bool = _key(False, "Run the Python code that comes with a checkpoint.")
    memory_limit_gb: float | None = _key(None, "Never use more memory than this: logits and activations shrink to fit.")

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_seq_length", "top", "task_limit", "refusal_tokens", "num_threads", "memory_limit_gb"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be positive and finite, it is {value}.")
        if self.fail_above is not None and not math.isfinite(self.fail_above):
            raise UserError(f"fail_above must be finite, it is {self.fail_above}.")
