"""Replay rows that a model writes itself while its successor trains."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mlx_forget.pipeline.sides import MaskedRows
from mlx_forget.replay.sampling import RowsAtOnce, SampledRows, SampleSpec, after_bos, mean_repetition, problems_of, sample_rows
from mlx_forget.trainer import Trainer


@dataclass
class OnlineReplay:
    """Replay rows that the frozen reference writes while its successor trains: row j of the run is row j of the sample.

    Nothing is stored and no row repeats. Some rows are sampled ahead at once; that cache changes no row.

    Args:
        trainer: with a reference.
        spec: `num_tokens` is not used.
        rows_per_step, term: as `ReplaySource` says.
        vocab_size: of the model.
        say: hears of rows that do not fit into memory, and of a first batch that is noise or has collapsed.
    """

    trainer: Trainer
    spec: SampleSpec
    rows_per_step: int
    term: int
    vocab_size: int
    say: Callable[[str], None] = lambda sentence: None
    _at_once: RowsAtOnce | None = field(default=None, init=False, repr=False)
    _cache: tuple[int, SampledRows] | None = field(default=None, init=False, repr=False)

    def tokens_before(self, step: int) -> tuple[int, int]:
        num_tokens = step * self.rows_per_step * self.spec.length
        return num_tokens, num_tokens

    def read(self, step: int, *, rank: int, world_size: int) -> MaskedRows:
        """The rows of a step that belong to `rank`, BOS first; every label counts."""
        # Whole steps, as many as one batch of the sampler fills.
        steps = max(1, self.spec.batch_size // self.rows_per_step)
        first = step // steps * steps
        if self._cache is None or self._cache[0] != first:
            is_first, self._at_once = self._at_once is None, self._at_once or RowsAtOnce(self.spec.batch_size)
            rows = sample_rows(
                self.trainer,
                self.spec,
                first * self.rows_per_step,
                steps * self.rows_per_step,
                from_reference=True,
                say=self.say,
                at_once=self._at_once,
            )
            self._cache = (first, after_bos(rows, self.spec.bos_id))
            if is_first:
                self._judge(self._cache[1])
        here = (step - first) * self.rows_per_step
        return self._cache[1][here : here + self.rows_per_step][rank::world_size], None, None

    def _judge(self, rows: SampledRows) -> None:
        """Say it when the rows are noise or have collapsed."""
        entropy = self.trainer.compare(rows, np.ones((len(rows), self.spec.length), np.uint8)).ref_nll.mean(dtype=np.float64)
        measures = {"entropy_nats": float(entropy), "repetition": mean_repetition(rows)}
        for problem in problems_of(measures, self.vocab_size):
            self.say(problem)

    def read_reference(self, step: int, *, rank: int, world_size: int) -> None:
        """Nothing is kept of rows that never come again."""
