"""The rows that a run replays: of a store, or written by its own start model."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget import checkpoint
from mlx_forget.config_keys import REFERENCE_LIVE, REPLAY_ONLINE, REPLAY_SELF
from mlx_forget.errors import UserError
from mlx_forget.pipeline.batches import ReplayRows
from mlx_forget.pipeline.corpora import forget_home
from mlx_forget.pipeline.rows import Layout
from mlx_forget.pipeline.sides import Blend, RowSubset, Side, read_masked
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.replay.log_probs import BlendedLogProbs, LogProbs, divergence_of, keep_log_probs, kept_members
from mlx_forget.replay.online import OnlineReplay
from mlx_forget.replay.sampled_store import is_sampled, origin_note, sample_store, start_note
from mlx_forget.replay.sampling import SampleSpec
from mlx_forget.trainer import Trainer
from mlx_forget.training.data import FISHER_ROWS, identity_of, replay_name, replay_rows_per_step, sampled_tokens, stored_replay
from mlx_forget.training.plan import Plan
from mlx_forget.training.watch import Watch

# Kept log-probabilities are compared with a live reference on this many rows at the end of a run.
ROWS_COMPARED = 8


def with_replay(plan: Plan, trainer: Trainer, watch: Watch) -> Plan:
    """The plan with the rows that its method replays; the model, which holds the start weights, is sampled here if it is to write them."""
    name, config = replay_name(plan.config), plan.config
    term = config.method_spec().replay_term
    # With a coefficient of 0 nothing reads them.
    if name is None or (term is None and not config.method_spec().ewc):
        return plan
    assert plan.start is not None
    length = plan.stream.target.row_length
    rows_per_step = replay_rows_per_step(config)
    vocabulary = load_vocabulary(plan.start.tokenizer)
    ids: dict[str, Any] = {"bos_id": vocabulary.bos_id, "eos_id": vocabulary.eos_id, "num_ids": vocabulary.vocab_size}
    if name == REPLAY_ONLINE:
        assert term is not None
        trainer.set_reference("start" if config.adapter() is None else "adapters_off")
        spec = SampleSpec(num_tokens=length, length=length, seed=config.seed, **ids)
        note = start_note(plan.start, spec)
        if note is not None:
            watch.say(note)
        online = OnlineReplay(trainer, spec, rows_per_step, term, plan.model.vocab_size, watch.say)
        return dataclasses.replace(plan, stream=dataclasses.replace(plan.stream, replay=online))
    if name == REPLAY_SELF:
        num_tokens = sampled_tokens(config, plan.num_steps, length)
        spec = SampleSpec(num_tokens=num_tokens, length=length, seed=config.seed, **ids)
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
    kept = None if config.reference_log_probs == REFERENCE_LIVE else _kept_log_probs(plan, trainer, subset, watch)
    replay = None if term is None else ReplayRows(subset, rows_per_step, term, config.seed, kept)
    if config.method_spec().ewc:
        trainer.set_fisher(*_fisher_rows(subset))
    return dataclasses.replace(plan, stream=dataclasses.replace(plan.stream, replay=replay), replay_fingerprint=fingerprint)


def _kept_log_probs(plan: Plan, trainer: Trainer, subset: Side, watch: Watch) -> LogProbs | BlendedLogProbs:
    """What the start model says about the rows, from files beside their stores; the model, which is the start model, fills them."""
    assert plan.start is not None
    members = subset.members if isinstance(subset, Blend) else (subset,)
    kept = []
    for member in members:
        kept.append(
            keep_log_probs(
                member,
                trainer,
                plan.start,
                plan.config.reference_log_probs,
                backend=plan.backend,
                precision=plan.precision,
                say=watch.say,
                progress=watch.progress,
                interrupted=watch.interrupted,
            )
        )
    return kept_members(kept)


def error_of_kept_log_probs(plan: Plan, trainer: Trainer) -> dict[str, Any] | None:
    """How far what is kept of the reference is from the live one, when the run has ended; None where nothing is kept."""
    replay = plan.stream.replay
    if not isinstance(replay, ReplayRows) or not isinstance(replay.reference, LogProbs | BlendedLogProbs):
        return None
    assert plan.start is not None
    members = replay.reference.members if isinstance(replay.reference, BlendedLogProbs) else (replay.reference,)
    trainer.set_reference(plan.start.weights if plan.config.adapter() is None else "adapters_off")
    return {
        "kind": plan.config.reference_log_probs,
        "when_kept": {str(member.folder): member.measured for member in members},
        "at_the_end": divergence_of(replay.reference, replay.subset, replay.subset.window_ids(ROWS_COMPARED), trainer),
    }


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
