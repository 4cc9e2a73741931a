"""One optimiser step across the seam: the weight of each token in the objective, the batches of a stack, and what is read afterwards."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.methods import NUM_SOURCES, NUM_TERMS, TERM_REPLAY_KL, TERM_TASK, MethodSpec
from mlx_forget.pipeline.batches import Batch


@dataclass(frozen=True)
class StepReading:
    """The numbers of one step on the host, summed over all ranks.

    Args:
        loss_sums: float64[terms, sources], sums of token losses in nats.
        counts: float64[terms, sources], tokens behind each sum.
        grad_norm: global norm before clipping.
        skipped: 1 if the update was masked because the loss or gradient was not finite.
    """

    loss_sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]
    grad_norm: float
    skipped: int


class StepResult(ABC):
    """A step that may still be running: reading it is the only host sync."""

    @abstractmethod
    def read(self) -> StepReading: ...


class NoStep(StepResult):
    """Of a member of a stack that has ended: no tokens, and losses that are not numbers."""

    def read(self) -> StepReading:
        nothing = np.zeros((NUM_TERMS, NUM_SOURCES))
        return StepReading(nothing + np.nan, nothing, grad_norm=np.nan, skipped=0)


def group_counts(batch: Batch, method: MethodSpec) -> npt.NDArray[np.float64]:
    """Tokens behind each loss sum, float64[terms, sources]."""
    counts = np.zeros((NUM_TERMS, NUM_SOURCES))
    np.add.at(counts, (batch.term, batch.source), batch.loss_mask.sum(axis=1, dtype=np.float64))
    if method.kl_on_task:
        counts[TERM_REPLAY_KL] += counts[TERM_TASK]
    return counts


def token_weights(batch: Batch, counts: npt.NDArray[np.float64], method: MethodSpec) -> npt.NDArray[np.float32]:
    """The weight of each token's next-token loss in the objective, float32[B, T]: coefficient / token count of its term.

    It is 0 where masked and in the rows of the KL term, which has weights of its own. `counts` are those of the whole batch over all ranks and micro-batches, so partial gradients add up to the whole one.
    """
    per_term = counts.sum(axis=1)
    weights = np.divide(np.asarray(method.coefficients), per_term, out=np.zeros(NUM_TERMS), where=per_term > 0)
    weights[TERM_REPLAY_KL] = 0
    per_token: npt.NDArray[np.float64] = weights[batch.term, None] * batch.loss_mask
    return per_token.astype(np.float32)


def kl_weights(batch: Batch, counts: npt.NDArray[np.float64], method: MethodSpec) -> npt.NDArray[np.float32] | None:
    """The weight of each token's KL(reference || model) in the objective, float32[B, T]; None where the method has no such term."""
    if not method.has_kl:
        return None
    rows = batch.term == TERM_REPLAY_KL
    if method.kl_on_task:
        rows = rows | (batch.term == TERM_TASK)
    weight = method.coefficients[TERM_REPLAY_KL] / max(1.0, counts[TERM_REPLAY_KL].sum())
    per_token: npt.NDArray[np.float64] = weight * (rows[:, None] * batch.loss_mask)
    return per_token.astype(np.float32)


def check_reference(method: MethodSpec, *, reference: bool, fisher: bool) -> None:
    """Refuse a step of a method whose frozen reference or Fisher information is not there yet.

    Raises:
        UserError: which call is missing.
    """
    if (method.has_kl or method.has_anchor) and not reference:
        raise UserError(f"Method {method.name!r} needs a reference: call set_reference first.")
    if method.ewc and not fisher:
        raise UserError(f"Method {method.name!r} needs the Fisher information: call set_fisher first.")


@dataclass(frozen=True)
class StackedBatch:
    """The batches of K members side by side.

    Args:
        tokens: int32[K, B, T+1].
        token_weight: float32[K, B, T], of each member's own objective (see `token_weights`).
        loss_mask: uint8[K, B, T].
        groups: float32[K, B, terms * sources], 1 at the term and source of a row.
        segment: int32[K, B, T] or None.
        counts: float64[terms, sources] of each member.
    """

    tokens: npt.NDArray[np.int32]
    token_weight: npt.NDArray[np.float32]
    loss_mask: npt.NDArray[np.uint8]
    groups: npt.NDArray[np.float32]
    segment: npt.NDArray[np.int32] | None
    counts: list[npt.NDArray[np.float64]]

    @classmethod
    def of(cls, batches: Sequence[Batch], method: MethodSpec) -> "StackedBatch":
        counts = [group_counts(batch, method) for batch in batches]
        group = np.stack([batch.term.astype(np.int64) * NUM_SOURCES + batch.source for batch in batches])
        segments = [batch.segment for batch in batches if batch.segment is not None]
        assert len(segments) in (0, len(batches)), "members of one stack have segments or have none"
        return cls(
            tokens=np.stack([batch.tokens for batch in batches]),
            token_weight=np.stack([token_weights(batch, n, method) for batch, n in zip(batches, counts, strict=True)]),
            loss_mask=np.stack([batch.loss_mask for batch in batches]),
            groups=np.eye(NUM_TERMS * NUM_SOURCES, dtype=np.float32)[group],
            segment=np.stack(segments) if segments else None,
            counts=counts,
        )

    def parts(self, num_rows: int | None) -> "Iterator[StackedBatch]":
        """The same in micro-batches of so many rows of each member; None is the whole."""
        size = num_rows or self.tokens.shape[1]
        for start in range(0, self.tokens.shape[1], size):
            rows = slice(start, start + size)
            yield replace(
                self,
                tokens=self.tokens[:, rows],
                token_weight=self.token_weight[:, rows],
                loss_mask=self.loss_mask[:, rows],
                groups=self.groups[:, rows],
                segment=None if self.segment is None else self.segment[:, rows],
            )


def unpack_step(packed: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> StepReading:
    """A reading from the flat vector that backends fetch in one transfer: loss sums, then gradient norm, then skipped."""
    sums = packed[: NUM_TERMS * NUM_SOURCES].reshape(NUM_TERMS, NUM_SOURCES)
    return StepReading(sums, counts, grad_norm=float(packed[-2]), skipped=int(packed[-1]))
