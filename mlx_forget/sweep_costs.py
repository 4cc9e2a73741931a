"""What a sweep will cost before anything is spent: tokens, FLOPs, hours and disk of every run."""

import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget import records
from mlx_forget.config import EVALUATIONS_PER_RUN, TrainConfig
from mlx_forget.errors import UserError
from mlx_forget.grid import Recipe
from mlx_forget.ladder import ModelSpec, model_spec, num_non_embedding_params, num_params, train_flops_per_token
from mlx_forget.plan import plan_run
from mlx_forget.sweep import Sweep, base_title, titled_runs
from mlx_forget.watch import Watch

# fp32 weights and two moments; one more copy stands aside while a checkpoint is written.
_WEIGHT_BYTES, _STATE_BYTES = 4, 12
# Tokenizer, configuration, log and record.
_SMALL_FILES_BYTES = 300_000
# Two window sets of float64 losses an evaluation.
_WINDOW_BYTES = 16


class NotPreparedError(Exception):
    """Data or a tokenizer of a run is not there yet; only preparing it would say more."""


@dataclass(frozen=True)
class Speed:
    """FLOPs a second that runs get.

    Args:
        measured: (parameters, FLOPs a second) of finished runs, of the same backend.
        given: what the user says, for every size.
    """

    measured: tuple[tuple[int, float], ...] = ()
    given: float | None = None

    def hours(self, size: int, flops: float) -> float | None:
        """Hours of a run, by the measured run nearest in size; None where nothing is known."""
        if self.given is not None:
            return flops / self.given / 3600
        if not self.measured:
            return None
        distance = min(abs(math.log(size / found)) for found, _ in self.measured)
        nearest = [speed for found, speed in self.measured if abs(math.log(size / found)) <= distance + 0.01]
        return flops / statistics.median(nearest) / 3600


def only_if_prepared(watch: Watch) -> Watch:
    """A watch under which nothing is prepared.

    Raises:
        NotPreparedError: from within, where something would have to be.
    """

    def refuse(activity: str, fraction: float, num_bytes: int = 0) -> None:
        # To know the name of a store, its files are read.
        if not (activity.startswith("reading ") and fraction == 0):
            raise NotPreparedError(activity)

    return Watch(say=watch.say, progress=refuse)


def speed_of(backend: str, folders: Iterable[Path], given: float | None = None) -> Speed:
    """How fast finished runs of a backend at or below some folders were.

    Their 6 FLOPs a parameter and token leave attention out, as does nobody's clock: hours are estimates.
    """
    found = []
    for folder in folders:
        for path in sorted(folder.glob("*/record.json")):
            try:
                record = records.read_record(path.parent)
            except UserError:
                continue
            if record and record["backend"] == backend and record["tokens_per_second"]:
                found.append((record["num_params"], 6.0 * record["num_params"] * record["tokens_per_second"]))
    return Speed(tuple(found), given)


def planned_rows(sweep: Sweep, speed: Speed) -> list[dict[str, Any]]:
    """Every base model and run of a planned sweep with its cost and where it stands."""
    rows = []
    for job in (*sweep.bases, *sweep.jobs):
        summary = job.plan.summary()
        evaluations = job.plan.num_steps / (job.plan.config.steps_per_eval or max(1, job.plan.num_steps / EVALUATIONS_PER_RUN))
        rows.append(
            {
                "title": job.title,
                **summary,
                "state": job.state,
                "hours": speed.hours(summary["num_params"], summary["train_flops"]),
                "disk_bytes": run_bytes(summary["num_params"], evaluations, job.plan.config.eval_rows),
            }
        )
    return rows


def outlined_rows(recipe: Recipe, overrides: Mapping[str, Any] | None, backend: str, speed: Speed) -> list[dict[str, Any]]:
    """Every base model and run of a recipe whose data are not all prepared: what the configurations alone say.

    `run_id` is None where it depends on what is not there, and `pending` says on what.
    """
    bases: dict[str, dict[str, Any]] = {}
    rows = []
    quiet = only_if_prepared(Watch())
    # What is missing for one run is missing for all that read the same; looking takes a while.
    missing: dict[str, str] = {}
    for point, title in titled_runs(recipe, overrides):
        config = point.config
        reads = str(
            (config.target, config.pretrain, config.init, config.replay_data, config.tokenizer, config.vocab_size, config.base)
        )
        run_id, pending = None, missing.get(reads)
        if pending is None:
            try:
                run_id = plan_run(config, watch=quiet).run_id
            except NotPreparedError as error:
                pending = missing[reads] = str(error)
        if config.init == "auto":
            base = config.base_config()
            bases.setdefault(str(base), _outline(base, base_title(base), backend, speed) | {"run_id": None, "pending": pending})
        rows.append(_outline(config, title, backend, speed) | {"run_id": run_id, "pending": pending})
    return [*bases.values(), *rows]


def _outline(config: TrainConfig, title: str, backend: str, speed: Speed) -> dict[str, Any]:
    model = _model(config)
    row_length = config.max_seq_length or model.context_length
    steps = config.iters
    if config.tokens_per_param is not None:
        steps = math.ceil(config.tokens_per_param * num_params(model) / (config.batch_size * row_length))
    if config.stop_tokens is not None:
        steps = min(steps, config.stop_tokens // (config.batch_size * row_length))
    tokens = steps * config.batch_size * row_length
    flops = tokens * train_flops_per_token(model)
    evaluations = steps / (config.steps_per_eval or max(1, steps / EVALUATIONS_PER_RUN))
    return {
        "title": title,
        "backend": backend,
        "num_params": num_params(model),
        "num_non_embedding_params": num_non_embedding_params(model),
        "num_steps": steps,
        "num_tokens": tokens,
        "train_flops": flops,
        "state": "waiting",
        "hours": speed.hours(num_params(model), flops),
        "disk_bytes": run_bytes(num_params(model), evaluations, config.eval_rows),
    }


def _model(config: TrainConfig) -> ModelSpec:
    if config.init not in ("auto", "scratch"):
        from mlx_forget.checkpoint import find_checkpoint

        return find_checkpoint(Path(config.init).expanduser()).model_spec()
    vocab_size = config.vocab_size
    if config.tokenizer is not None:
        from mlx_forget.pipeline.vocabularies import find_tokenizer, load_vocabulary

        vocab_size = load_vocabulary(find_tokenizer(config.tokenizer)).vocab_size
    context = config.max_seq_length or (1024 if model_spec(config.model, 1, 1).width >= 512 else 128)
    return model_spec(config.model, vocab_size, context)


def run_bytes(size: int, evaluations: float, eval_rows: int) -> int:
    """What a finished run keeps on the disk: the last checkpoint with its state, the best weights, its history.

    Args:
        size: parameters.
    """
    return int((_STATE_BYTES + _WEIGHT_BYTES) * size + evaluations * eval_rows * _WINDOW_BYTES + _SMALL_FILES_BYTES)


def disk_needed(rows: Sequence[Mapping[str, Any]], *, workers: int) -> int:
    """Bytes that the rows which are not done will take, with the extra checkpoints of those that run at a time."""
    left = [row for row in rows if row["state"] != "done"]
    largest = sorted((row["num_params"] for row in left), reverse=True)[:workers]
    return sum(int(row["disk_bytes"]) for row in left) + sum(2 * _STATE_BYTES * int(size) for size in largest)


def check_disk(folder: Path, needed: int) -> None:
    """Refuse a sweep that the disk cannot hold.

    Raises:
        UserError: with both numbers.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"The runs need about {size_text(needed)} in {folder}, and {size_text(free)} are free there: make room, choose another "
            "--output, or take runs away."
        )


def size_text(num_bytes: float) -> str:
    """A number of bytes as people read it."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def hours_text(hours: float | None) -> str:
    """Hours as people read them; a question mark where they are not known."""
    if hours is None:
        return "?"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"
