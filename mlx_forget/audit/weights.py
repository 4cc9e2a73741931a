"""How far the weights moved: the distance of every matrix, and how many directions hold the change."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_forget.audit.models import Model

Weights = npt.NDArray[np.float32]

VARIANCE = 0.9
_ROWS_AT_ONCE = 2048
_BLOCK = re.compile(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Tensor:
    """One weight.

    Args:
        name: in Hugging Face names.
        layer: the block that it belongs to, None for embeddings and the final norm.
        distance: Frobenius norm of the change.
        relative: distance over the norm of the base's weight; None where that is 0.
        rank: how many singular directions hold 90% of the squared norm of the change (Biderman et al. 2024); None for vectors.
        full_rank: the most that it could be.
    """

    name: str
    layer: int | None
    distance: float
    relative: float | None
    rank: int | None
    full_rank: int | None


@dataclass(frozen=True)
class Layer:
    """A block, the embeddings, or the final norm.

    Args:
        distance: norm of the change of all its weights.
        relative: over the norm of the base's; None where that is 0.
        rank_share: mean over its matrices of rank / full rank; None without matrices.
    """

    name: str
    distance: float
    relative: float | None
    rank_share: float | None


@dataclass(frozen=True)
class WeightChange:
    """The whole change."""

    distance: float
    relative: float
    layers: tuple[Layer, ...]
    tensors: tuple[Tensor, ...]


def compare_weights(base: Model, tuned: Model) -> WeightChange:
    """Distances and ranks, one tensor in memory at a time."""
    rows: list[tuple[Tensor, float]] = []
    for (name, before), (_, after) in zip(base.tensors(), tuned.tensors(), strict=True):
        matrix = before.ndim == 2
        square, change_square, gram = _squares(before, after)
        norm, distance = math.sqrt(square), math.sqrt(change_square)
        match = _BLOCK.search(name)
        tensor = Tensor(
            name=name,
            layer=int(match[1]) if match else None,
            distance=distance,
            relative=distance / norm if norm else None,
            rank=rank_of(gram) if matrix else None,
            full_rank=min(before.shape) if matrix else None,
        )
        rows.append((tensor, norm))
    layers = tuple(_layers(rows))
    whole = float(np.linalg.norm([tensor.distance for tensor, _ in rows]))
    return WeightChange(
        distance=whole,
        relative=whole / float(np.linalg.norm([norm for _, norm in rows])),
        layers=layers,
        tensors=tuple(sorted((tensor for tensor, _ in rows), key=lambda t: (t.layer is not None, t.layer or 0, t.name))),
    )


def _squares(before: Weights, after: Weights) -> tuple[float, float, npt.NDArray[np.float64]]:
    """Squared norms of a weight and of its change, and the product of the change with itself along its longer side, in float64.

    A slice at a time: an embedding matrix in float64 would be the largest thing in memory.
    """
    if before.ndim > 2:
        before, after = before.reshape(len(before), -1), after.reshape(len(after), -1)
    if before.ndim < 2 or before.shape[0] < before.shape[1]:
        before, after = np.atleast_2d(before).T, np.atleast_2d(after).T
    square = change_square = 0.0
    gram = np.zeros((before.shape[1], before.shape[1]))
    for start in range(0, len(before), _ROWS_AT_ONCE):
        own = before[start : start + _ROWS_AT_ONCE].astype(np.float64)
        change = after[start : start + _ROWS_AT_ONCE] - own
        square += float((own**2).sum())
        change_square += float((change**2).sum())
        gram += change.T @ change
    return square, change_square, gram


def rank_of(gram: npt.NDArray[np.float64], variance: float = VARIANCE) -> int:
    """The fewest singular directions of a matrix M that hold this share of its squared norm, from M^T M; 0 for no change."""
    squares = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    total = squares.sum()
    if total == 0:
        return 0
    return int(np.searchsorted(np.cumsum(squares), variance * total * (1 - 1e-12)) + 1)


def _layers(rows: list[tuple[Tensor, float]]) -> Iterator[Layer]:
    places: dict[str, list[tuple[Tensor, float]]] = {}
    for tensor, norm in rows:
        if tensor.layer is not None:
            place = f"block {tensor.layer}"
        else:
            place = "embeddings" if tensor.rank is not None else "final norm"
        places.setdefault(place, []).append((tensor, norm))
    blocks = sorted((place for place in places if place.startswith("block")), key=lambda place: int(place.split()[1]))
    for place in [name for name in ("embeddings", *blocks, "final norm") if name in places]:
        own = places[place]
        distance, norm = float(np.linalg.norm([t.distance for t, _ in own])), float(np.linalg.norm([n for _, n in own]))
        shares = [t.rank / t.full_rank for t, _ in own if t.rank is not None and t.full_rank]
        yield Layer(place, distance, distance / norm if norm else None, float(np.mean(shares)) if shares else None)
