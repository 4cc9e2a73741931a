"""A store that a model writes itself: an ordinary one, which says who wrote it.

Validation rows of a store are numbered apart from its training rows.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget import checkpoint
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.durable_files import held, read_bytes, replacing, write_text
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.npy_files import map_array
from mlx_forget.pipeline.store import MANIFEST, StoreWriter, TokenStore, open_store
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.replay.sampling import (
    RowsAtOnce,
    SampledRows,
    SampleSpec,
    SplitName,
    after_bos,
    measures_of,
    problems_of,
    sample_rows,
)
from mlx_forget.trainer import Trainer

_SPLITS: tuple[SplitName, ...] = ("train", "validation")
_FIRST_VALIDATION_ROW = 1 << 40
_ROWS_PER_SHARD = 256
_IDENTITY = "samples.json"
# The special ids are those of the weights' tokenizer.
_NOT_IDENTITY = ("num_tokens", "batch_size", "bos_id", "eos_id", "num_ids")


def sample_store(
    trainer: Trainer,
    start: Checkpoint,
    folder: Path,
    spec: SampleSpec,
    *,
    backend: str,
    precision: str,
    say: Callable[[str], None] = lambda sentence: None,
    progress: Callable[[str, float], None] = lambda activity, fraction: None,
    interrupted: Callable[[], int | None] = lambda: None,
) -> TokenStore:
    """Sample a model into a new store; what a killed process had sampled of the same is used again.

    Args:
        trainer: holds the weights of `start`.
        folder: where the store will be; one that is there already is opened.

    Raises:
        Interrupted: a stop was asked for; the rows so far are kept beside `folder`.
    """
    vocab_size = spec.num_ids or start.model_spec().vocab_size
    identity = {
        "model": {"run_id": start.state["run_id"], "weights_sha256": start.state["files"][checkpoint.WEIGHTS]},
        **{key: value for key, value in asdict(spec).items() if key not in _NOT_IDENTITY},
        "prompt": list(spec.prompt),
        "backend": backend,
        "precision": precision,
    }
    part = samples_of(folder)
    with alone(folder):
        if (folder / MANIFEST).is_file():
            shutil.rmtree(part, ignore_errors=True)
            return open_store(folder)
        _open_part(part, identity, say)
        shards: list[tuple[SplitName, int, int]] = [
            (split, number, min(_ROWS_PER_SHARD, spec.num_rows(split) - number * _ROWS_PER_SHARD))
            for split in _SPLITS
            for number in range(-(-spec.num_rows(split) // _ROWS_PER_SHARD))
        ]
        total, done = sum(rows for _, _, rows in shards), 0
        activity = f"sampling {total * spec.length:,} tokens of {start.state['run_id']}"
        rows_of: dict[SplitName, list[SampledRows]] = {"train": [], "validation": []}
        at_once = RowsAtOnce(spec.batch_size)
        note = start_note(start, spec)
        if note is not None:
            say(note)
        for split, number, rows in shards:
            if interrupted():
                sentence = f"interrupted after {done * spec.length:,} tokens; the same command goes on from there"
                raise Interrupted(sentence, signal=interrupted() or 2)
            first = number * _ROWS_PER_SHARD + (0 if split == "train" else _FIRST_VALIDATION_ROW)
            sampled = _sampled_shard(part / f"{split}-{number:05d}.npy", (rows, spec.length), vocab_size)
            if sampled is None:
                progress(activity, done / total)
                sampled = sample_rows(trainer, spec, first, rows, say=say, at_once=at_once)
                _write_shard(part / f"{split}-{number:05d}.npy", sampled)
            rows_of[split].append(sampled)
            done += rows
        measures = measures_of(trainer, after_bos(np.concatenate(rows_of["train"])[:_ROWS_PER_SHARD], spec.bos_id))
        for problem in problems_of(measures, vocab_size):
            say(problem)
        store = _write_store(folder, start.tokenizer, spec, rows_of, identity | measures)
        shutil.rmtree(part, ignore_errors=True)
        progress(activity, 1.0)
        return store


def samples_of(folder: Path) -> Path:
    """Where the rows of a store are until it is whole."""
    return folder.with_name(f".{folder.name}.samples")


def start_note(start: Checkpoint, spec: SampleSpec) -> str | None:
    """A sentence if the tokenizer has no token of its own for the beginning of a document: what rows are sampled after."""
    if spec.bos_id != spec.eos_id:
        return None
    piece = load_vocabulary(start.tokenizer).piece(spec.bos_id)
    return f"The tokenizer has no BOS of its own: rows are sampled after {piece!r} (id {spec.bos_id}), which also ends documents."


def is_sampled(store: TokenStore) -> bool:
    """Whether a model wrote a store."""
    return "model" in store.provenance


def origin_note(store: TokenStore, start: Checkpoint) -> str | None:
    """A sentence if a store was sampled from another model than `start`, with both names."""
    model = store.provenance.get("model")
    if model is None or model["weights_sha256"] == start.state["files"][checkpoint.WEIGHTS]:
        return None
    return (
        f"{store.folder} was sampled from run {model['run_id']}, and this run starts from {start.state['run_id']}: "
        "the rows are used, but they are not this model's own."
    )


def _write_store(
    folder: Path, tokenizer_file: Path, spec: SampleSpec, rows_of: Mapping[SplitName, list[SampledRows]], provenance: dict[str, Any]
) -> TokenStore:
    tokenizer = load_vocabulary(tokenizer_file)
    model = provenance["model"]["run_id"]
    writer = StoreWriter(
        folder=folder,
        tokenizer_file=tokenizer_file,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        bos_id=spec.bos_id,
        eos_id=spec.eos_id,
        source=f"samples of run {model} (seed {provenance['seed']}, temperature {provenance['temperature']:g})",
        provenance=provenance,
    )
    try:
        for split, shards in rows_of.items():
            for row in np.concatenate(shards):
                writer.add(split, row, len(tokenizer.decode(row).encode()), end=False)
        return writer.close()
    finally:
        writer.discard()


def _open_part(part: Path, identity: dict[str, Any], say: Callable[[str], None]) -> None:
    """A folder for shards of this sample and no other."""
    found = part / _IDENTITY
    text = json.dumps(identity, indent=1, sort_keys=True)
    if found.exists():
        with suppress(OSError):
            if read_bytes(found) == text.encode():
                return
        say(f"{part} holds rows of another sample: starting afresh.")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"Cannot write {part}: {error.strerror}.") from None
    write_text(found, text)


def _sampled_shard(path: Path, shape: tuple[int, int], vocab_size: int) -> SampledRows | None:
    """The rows of a shard that is there and whole."""
    if not path.is_file():
        return None
    try:
        # Mapped, so that a header cannot ask for more than there is.
        mapped = map_array(path)
    except (ValueError, OSError):
        return None
    # A sample that was asked for with fewer rows has a shorter last shard.
    if mapped.dtype != np.int32 or mapped.ndim != 2 or len(mapped) < shape[0] or mapped.shape[1] != shape[1]:
        return None
    rows: SampledRows = np.array(mapped[: shape[0]])
    return rows if not rows.size or (rows.min() >= 0 and rows.max() < vocab_size) else None


def _write_shard(path: Path, rows: SampledRows) -> None:
    with replacing(path) as file:
        np.save(file, rows)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the place of a store for this process, waiting for another; the lock goes with the process."""
    with ExitStack() as lock:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.enter_context(held(folder.with_name(f".{folder.name}.lock")))
        except OSError as error:
            raise UserError(f"Cannot write {folder}: {error.strerror}.") from None
        yield
