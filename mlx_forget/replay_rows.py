"""The rows that a run replays: of a store, or written by its own start model."""

import dataclasses

import numpy as np
import numpy.typing as npt

from mlx_forget import checkpoint
from mlx_forget.config import (
    REPLAY_ONLINE,
    REPLAY_SELF,
)
from mlx_forget.errors import UserError
from mlx_forget.pipeline.batches import Blend, ReplayRows, RowSubset, Side, read_masked
from mlx_forget.pipeline.corpora import forget_home
from mlx_forget.pipeline.rows import Layout
from mlx_forget.pipeline.vocabularies import special_ids
from mlx_forget.plan import Plan, identity_of, replay_name, replay_rows_per_step, stored_replay
from mlx_forget.replay import OnlineReplay, SampleSpec, is_sampled, origin_note, sample_store
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
    bos_id, eos_id = special_ids(plan.start.tokenizer)
    if name == REPLAY_ONLINE:
        assert term is not None
        trainer.set_reference("start")
        spec = SampleSpec(num_tokens=length, length=length, seed=config.seed, bos_id=bos_id, eos_id=eos_id)
        online = OnlineReplay(trainer, spec, rows_per_step, term)
        return dataclasses.replace(plan, stream=dataclasses.replace(plan.stream, replay=online))
    if name == REPLAY_SELF:
        needed = plan.num_steps * rows_per_step * length if term is not None else FISHER_ROWS * length
        num_tokens = config.replay_tokens or min(needed, MAX_SAMPLED_TOKENS)
        spec = SampleSpec(num_tokens=num_tokens, length=length, seed=config.seed, bos_id=bos_id, eos_id=eos_id)
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
        members = tuple(_stored_rows(plan, source, length) for source in shares)
        subset = members[0] if len(members) == 1 else Blend(members, tuple(shares.values()))
        fingerprint = identity_of(shares, plan.stores)
    replay = None if term is None else ReplayRows(subset, rows_per_step, term, config.seed)
    if config.method_spec().ewc:
        trainer.set_fisher(*_fisher_rows(subset))
    return dataclasses.replace(plan, stream=dataclasses.replace(plan.stream, replay=replay), replay_fingerprint=fingerprint)


def _stored_rows(plan: Plan, source: str, length: int) -> RowSubset:
    """The rows of a source as the run reads its other data; a model's own samples are whole rows, and every label of them counts."""
    store, config = plan.stores[source], plan.config
    layout: Layout = "packed" if is_sampled(store) else config.rows  # type: ignore[assignment]
    limit = config.replay_limits.get(source)
    return RowSubset.of_tokens(store.split("train"), length, limit, layout=layout, mask_prompt=config.mask_prompt)


def _fisher_rows(subset: Side) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.int32] | None]:
    """Rows int32[B, T+1] of every source by its share, which labels of them count, uint8[B, T], and their segments or None."""
    tokens, loss_mask, segment = read_masked(subset, subset.window_ids(FISHER_ROWS))
    if loss_mask is None:
        return tokens, np.ones((len(tokens), subset.row_length), np.uint8), segment
    if not loss_mask.any():
        raise UserError(
            "The rows for the Fisher information hold no token to learn: give other --replay-data, or --no-mask-prompt."
        )
    return tokens, loss_mask, segment
