"""The rows that a run replays: of a store, or written by its own start model."""

import dataclasses

import numpy as np
import numpy.typing as npt

from mlx_forget import checkpoint
from mlx_forget.config import (
    REPLAY_ONLINE,
    REPLAY_SELF,
)
from mlx_forget.pipeline.batches import Blend, ReplayRows, RowSubset, Side
from mlx_forget.pipeline.corpora import forget_home
from mlx_forget.plan import Plan, identity_of, replay_name, replay_rows_per_step, stored_replay
from mlx_forget.replay import OnlineReplay, SampleSpec, origin_note, sample_store
from mlx_forget.trainer import Trainer
from mlx_forget.watch import Watch

# The Fisher information of EWC is measured on this many rows.
FISHER_ROWS = 256
# A run samples no more of its start model unless it is told to.
MAX_SAMPLED_TOKENS = 2_000_000


def with_replay(plan: Plan, trainer: Trainer, watch: Watch) -> Plan:
    """The plan with the rows that its method replays; the model, which holds the start weights, is sampled here if it is to write them."""
    name, config = replay_name(plan.config), plan.config
    if name is None:
        return plan
    assert plan.start is not None
    length = plan.stream.target.row_length
    rows_per_step = replay_rows_per_step(config)
    term = config.method_spec().replay_term
    if name == REPLAY_ONLINE:
        assert term is not None
        trainer.set_reference("start")
        online = OnlineReplay(trainer, SampleSpec(num_tokens=length, length=length, seed=config.seed), rows_per_step, term)
        return dataclasses.replace(plan, stream=dataclasses.replace(plan.stream, replay=online))
    if name == REPLAY_SELF:
        needed = plan.num_steps * rows_per_step * length if term is not None else FISHER_ROWS * length
        spec = SampleSpec(num_tokens=config.replay_tokens or min(needed, MAX_SAMPLED_TOKENS), length=length, seed=config.seed)
        weights = plan.start.state["files"][checkpoint.WEIGHTS][:16]
        store = sample_store(
            trainer,
            plan.start,
            forget_home() / "replay" / f"{weights}-{plan.precision}-{plan.backend}-{spec.seed}-{length}-{spec.num_tokens}",
            spec,
            backend=plan.backend,
            precision=plan.precision,
            say=watch.say,
            progress=watch.progress,
            interrupted=watch.interrupted,
        )
        subset: Side = RowSubset.of_tokens(store.split("train"), length, None)
        fingerprint: str | None = store.fingerprint
    else:
        shares = stored_replay(config)
        for source in shares:
            note = origin_note(plan.stores[source], plan.start)
            if note is not None:
                watch.say(note)
        members = tuple(RowSubset.of_tokens(plan.stores[source].split("train"), length, None) for source in shares)
        subset = members[0] if len(members) == 1 else Blend(members, tuple(shares.values()))
        fingerprint = identity_of(shares, plan.stores)
    replay = None if term is None else ReplayRows(subset, rows_per_step, term, config.seed)
    if config.method_spec().ewc:
        trainer.set_fisher(*_fisher_rows(subset))
    return dataclasses.replace(plan, stream=dataclasses.replace(plan.stream, replay=replay), replay_fingerprint=fingerprint)


def _fisher_rows(subset: Side) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    rows = np.arange(min(FISHER_ROWS, subset.num_rows), dtype=np.int64)
    tokens = np.empty((len(rows), subset.row_length + 1), np.int32)
    subset.read(rows, tokens)
    return tokens, np.ones((len(rows), subset.row_length), np.uint8)
