"""Finetune language models without forgetting, measure what was forgotten, and predict it first.

The public names load on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "AuditConfig": "mlx_forget.audit.config",
    "execute_audit": "mlx_forget.audit.run",
    "plan_audit": "mlx_forget.audit.run",
    "TrainConfig": "mlx_forget.config",
    "UserError": "mlx_forget.errors",
    "RunFailed": "mlx_forget.errors",
    "Plan": "mlx_forget.training.plan",
    "Watch": "mlx_forget.training.watch",
    "execute": "mlx_forget.training.run",
    "plan_run": "mlx_forget.training.plan",
    "Trainer": "mlx_forget.trainer",
    "TrainerSpec": "mlx_forget.trainer",
    "load_backend": "mlx_forget.backends",
    "open_store": "mlx_forget.pipeline.store",
    "Tokenizer": "mlx_forget.pipeline.tokenizer",
    "train_tokenizer": "mlx_forget.pipeline.tokenizer",
    "find_runs": "mlx_forget.records",
    "read_table": "mlx_forget.tables",
    "Table": "mlx_forget.laws.table",
    "fit_law": "mlx_forget.laws.fit",
    "fit_groups": "mlx_forget.laws.fit",
    "assess": "mlx_forget.laws.uncertainty",
    "law_from_function": "mlx_forget.laws.forms",
    "register_law": "mlx_forget.laws.forms:register",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(module), attribute or name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
