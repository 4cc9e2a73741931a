"""Replay rows that a model writes itself: ancestral samples from its own distribution, kept as an ordinary store.

Row j is a function of (weights, prompt, temperature, seed, j) alone: its uniforms come from a counter-based generator, so it does not
depend on the batch it is sampled in, nor, in fp32, on the backend. Larger samples begin with smaller ones. Sampling does not stop at
EOS: a row goes on with the next document, as rows of text do. Validation rows are numbered apart from training rows.

Source: Marek et al. (2026), section 2.3 of their sampler: temperature 1, no truncation, weights frozen.
"""

import fcntl
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlx_forget import checkpoint
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.durable_files import replacing, write_text
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.npy_files import map_array
from mlx_forget.pipeline.batches import MaskedRows
from mlx_forget.pipeline.store import MANIFEST, StoreWriter, TokenStore, open_store
from mlx_forget.pipeline.tokenizer import BOS, EOS
from mlx_forget.pipeline.vocabularies import load_vocabulary
from mlx_forget.trainer import Trainer

Rows = npt.NDArray[np.int32]
SplitName = Literal["train", "validation"]

# Tells the generator's streams apart from those of the initialiser, which is keyed by a seed and a number too.
_STREAM = 1
_SPLITS: tuple[SplitName, ...] = ("train", "validation")
_FIRST_VALIDATION_ROW = 1 << 40
_MAX_VALIDATION_ROWS = 128
_ROWS_PER_SHARD = 256
_IDENTITY = "samples.json"
# The special ids are those of the weights' tokenizer.
_NOT_IDENTITY = ("num_tokens", "batch_size", "bos_id", "eos_id")

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
    """

    num_tokens: int
    length: int
    seed: int = 0
    temperature: float = 1.0
    prompt: tuple[int, ...] = ()
    batch_size: int = 64
    bos_id: int = BOS
    eos_id: int = EOS

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
        """Rows of a split; a tenth as many, at most 128, are held out to validate on."""
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
) -> Rows:
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
            sampled = trainer.sample(prompts, u, temperature=spec.temperature, from_reference=from_reference)
            out[start : start + count, len(spec.prompt) :] = sampled
        except MemoryError:
            if count == 1:
                raise UserError("One row does not fit into memory: sample on another device, or a shorter --length.") from None
            at_once.count = count // 2
            say(f"{count} rows at once do not fit into memory: sampling {at_once.count}.")
            continue
        start += count
    return out


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
    _cache: tuple[int, Rows] | None = field(default=None, init=False, repr=False)

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
            self._cache = (first, _after_bos(rows, self.spec.bos_id))
            if is_first:
                self._judge(self._cache[1])
        here = (step - first) * self.rows_per_step
        return self._cache[1][here : here + self.rows_per_step][rank::world_size], None, None

    def _judge(self, rows: Rows) -> None:
        """Say it when the rows are noise or have collapsed."""
        entropy = self.trainer.compare(rows, np.ones((len(rows), self.spec.length), np.uint8)).ref_nll.mean(dtype=np.float64)
        measures = {"entropy_nats": float(entropy), "repetition": _mean_repetition(rows)}
        for problem in _problems(measures, self.vocab_size):
            self.say(problem)

    def read_reference(self, step: int, *, rank: int, world_size: int) -> None:
        """Nothing is kept of rows that never come again."""


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
    vocab_size = start.model_spec().vocab_size
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
        rows_of: dict[SplitName, list[Rows]] = {"train": [], "validation": []}
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
        measures = _measures(trainer, _after_bos(np.concatenate(rows_of["train"])[:_ROWS_PER_SHARD], spec.bos_id))
        for problem in _problems(measures, vocab_size):
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


def _after_bos(rows: Rows, bos_id: int) -> Rows:
    return np.concatenate([np.full((len(rows), 1), bos_id, np.int32), rows], axis=1)


def _measures(trainer: Trainer, rows: Rows) -> dict[str, float]:
    """Entropy (the model's own loss on its samples, nats per token) and repetition of some rows, int32[B, T+1], BOS first."""
    return {
        "entropy_nats": float(trainer.token_losses(rows).mean(dtype=np.float64)),
        "repetition": _mean_repetition(rows),
    }


def _mean_repetition(rows: Rows) -> float:
    """Of rows int32[B, T+1], BOS first."""
    return float(np.mean([_repetition(row[1:]) for row in rows]))


def _repetition(row: npt.NDArray[np.int32]) -> float:
    """Share of the 4-grams of a row that stood in it before."""
    if len(row) <= _NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(row, _NGRAM)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def _problems(measures: Mapping[str, float], vocab_size: int) -> Iterator[str]:
    entropy, repetition = measures["entropy_nats"], measures["repetition"]
    if entropy < _LOWEST_ENTROPY:
        yield f"The samples have collapsed: {entropy:.2f} nats per token, text has more than {_LOWEST_ENTROPY}."
    if entropy > _HIGHEST_ENTROPY_SHARE * math.log(vocab_size):
        yield f"The samples are noise: {entropy:.2f} nats per token of at most {math.log(vocab_size):.2f}. Is the model trained?"
    if repetition > _HIGHEST_REPETITION:
        yield f"The samples repeat themselves: {repetition:.0%} of their {_NGRAM}-grams stood in the same row before."


def _write_store(
    folder: Path, tokenizer_file: Path, spec: SampleSpec, rows_of: Mapping[SplitName, list[Rows]], provenance: dict[str, Any]
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
    if found.is_file():
        if found.read_text(encoding="utf-8") == text:
            return
        say(f"{part} holds rows of another sample: starting afresh.")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"Cannot write {part}: {error.strerror}.") from None
    write_text(found, text)


def _sampled_shard(path: Path, shape: tuple[int, int], vocab_size: int) -> Rows | None:
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
    rows: Rows = np.array(mapped[: shape[0]])
    return rows if not rows.size or (rows.min() >= 0 and rows.max() < vocab_size) else None


def _write_shard(path: Path, rows: Rows) -> None:
    with replacing(path) as file:
        np.save(file, rows)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the place of a store for this process, waiting for another; the lock goes with the process."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"Cannot write {folder}: {error.strerror}.") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
