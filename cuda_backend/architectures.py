"""Which module computes a ladder model: both have the same functions."""

from types import ModuleType

from cuda_backend import gpt2, qknorm
from mlx_forget.ladder import ModelSpec


def functions_of(spec: ModelSpec) -> ModuleType:
    """The module with `hidden_states`, `hidden_states_of_two`, `num_shared_blocks`, `next_logits` and the name of the `HEAD`."""
    return {"gpt2": gpt2, "qknorm": qknorm}[spec.architecture]
