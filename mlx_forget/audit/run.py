"""One audit, from two folders and some names to everything that is reported: plan it (where all bad input is refused), then execute it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_forget import records
from mlx_forget.audit import extremes, groups, measures
from mlx_forget.audit.config import AuditConfig
from mlx_forget.audit.models import Model, open_pair
from mlx_forget.audit.overlap import Learnt, learnt_rows, overlapping_documents
from mlx_forget.audit.reading import BYTES_PER_PLACE, BYTES_PER_TOKEN, Reading, read
from mlx_forget.audit.refusals import Refusals, compare_refusals, read_prompts
from mlx_forget.audit.tasks import Task, check_tasks, compare_tasks
from mlx_forget.audit.texts import Text, default_texts, read_text
from mlx_forget.audit.weights import WeightChange, compare_weights
from mlx_forget.backends import choose_backend, load_backend
from mlx_forget.errors import UserError
from mlx_forget.evaluate import ProgressLost
from mlx_forget.ladder import default_row_length, param_shapes
from mlx_forget.pipeline.catalog import silent
from mlx_forget.pipeline.tokenise import Progress
from mlx_forget.trainer import RuntimeSpec, Trainer, TrainerSpec

SCHEMA_VERSION = 1

# Below this many documents an interval is wide and rests on the few that happen to be there.
_FEW_DOCUMENTS = 30


@dataclass(frozen=True)
class PerDocument:
    """Tokens and mean losses of every document that was read, so that two audits of a text can be compared document by document."""

    num_tokens: tuple[int, ...]
    loss_before: tuple[float, ...]
    loss_after: tuple[float, ...]


@dataclass(frozen=True)
class TextAudit:
    """What a text says about the two models.

    Args:
        smallest_visible_nats: half of the interval of `losses.forgetting`: less than this cannot be told from none; nan for one document.
        num_tokens, num_bytes: of what counts.
        num_masked: tokens that both models saw but that do not count, such as questions.
        progress_lost: of the base's pretraining, where this is its only pretraining text.
        overlap: documents that the finetune has learnt; None where that could not be checked.
    """

    name: str
    source: str
    part: str
    fingerprint: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_masked: int
    num_left_out: int
    losses: measures.Losses
    smallest_visible_nats: float
    progress_lost: ProgressLost | None
    transitions: measures.Transitions
    calibration_before: measures.Calibration
    calibration_after: measures.Calibration
    positions: groups.Division
    divisions: tuple[groups.Division, ...]
    tokens_forgotten: tuple[extremes.Token, ...]
    tokens_gained: tuple[extremes.Token, ...]
    documents_forgotten: tuple[extremes.Document, ...]
    documents_gained: tuple[extremes.Document, ...]
    per_document: PerDocument
    overlap: tuple[int, ...] | None


@dataclass(frozen=True)
class Audit:
    """Everything that an audit found.

    Args:
        row_length: labels per window.
        warnings: what a reader must know before trusting a number.
        passed: whether every text stayed within `fail_above`; None without a limit.
    """

    schema_version: int
    base: dict[str, Any]
    tuned: dict[str, Any]
    backend: str
    device: str
    versions: dict[str, str]
    row_length: int
    texts: tuple[TextAudit, ...]
    weights: WeightChange
    tasks: tuple[Task, ...] | None
    refusals: Refusals | None
    warnings: tuple[str, ...]
    fail_above: float | None
    passed: bool | None
    tokens_per_second: float
    wall_seconds: float

    def as_json(self) -> dict[str, Any]:
        plain = measures.as_plain(self)
        assert isinstance(plain, dict)
        return plain


@dataclass(frozen=True)
class AuditPlan:
    """An audit that can start: everything is opened and checked."""

    config: AuditConfig
    base: Model
    tuned: Model
    texts: tuple[Text, ...]
    row_length: int
    backend: str
    trainer: Trainer
    prompts: tuple[str, ...]
    warnings: tuple[str, ...]


def plan_audit(
    base: str,
    tuned: str,
    texts: Mapping[str, str],
    config: AuditConfig,
    *,
    say: Callable[[str], None] = lambda sentence: None,
    progress: Progress = silent,
) -> AuditPlan:
    """Open both models and all texts, and refuse what cannot work.

    Args:
        base: a folder, or `auto` for what `tuned` was finetuned from.
        texts: name to source; empty takes the built-in corpora, and says so.

    Raises:
        UserError: anything about the request that cannot work.
    """
    before, after = open_pair(base, tuned, say=say, trust_remote_code=config.trust_remote_code)
    if getattr(after.spec, "bits", None):
        raise UserError(
            f"{after.folder} is quantised, and its weights cannot be compared: audit the model before it was quantised."
        )
    row_length = config.max_seq_length or default_row_length(after.spec)
    if row_length > after.spec.context_length:
        raise UserError(f"--max-seq-length {row_length} exceeds the models' context of {after.spec.context_length} tokens.")
    backend = config.backend
    if backend == "auto":
        backend, reason = choose_backend()
        say(f"Backend {backend}: {reason}.")
    trainer_class = load_backend(backend)
    if config.tasks is not None:
        check_tasks(config.tasks)
    prompts = () if config.refusals is None else read_prompts(config.refusals, (before, after), config.refusal_tokens)
    if not texts:
        texts = default_texts(after)
        say(f"No --data: reading what was held out of the built-in {' and '.join(texts)}; --data NAME=PATH reads a text of yours.")
    warnings: list[str] = []

    def warn(sentence: str) -> None:
        warnings.append(sentence)
        say(sentence)

    opened = tuple(
        read_text(name, source, (before, after), max_tokens=config.max_tokens, say=say, progress=progress)
        for name, source in texts.items()
    )
    for text in opened:
        if len(text.documents) == 1:
            warn(f"{text.name} is one document: it allows no standard error. Give at least two documents, better {_FEW_DOCUMENTS}.")
    limit = config.memory_limit_gb
    if limit is not None:
        # Beside both models there is the reading of one text, and later one weight of each.
        largest = max(math.prod(shape) for shape in param_shapes(after.spec).values())
        readings = (
            BYTES_PER_TOKEN * text.num_read + BYTES_PER_PLACE * row_length * text.num_windows(row_length) for text in opened
        )
        beside = max(*readings, 2 * 4 * largest)
        limit -= beside / 1e9
        if limit <= 0:
            raise UserError(
                f"--memory-limit-gb {config.memory_limit_gb:g} is below the {beside / 1e9:.2g} GB that readings take: lower --max-tokens."
            )
    runtime = RuntimeSpec(
        device=config.device, num_threads=config.num_threads, memory_limit_gb=limit, compile=False, reads_only=True
    )
    trainer = trainer_class(TrainerSpec(model=after.spec, runtime=runtime))
    for note in trainer.notes:
        say(note)
    return AuditPlan(config, before, after, opened, row_length, backend, trainer, prompts, tuple(warnings))


def execute_audit(plan: AuditPlan, *, say: Callable[[str], None] = lambda sentence: None, progress: Progress = silent) -> Audit:
    """Read every text with both models, compare the weights, and run what else was asked for."""
    start = time.perf_counter()
    warnings = list(plan.warnings)

    def warn(sentence: str) -> None:
        warnings.append(sentence)
        say(sentence)

    trainer, config = plan.trainer, plan.config
    trainer.load(plan.tuned.weights)
    trainer.set_reference(plan.base.weights)
    learnt, unchecked = learnt_rows(plan.tuned)
    for sentence in unchecked:
        warn(sentence)
    texts, reading_seconds = [], 0.0
    for text in plan.texts:
        before = time.perf_counter()
        texts.append(_audit_text(plan, text, learnt, warn, progress))
        reading_seconds += time.perf_counter() - before
    progress("comparing weights", 0.0)
    weights = compare_weights(plan.base, plan.tuned)
    progress("comparing weights", 1.0)
    tasks = None
    if config.tasks is not None:
        tasks = compare_tasks(trainer, plan.tuned, config.tasks, limit=config.task_limit, progress=progress)
    refusals = None
    if plan.prompts:
        refusals = compare_refusals(
            trainer, plan.base, plan.tuned, plan.prompts, num_tokens=config.refusal_tokens, progress=progress
        )
    limit = config.fail_above
    return Audit(
        schema_version=SCHEMA_VERSION,
        base=plan.base.summary(),
        tuned=plan.tuned.summary(),
        backend=plan.backend,
        device=trainer.device,
        versions=records.installed_versions(),
        row_length=plan.row_length,
        texts=tuple(texts),
        weights=weights,
        tasks=tasks,
        refusals=refusals,
        warnings=tuple(warnings),
        fail_above=limit,
        passed=None if limit is None else all(text.losses.forgetting.value <= limit for text in texts),
        tokens_per_second=sum(text.num_tokens for text in texts) / reading_seconds,
        wall_seconds=time.perf_counter() - start,
    )


def _audit_text(
    plan: AuditPlan, text: Text, learnt: tuple[Learnt, ...], warn: Callable[[str], None], progress: Progress
) -> TextAudit:
    pieces = plan.tuned.tokenizer.piece_bytes
    overlap = tuple(overlapping_documents(text, learnt)) if learnt else None
    if overlap:
        warn(
            f"{text.name}: {len(overlap):,} of {len(text.documents):,} documents overlap with what the finetune learnt from {', '.join(one.name for one in learnt)}: "
            "the loss on them shows memory of the finetuning data."
        )
    reading = read(
        plan.trainer, text, plan.row_length, progress=lambda share: progress(f"reading {text.name} with both models", share)
    )
    losses = measures.losses(reading)
    if 1 < len(text.documents) < _FEW_DOCUMENTS:
        warn(
            f"{text.name} has only {len(text.documents)} documents: they allow a standard error of {losses.forgetting.stderr:.4f} nats, so "
            f"that a change below {losses.forgetting.half_width:.4f} cannot be told from none."
        )
    before, after = measures.calibration(reading)
    forgotten_tokens, gained_tokens = extremes.tokens(reading, pieces, plan.config.top)
    forgotten, gained = extremes.documents(reading, pieces, plan.config.top)
    return TextAudit(
        name=text.name,
        source=text.source,
        part=text.part,
        fingerprint=text.fingerprint,
        num_documents=len(text.documents),
        num_tokens=text.num_tokens,
        num_bytes=int(text.num_bytes.sum()),
        num_masked=text.num_read - text.num_tokens,
        num_left_out=text.num_left_out,
        losses=losses,
        smallest_visible_nats=losses.forgetting.half_width,
        progress_lost=_progress_lost(plan, text, losses),
        transitions=measures.transitions(reading),
        calibration_before=before,
        calibration_after=after,
        positions=groups.positions(reading),
        divisions=groups.divisions(reading, pieces),
        tokens_forgotten=forgotten_tokens,
        tokens_gained=gained_tokens,
        documents_forgotten=forgotten,
        documents_gained=gained,
        per_document=_per_document(reading),
        overlap=overlap,
    )


def _per_document(reading: Reading) -> PerDocument:
    sums = reading.per_document(np.ones(len(reading.label)), reading.measures["ref_nll"], reading.measures["nll"])
    before, after = (np.round(sums[:, column] / sums[:, 0], 6).tolist() for column in (1, 2))
    return PerDocument(tuple(sums[:, 0].astype(int).tolist()), tuple(before), tuple(after))


def _progress_lost(plan: AuditPlan, text: Text, losses: measures.Losses) -> ProgressLost | None:
    """Of the base's pretraining; None unless its curve is known and was read on this very text alone."""
    record = plan.base.record
    if not plan.base.curve or record is None or record["config"]["init"] != "scratch":
        return None
    learnt = [entry["fingerprint"] for entry in record["data"].values() if entry["role"] == "target"]
    return measures.progress_lost_of(plan.base.curve, losses.forgetting) if learnt == [text.fingerprint] else None
