"""Log-probabilities of a frozen reference, kept beside a replay store: the KL term then needs no forward pass of the reference.

STORE/log-probs/WEIGHTS-KIND-LENGTH/
    00000.log_probs.npy   float16[rows, T, V], or [rows, T, k] with 00000.top.npy (ids) and 00000.tail.npy (float32[rows, T])
    log_probs.json        written last: of which store, weights, rows and precision, checksums, and the error of what is kept

Rows are numbered as `RowSubset` numbers them, in an order that no seed changes: what is kept for many rows serves any fewer. Rounding to
float16 keeps the divergence of a model with itself near 1e-7 nats (bf16, of the same size: 1e-5); of the likeliest tokens the divergence
is a lower bound, and a run's record says how far below the whole one it was at the end.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget import checkpoint
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.durable_files import is_whole, read_object, replacing, sealed, sha256_of, write_text
from mlx_forget.errors import Interrupted, UserError
from mlx_forget.npy_files import map_array
from mlx_forget.pipeline.reference_rows import Ids, ReferenceRows, index_type, parse_kind, row_bytes
from mlx_forget.pipeline.sides import RowSubset, Side, read_masked
from mlx_forget.replay.sampled_store import alone
from mlx_forget.trainer import Trainer

SCHEMA_VERSION = 1
FOLDER = "log-probs"
MANIFEST = "log_probs.json"
_PARTS = ("log_probs", "top", "tail")
_SHARD_BYTES = 1 << 27
_LOGIT_BYTES = 1 << 27
_MAX_ROWS_PER_SHARD = 256


@dataclass(frozen=True)
class LogProbs:
    """What is kept of a reference for the rows of one subset.

    Args:
        subset: the rows.
        folder: where it is.
        kind: `full` or `top-N`.
        rows_per_shard, num_rows: how rows are shared out among files.
        measured: of the rows that were looked at: the mean KL(reference || what is kept) in nats, and the mean probability of the tail.
    """

    subset: RowSubset
    folder: Path
    kind: str
    rows_per_shard: int
    num_rows: int
    measured: dict[str, float]
    _open: dict[tuple[int, str], npt.NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)

    def read(self, index: Ids) -> ReferenceRows:
        """The rows at `index` int64[n] of the subset."""
        top = parse_kind(self.kind)
        parts: list[npt.NDArray[Any] | None] = []
        for part in _parts(top):
            first = self._shard(0, part)
            # Of many processes, some may have no replay row.
            values = np.empty((len(index), *first.shape[1:]), first.dtype)
            for place, row in enumerate(index.tolist()):
                values[place] = self._shard(row // self.rows_per_shard, part)[row % self.rows_per_shard]
            parts.append(values.astype(np.int32) if part == "top" else values)
        return ReferenceRows(*parts)  # type: ignore[arg-type]

    def in_words(self) -> str:
        """What was measured of what is kept."""
        found = self.measured
        words = (
            f"KL(model || what is kept) is {found['kl_of_kept_nats']:.2g} nats per token, over {found['num_tokens']:,.0f} tokens"
        )
        top = parse_kind(self.kind)
        return (
            words
            if top is None
            else f"{words}; {found['tail_probability']:.1%} of the probability lies outside the {top} likeliest"
        )

    def _shard(self, number: int, part: str) -> npt.NDArray[Any]:
        if (number, part) not in self._open:
            self._open[number, part] = map_array(self.folder / _file(number, part))
        return self._open[number, part]


@dataclass(frozen=True)
class BlendedLogProbs:
    """What is kept for the rows of several subsets, numbered one after the other, as `Blend` numbers them."""

    members: tuple[LogProbs, ...]

    def read(self, index: Ids) -> ReferenceRows:
        """The rows at `index` int64[n] of the blend."""
        if not len(index):
            return self.members[0].read(index)
        ends = np.cumsum([member.subset.num_rows for member in self.members])
        owner = np.searchsorted(ends, index, "right")
        parts, order = [], []
        for number, member in enumerate(self.members):
            mine = np.flatnonzero(owner == number)
            if len(mine):
                parts.append(member.read(index[mine] - (ends[number] - member.subset.num_rows)))
                order.append(mine)
        place = np.argsort(np.concatenate(order), kind="stable")
        return ReferenceRows.together(parts).rows(place)


def keep_log_probs(
    subset: RowSubset,
    trainer: Trainer,
    start: Checkpoint,
    kind: str,
    *,
    backend: str,
    precision: str,
    say: Callable[[str], None] = lambda sentence: None,
    progress: Callable[[str, float], None] = lambda activity, fraction: None,
    interrupted: Callable[[], int | None] = lambda: None,
) -> LogProbs:
    """What a model says about the rows of a subset, from the files beside their store; what is not there yet is computed and written.

    Args:
        trainer: holds the weights of `start`.
        kind: `full` or `top-N`.

    Raises:
        UserError: no room, or damaged files.
        Interrupted: a stop was asked for; whole files are kept.
    """
    vocab_size = start.model_spec().vocab_size
    top = parse_kind(kind)
    if top is not None and top >= vocab_size:
        raise UserError(f"The vocabulary has {vocab_size:,} tokens: keep fewer than {kind}, or full.")
    weights = start.state["files"][checkpoint.WEIGHTS]
    place = subset.split.folder / FOLDER
    folder = place / f"{weights[:16]}-{kind}-{subset.layout}-{subset.row_length}-{precision}"
    size = row_bytes(kind, subset.row_length, vocab_size)
    per_shard = max(1, min(_MAX_ROWS_PER_SHARD, _SHARD_BYTES // size))
    identity = {
        "schema_version": SCHEMA_VERSION,
        "model": {"run_id": start.state["run_id"], "weights_sha256": weights},
        "rows": _identity_of(subset),
        "kind": kind,
        "vocab_size": vocab_size,
        "rows_per_shard": per_shard,
        "precision": precision,
    }
    with alone(folder):
        found = _read_manifest(folder, identity)
        if found is not None and found["num_rows"] >= subset.num_rows:
            _check_files(folder, found["files"], -(-subset.num_rows // per_shard))
            return LogProbs(subset, folder, kind, per_shard, found["num_rows"], found["measured"])
        _check_room(place, (subset.num_rows - (0 if found is None else found["num_rows"])) * size, kind)
        say(
            f"Log-probabilities of {start.state['run_id']} for {subset.num_rows:,} rows of {subset.split.folder.name}, {kind}: "
            f"{subset.num_rows * size / 1e9:.3g} GB in {folder}"
        )
        try:
            _open_folder(folder, identity)
            files: dict[str, str] = {}
            measured: dict[str, float] = {}
            for number in range(-(-subset.num_rows // per_shard)):
                if interrupted():
                    sentence = f"interrupted after {number * per_shard:,} rows; the same command goes on from there"
                    raise Interrupted(sentence, signal=interrupted() or 2)
                progress(f"log-probabilities of {start.state['run_id']}", number * per_shard / subset.num_rows)
                rows = np.arange(number * per_shard, min(subset.num_rows, (number + 1) * per_shard))
                if number == 0 or not _is_whole(folder, number, len(rows), top):
                    kept, error = _score(trainer, subset, rows, top, vocab_size)
                    _write_shard(folder, number, kept, vocab_size)
                    measured = measured or error
                files |= {_file(number, part): sha256_of(folder / _file(number, part)) for part in _parts(top)}
            content = {**identity, "backend": backend, "num_rows": subset.num_rows, "files": files, "measured": measured}
            write_text(folder / MANIFEST, json.dumps(sealed(content), indent=1))
        except OSError as error:
            raise UserError(f"Cannot write {folder}: {error.strerror or error}. The same command goes on from there.") from None
        progress(f"log-probabilities of {start.state['run_id']}", 1.0)
        return LogProbs(subset, folder, kind, per_shard, subset.num_rows, measured)


def _score(
    trainer: Trainer, subset: RowSubset, rows: Ids, top: int | None, vocab_size: int
) -> tuple[ReferenceRows, dict[str, float]]:
    """What a trainer's model says about some rows, and how far what is kept of it is from that."""
    at_once = max(1, _LOGIT_BYTES // (4 * subset.row_length * vocab_size))
    parts, error, tails = [], 0.0, 0.0
    for first in range(0, len(rows), at_once):
        some = rows[first : first + at_once]
        tokens, _, segment = read_masked(subset, some)
        exact = trainer.log_probs(tokens, segment)
        parts.append(ReferenceRows.of(exact, top))
        rounding, mass = parts[-1].error(exact)
        error, tails = error + float(rounding.sum()), tails + float(mass.sum())
    labels = len(rows) * subset.row_length
    measured = {"num_tokens": labels, "kl_of_kept_nats": error / labels}
    return ReferenceRows.together(parts), measured if top is None else {**measured, "tail_probability": tails / labels}


def divergence_of(kept: LogProbs | BlendedLogProbs, side: Side, index: Ids, trainer: Trainer) -> dict[str, float]:
    """KL(reference || model) on some rows of a side, means in nats per token: from the trainer's live reference, and from what is kept."""
    live, found = [], []
    for row in range(len(index)):
        tokens, _, segment = read_masked(side, index[row : row + 1])
        own, reference = (trainer.log_probs(tokens, segment, from_reference=which) for which in (False, True))
        live.append(np.exp(reference, dtype=np.float64) * (reference.astype(np.float64) - own))
        found.append(kept.read(index[row : row + 1]).divergence(own))
    divergences = np.concatenate(live).sum(axis=-1)
    return {
        "num_tokens": divergences.size,
        "kl_live_nats": float(divergences.mean()),
        "kl_kept_nats": float(np.concatenate(found).mean()),
    }


def _identity_of(subset: RowSubset) -> dict[str, Any]:
    """Which rows these are, but for how many."""
    shards = [shard.tokens_sha256 for shard in subset.split.shards]
    return {
        "split": subset.split.name,
        "tokens_sha256": hashlib.sha256(",".join(shards).encode()).hexdigest(),
        "length": subset.row_length,
        "layout": subset.layout,
        "mask_prompt": subset.mask_prompt,
    }


def _read_manifest(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What is kept in a folder, if it is of the same store, weights and rows."""
    try:
        found = read_object(folder / MANIFEST)
        if {key: found.get(key) for key in identity} != identity:
            return None
        files, measured, parts = found["files"], found["measured"], _parts(parse_kind(found["kind"]))
        num_shards = len(files) // len(parts)
        # As many files as rows, and no other: what lacks one would be found out in the middle of a run.
        if not is_whole(found) or -(-found["num_rows"] // found["rows_per_shard"]) != num_shards:
            raise ValueError
        if set(files) != {_file(number, part) for number in range(num_shards) for part in parts}:
            raise ValueError
        names = ("num_tokens", "kl_of_kept_nats", "tail_probability")[: 2 if len(parts) == 1 else 3]
        found["measured"] = {name: float(measured[name]) for name in names}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{folder / MANIFEST} is damaged: remove {folder}, and it is computed again.") from None
    return found


def _check_files(folder: Path, files: dict[str, str], num_shards: int) -> None:
    for name, wanted in files.items():
        if int(name.partition(".")[0]) < num_shards and (not (folder / name).is_file() or sha256_of(folder / name) != wanted):
            raise UserError(f"{folder / name} is damaged or missing: remove {folder}, and it is computed again.")


def _check_room(place: Path, needed: int, kind: str) -> None:
    free = shutil.disk_usage(place.parent).free
    if needed > free:
        raise UserError(
            f"Log-probabilities ({kind}) of these rows take {needed / 1e9:.3g} GB, and {place.parent} has {free / 1e9:.3g} GB free: keep "
            "the likeliest tokens (top-64), replay fewer tokens, or leave reference_log_probs live."
        )


def _open_folder(folder: Path, identity: dict[str, Any]) -> None:
    """A folder for files of this reference and these rows; what it holds of others is removed."""
    note = folder / "identity.json"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        same = read_object(note) == identity
    except (OSError, ValueError):
        same = False
    if not same:
        for path in folder.iterdir():
            path.unlink()
        write_text(note, json.dumps(identity, indent=1))


def _is_whole(folder: Path, number: int, num_rows: int, top: int | None) -> bool:
    try:
        shapes = [map_array(folder / _file(number, part)).shape for part in _parts(top)]
    except (OSError, ValueError):
        return False
    return all(shape[:1] == (num_rows,) for shape in shapes)


def _write_shard(folder: Path, number: int, kept: ReferenceRows, vocab_size: int) -> None:
    top = None if kept.top is None else kept.top.astype(index_type(vocab_size))
    for part, values in zip(_PARTS, (kept.log_probs, top, kept.tail), strict=True):
        if values is not None:
            with replacing(folder / _file(number, part)) as file:
                np.save(file, values)


def _parts(top: int | None) -> tuple[str, ...]:
    """Of what there are files."""
    return _PARTS[: 1 if top is None else 3]


def _file(number: int, part: str) -> str:
    return f"{number:05d}.{part}.npy"


def kept_members(members: Sequence[LogProbs]) -> LogProbs | BlendedLogProbs:
    """Of one subset or of several."""
    return members[0] if len(members) == 1 else BlendedLogProbs(tuple(members))
