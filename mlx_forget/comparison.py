"""What two models say about the same tokens: the value that `Trainer.compare` returns, and how much of it is held in memory at once."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec, default_row_length, num_params
from mlx_forget.pretrained import PretrainedSpec

Floats = npt.NDArray[np.float32]

_GIGABYTE = 1e9
# Fewer logits at a time would make products of a few rows.
_LEAST_CHUNK = 64


@dataclass(frozen=True)
class Comparison:
    """Per-token measures of the model against its frozen reference, each float32[B, T]; losses and divergences in nats.

    Args:
        nll, ref_nll: next-token loss of the model and of the reference.
        kl: KL(reference || model) over the whole vocabulary.
        soft_ce, hard_ce: cross-entropy of the model to the reference's distribution, and to its most likely token
            (Kalajdzievski 2024: the forgetting metric L_f in its soft and its hard form).
        agreement: 1 where the reference's most likely token is the model's too.
        hit, ref_hit: 1 where the most likely token is the label. Of tied tokens each counts as the most likely one.
        confidence, ref_confidence: probability of the most likely token.
    """

    nll: Floats
    ref_nll: Floats
    kl: Floats
    soft_ce: Floats
    hard_ce: Floats
    agreement: Floats
    hit: Floats
    ref_hit: Floats
    confidence: Floats
    ref_confidence: Floats


# In the order in which backends stack them.
MEASURES = tuple(f.name for f in dataclasses.fields(Comparison))


@dataclass(frozen=True)
class Portions:
    """How much a comparison computes at once.

    Args:
        num_tokens: tokens of one forward pass; at least a row.
        num_logits: tokens whose logits are held.
    """

    num_tokens: int
    num_logits: int


def portions(spec: ModelSpec | PretrainedSpec, most: Portions, *, limit_gb: float | None, used_bytes: int) -> Portions:
    """At most `most`, and so little that a comparison stays below a memory limit.

    Args:
        limit_gb: what all may take together, in gigabytes; None takes `most`.
        used_bytes: what is taken before either model's weights are there.

    Raises:
        UserError: the limit is below what two sets of weights and one row need.
    """
    if limit_gb is None:
        return most
    # Of a block at its widest: the residual stream, its norm, queries, keys, values and both sides of the GELU; scores of attention.
    row = default_row_length(spec)
    per_token = 4 * (20 * spec.width + 2 * spec.num_heads * row)
    # Logits of both models, their exponentials, and one product of them.
    per_logits = 4 * 5 * spec.vocab_size
    weights = 2 * 4 * num_params(spec)
    need = used_bytes + weights + per_token * row + per_logits * _LEAST_CHUNK
    limit = limit_gb * _GIGABYTE
    if need > limit:
        raise UserError(
            f"--memory-limit-gb {limit_gb:g} is below what two models of {num_params(spec):,} parameters need: "
            f"{need / _GIGABYTE:.2f} GB, of which {used_bytes / _GIGABYTE:.2f} are in use before they are loaded."
        )
    free = limit - used_bytes - weights
    return Portions(
        num_tokens=min(most.num_tokens, max(row, int(free / 2 / per_token))),
        num_logits=min(most.num_logits, max(_LEAST_CHUNK, int(free / 2 / per_logits))),
    )
