"""Which module computes a ladder model: both have the same functions."""

from types import ModuleType

from mlx_forget.ladder import ModelSpec
from mlx_forget.mlx_backend import gpt2, qknorm


def functions_of(spec: ModelSpec) -> ModuleType:
    """The module with `gradients`, `hidden_states` of one and two models, `num_shared_blocks`, `next_logits` and the name of the `HEAD`."""
    return {"gpt2": gpt2, "qknorm": qknorm}[spec.architecture]
