"""Ancestral samples from a model's own distribution, and whether they are noise or have collapsed.

Row j is a function of (weights, prompt, temperature, seed, j) alone: its uniforms come from a counter-based generator, so it does not
depend on the batch it is sampled in, nor, in fp32, on the backend. Larger samples begin with smaller ones. Sampling does not stop at
EOS: a row goes on with the next document, as rows of text do.

Source: Marek et al. (2026), section 2.3 of their sampler: temperature 1, no truncation, weights frozen.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError
from mlx_forget.pipeline.tokenizer import BOS, EOS
from mlx_forget.trainer import Trainer

SampledRows = npt.NDArray[np.int32]
SplitName = Literal["train", "validation"]

# Tells the generator's streams apart from those of the initialiser, which is keyed by a seed and a number too.
_STREAM = 1
_MAX_VALIDATION_ROWS = 128

# Outside these a sample is announced as collapsed. Entropy is in nats per token, the upper bound a share of that of uniform noise;
# repetition is the share of 4-grams that their row has had before.
_LOWEST_ENTROPY = 0.5
_HIGHEST_ENTROPY_SHARE = 0.95
_HIGHEST_REPETITION = 0.5
_NGRAM = 4


@dataclass(frozen=True)
class SampleSpec:
    """What to sample.

    Args:
        num_tokens: training tokens, rounded up to whole rows.
        length: tokens per row, the prompt included, BOS not.
        seed: of the uniforms.
        temperature: divides the logits; 1 is the model's own distribution.
        prompt: tokens that every row starts with, after BOS.
        batch_size: rows sampled at once.
        bos_id, eos_id: of the model's tokenizer; every row is sampled after BOS.
        num_ids: how many ids that tokenizer has: a model may have a larger table, and the rest of it means nothing. None is all of it.
    """

    num_tokens: int
    length: int
    seed: int = 0
    temperature: float = 1.0
    prompt: tuple[int, ...] = ()
    batch_size: int = 64
    bos_id: int = BOS
    eos_id: int = EOS
    num_ids: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_tokens", "length", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be positive, it is {getattr(self, name)}.")
        if not (0 < self.temperature < math.inf):
            raise UserError(f"temperature must be positive and finite, it is {self.temperature:g}.")
        if len(self.prompt) >= self.length:
            raise UserError(f"The prompt has {len(self.prompt)} tokens, a row {self.length}: nothing is left to sample.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must lie between 0 and 2^63, it is {self.seed}.")

    def num_rows(self, split: SplitName) -> int:
        """SampledRows of a split; a tenth as many, at most 128, are held out to validate on."""
        rows = -(-self.num_tokens // self.length)
        return rows if split == "train" else min(_MAX_VALIDATION_ROWS, -(-rows // 10))


def uniforms(seed: int, first_row: int, num_rows: int, length: int) -> npt.NDArray[np.float64]:
    """Uniforms in [0, 1), float64[num_rows, length]: the t-th of row j is Philox(seed, j, t)."""
    out = np.empty((num_rows, length))
    for row in range(num_rows):
        generator = np.random.Generator(np.random.Philox(key=[seed, first_row + row], counter=[0, 0, 0, _STREAM]))
        generator.random(out=out[row])
    return out


@dataclass
class RowsAtOnce:
    """How many rows a device samples at once; what has once not fitted is not tried again."""

    count: int


def sample_rows(
    trainer: Trainer,
    spec: SampleSpec,
    first_row: int,
    num_rows: int,
    *,
    from_reference: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
    at_once: RowsAtOnce | None = None,
) -> SampledRows:
    """Rows first_row, first_row + 1, ... of a sample of the model or of its reference, int32[num_rows, length], without BOS.

    A batch that does not fit into memory is halved, and that is said; `at_once` remembers it from call to call.
    """
    at_once = at_once or RowsAtOnce(spec.batch_size)
    out = np.empty((num_rows, spec.length), np.int32)
    out[:, : len(spec.prompt)] = spec.prompt
    start = 0
    while start < num_rows:
        count = min(at_once.count, num_rows - start)
        prompts = np.tile(np.array([spec.bos_id, *spec.prompt], np.int32), (count, 1))
        u = uniforms(spec.seed, first_row + start, count, spec.length - len(spec.prompt))
        try:
            how: dict[str, Any] = {"temperature": spec.temperature, "from_reference": from_reference, "num_ids": spec.num_ids}
            sampled = trainer.sample(prompts, u, **how)
            out[start : start + count, len(spec.prompt) :] = sampled
        except MemoryError:
            if count == 1:
                raise UserError("One row does not fit into memory: sample on another device, or a shorter --length.") from None
            at_once.count = count // 2
            say(f"{count} rows at once do not fit into memory: sampling {at_once.count}.")
            continue
        start += count
    return out


def after_bos(rows: SampledRows, bos_id: int) -> SampledRows:
    """Rows int32[B, T+1], as a trainer takes them."""
    return np.concatenate([np.full((len(rows), 1), bos_id, np.int32), rows], axis=1)


def measures_of(trainer: Trainer, rows: SampledRows) -> dict[str, float]:
    """Entropy (the model's own loss on its samples, nats per token) and repetition of some rows, int32[B, T+1], BOS first."""
    return {
        "entropy_nats": float(trainer.token_losses(rows).mean(dtype=np.float64)),
        "repetition": mean_repetition(rows),
    }


def mean_repetition(rows: SampledRows) -> float:
    """Of rows int32[B, T+1], BOS first."""
    return float(np.mean([_repetition(row[1:]) for row in rows]))


def _repetition(row: npt.NDArray[np.int32]) -> float:
    """Share of the 4-grams of a row that stood in it before."""
    if len(row) <= _NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(row, _NGRAM)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def problems_of(measures: Mapping[str, float], vocab_size: int) -> Iterator[str]:
    """A sentence for everything that is wrong with a sample of such measures (see `measures_of`)."""
    entropy, repetition = measures["entropy_nats"], measures["repetition"]
    if entropy < _LOWEST_ENTROPY:
        yield f"The samples have collapsed: {entropy:.2f} nats per token, text has more than {_LOWEST_ENTROPY}."
    if entropy > _HIGHEST_ENTROPY_SHARE * math.log(vocab_size):
        yield f"The samples are noise: {entropy:.2f} nats per token of at most {math.log(vocab_size):.2f}. Is the model trained?"
    if repetition > _HIGHEST_REPETITION:
        yield f"The samples repeat themselves: {repetition:.0%} of their {_NGRAM}-grams stood in the same row before."
