"""What a sweep will cost before anything is spent: tokens, FLOPs, hours and disk of every run, by the formulas of `mlx_forget.costs`."""

import math
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget import costs, records
from mlx_forget.backends import load_backend
from mlx_forget.config import TrainConfig
from mlx_forget.config_keys import EVALUATIONS_PER_RUN
from mlx_forget.errors import UserError
from mlx_forget.fuse import whole_checkpoint
from mlx_forget.ladder import ModelSpec, default_context, model_spec, num_non_embedding_params, num_params, train_flops_per_token
from mlx_forget.pipeline.opened import Opened
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.sweeps.grid import Point, Resources
from mlx_forget.sweeps.sweep import NOTHING_ASKED, Sweep, base_title
from mlx_forget.trainer import Precision
from mlx_forget.training.plan import plan_run
from mlx_forget.training.start import find_start
from mlx_forget.training.watch import Watch

# What may end a run before its last step, depending on how it goes.
STOP_RULES = ("stop_target_loss", "stop_patience", "stop_minutes", "max_forgetting")
# Tokenizer, configuration, log and record.
_SMALL_FILES_BYTES = 300_000
# Two window sets of float64 losses an evaluation.
_WINDOW_BYTES = 16


class NotPreparedError(Exception):
    """Data or a tokenizer of a run is not there yet; only preparing it would say more."""


@dataclass(frozen=True)
class Speed:
    """What is known of how fast runs of a backend are.

    Args:
        measured: (parameters, FLOPs a second) of finished runs; 6 FLOPs a parameter and token.
        device: one by its data sheet, where nothing was measured.
        insist: take the device all the same.
    """

    measured: tuple[tuple[int, float], ...] = ()
    device: costs.Device | None = None
    insist: bool = False

    def hours(
        self, model: ModelSpec | PretrainedSpec, num_tokens: int, precision: Precision, *, num_devices: int
    ) -> tuple[float | None, str]:
        """Hours of a run and what they are taken from, the finished run nearest in size before a data sheet; None where nothing is."""
        size = num_params(model)
        if self.measured and not self.insist:
            distance = min(abs(math.log(size / found)) for found, _ in self.measured)
            nearest = [speed for found, speed in self.measured if abs(math.log(size / found)) <= distance + 0.01]
            return 6.0 * size * num_tokens / statistics.median(nearest) / 3600, "as fast as finished runs of this size"
        if self.device is None:
            return None, "unknown before a run has ended here: add --on DEVICE"
        rate = costs.Rate.assumed(self.device, precision, num_devices)
        return num_tokens * train_flops_per_token(model) / rate.flops_per_second / 3600, rate.says


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


def speed_of(backend: str, folders: Iterable[Path], device: costs.Device | None = None) -> Speed:
    """How fast the finished runs of a backend in some folders were; else the data sheet of this machine's device.

    Args:
        device: to assume instead.
    """
    found = []
    for folder in folders:
        for path in sorted(folder.glob("*/record.json")):
            try:
                record = records.read_record(path.parent)
            except UserError:
                continue
            if record and record["backend"] == backend and record["tokens_per_second"] and record["status"] != "diverged":
                found.append((record["num_params"], 6.0 * record["num_params"] * record["tokens_per_second"]))
    return Speed(tuple(found), device or costs.device_like(load_backend(backend).hardware()), insist=device is not None)


def planned_rows(sweep: Sweep, speed: Speed) -> list[dict[str, Any]]:
    """Every base model and run of a planned sweep with its cost and where it stands."""
    rows = []
    for job in (*sweep.bases, *sweep.jobs):
        plan, summary = job.plan, job.plan.summary()
        hours, says = speed.hours(plan.model, summary["num_tokens"], plan.precision, num_devices=job.resources.num_ranks)
        kept = summary["kept_disk_bytes"] + _beside_checkpoints(plan.config, plan.num_steps)
        rows.append({"title": job.title, **summary, "kept_disk_bytes": kept, "state": job.state, "hours": hours, "rate": says})
        rows[-1] |= {"num_gpus": job.resources.gpus, "may_stop": _stop_rules(job.plan.config)}
    return rows


def outlined_rows(
    runs: Iterable[tuple[Point, str]], backend: str, speed: Speed, *, resources: Resources = NOTHING_ASKED
) -> list[dict[str, Any]]:
    """Every base model and titled run of a recipe whose data are not all prepared: what the configurations alone say.

    `run_id` is None where it depends on what is not there, and `pending` says on what.

    Args:
        resources: what runs may use, over what the recipe says.
    """
    bases: dict[str, dict[str, Any]] = {}
    rows = []
    quiet, opened = only_if_prepared(Watch()), Opened()
    # What is missing for one run is missing for all that read the same; looking takes a while.
    missing: dict[str, str] = {}
    for point, title in runs:
        config, asked = point.config, resources.over(point.resources)
        reads = str(
            (
                config.target,
                config.pretrain,
                config.init,
                config.model,
                config.replay_data,
                config.tokenizer,
                config.vocab_size,
                config.base,
            )
        )
        run_id, pending = None, missing.get(reads)
        if pending is None:
            try:
                run_id = plan_run(config, watch=quiet, opened=opened).run_id
            except NotPreparedError as error:
                pending = missing[reads] = str(error)
        if config.init == "auto" and config.start_name is None:
            base = config.base_config()
            outline = _outline(base, base_title(base), backend, speed, asked) | {"run_id": None, "pending": pending}
            bases.setdefault(str(base), outline)
        rows.append(_outline(config, title, backend, speed, asked) | {"run_id": run_id, "pending": pending})
    return [*bases.values(), *rows]


def _outline(config: TrainConfig, title: str, backend: str, speed: Speed, asked: Resources) -> dict[str, Any]:
    model = _model(config)
    row_length = config.max_seq_length or model.context_length
    steps = config.iters
    if config.tokens_per_param is not None:
        steps = math.ceil(config.tokens_per_param * num_params(model) / (config.batch_size * row_length))
    if config.stop_tokens is not None:
        steps = min(steps, config.stop_tokens // (config.batch_size * row_length))
    tokens = steps * config.batch_size * row_length
    precision: Precision = "fp32" if config.precision == "auto" else config.precision
    hours, says = speed.hours(model, tokens, precision, num_devices=asked.num_ranks)
    step = costs.Step(
        model=model,
        optim=config.optim(),
        method=config.method_spec(),
        precision=precision,
        rows=config.batch_size,
        row_length=row_length,
        adapter=config.adapter(),
        num_layers=config.trained_layers,
    )
    return {
        "title": title,
        "backend": backend,
        "num_params": num_params(model),
        "num_non_embedding_params": num_non_embedding_params(model),
        "num_steps": steps,
        "num_tokens": tokens,
        "train_flops": tokens * train_flops_per_token(model),
        "disk_bytes": costs.disk_bytes(step),
        "kept_disk_bytes": costs.kept_disk_bytes(step) + _beside_checkpoints(config, steps),
        "state": "waiting",
        "hours": hours,
        "rate": says,
        "num_gpus": asked.gpus,
        "may_stop": _stop_rules(config),
    }


def _stop_rules(config: TrainConfig) -> list[str]:
    """The keys that may end a run before its steps are done, whose number nothing says beforehand."""
    return [key for key in STOP_RULES if getattr(config, key) is not None]


def _model(config: TrainConfig) -> ModelSpec | PretrainedSpec:
    if config.start_name is not None:
        return whole_checkpoint(find_start(config)).model_spec()
    vocab_size = config.vocab_size
    if config.tokenizer is not None:
        from mlx_forget.pipeline.vocabularies import find_tokenizer, load_vocabulary

        vocab_size = load_vocabulary(find_tokenizer(config.tokenizer)).vocab_size
    return model_spec(config.model, vocab_size, config.max_seq_length or default_context(config.model))


def _beside_checkpoints(config: TrainConfig, num_steps: int) -> int:
    """Bytes of a run's history and small files."""
    evaluations = num_steps / (config.steps_per_eval or max(1, num_steps / EVALUATIONS_PER_RUN))
    return int(evaluations * config.eval_rows * _WINDOW_BYTES + _SMALL_FILES_BYTES)


def disk_needed(rows: Sequence[Mapping[str, Any]], *, workers: int) -> int:
    """Bytes that the rows which are not done will take, with what those that run at a time need besides."""
    left = [row for row in rows if row["state"] != "done"]
    besides = sorted((max(0, row["disk_bytes"] - row["kept_disk_bytes"]) for row in left), reverse=True)[:workers]
    return sum(int(row["kept_disk_bytes"]) for row in left) + sum(map(int, besides))


def disk_by_place(rows: Sequence[Mapping[str, Any]], *, workers: int) -> dict[Path, int]:
    """Bytes that planned rows will take in each folder that runs or base models lie in."""
    places = dict.fromkeys(Path(row["folder"]).parent for row in rows)
    return {place: disk_needed([row for row in rows if Path(row["folder"]).parent == place], workers=workers) for place in places}


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
