"""One run, from a configuration to a record: plan it (cheap, and where all bad input is refused), then execute it."""

import dataclasses
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mlx_forget import checkpoint, records
from mlx_forget.backends import load_backend
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.config import TrainConfig
from mlx_forget.config_keys import EVALUATIONS_PER_RUN, REFERENCE_LIVE
from mlx_forget.config_layers import to_yaml
from mlx_forget.durable_files import write_text
from mlx_forget.errors import Interrupted, RunFailed, UserError
from mlx_forget.evaluate import progress_lost
from mlx_forget.fuse import base_of
from mlx_forget.history import read_history
from mlx_forget.ladder import (
    num_non_embedding_params,
    num_params,
)
from mlx_forget.pipeline.sides import Blend
from mlx_forget.strict_yaml import read_yaml
from mlx_forget.trainer import Trainer, TrainerSpec
from mlx_forget.training.data import identity_of, replay_name, sources_of
from mlx_forget.training.folder import only_group
from mlx_forget.training.identity import SCIENCE_VERSION
from mlx_forget.training.loop import Cadence, RunState, drive
from mlx_forget.training.plan import Plan
from mlx_forget.training.replay_rows import error_of_kept_log_probs, with_replay
from mlx_forget.training.stop_rules import StopRules
from mlx_forget.training.tracking import tracked
from mlx_forget.training.watch import Watch


def execute(plan: Plan, *, resume: bool | None = None, watch: Watch | None = None, wait: bool = False) -> dict[str, Any]:
    """Train a planned run to its end and return its record; a run that is done returns its record at once.

    Args:
        resume: True insists on a checkpoint to go on from, False refuses one, None goes on from one if it is there.
        wait: wait for another process that is training in the same folder, instead of refusing.

    Raises:
        UserError: the folder holds another run, is in use, or `resume` cannot be met.
        RunFailed: the run or its base model diverged, now or before.
        Interrupted: a stop was asked for; the run has a checkpoint.
    """
    group = plan.group
    watch = (watch or Watch()).of(group)
    if plan.base is not None:
        plan = with_base(plan, watch)
    with group.together(), only_group(group, plan.folder, wait=wait):
        with group.rank_zero_first():
            record, latest = look_into(plan, resume, watch)
        if record is not None:
            _refuse_diverged(record, plan.folder, "This run diverged before")
            watch.say(f"This run is done already: {plan.folder / records.RECORD}")
            return record
        # Those who share one model make it together.
        with nullcontext() if plan.config.shard else group.rank_zero_first():
            trainer = load_backend(plan.backend)(trainer_spec(plan))
        for note in trainer.notes:
            watch.say(note)
        plan = start_trainer(plan, trainer, watch)
        run = prepare_run(plan, latest, trainer, watch)
        drive(trainer, [run], interrupted=watch.interrupted)
        if run.status == "interrupted":
            raise Interrupted(f"{run.reason}; the same command goes on from there", signal=watch.interrupted() or 2)
        record = finish_run(plan, run, trainer)
        # A launcher ends the others when one process ends with an error: nobody leaves before the record stands.
        group.barrier()
        _refuse_diverged(record, plan.folder, "The run diverged")
        return record


def look_into(plan: Plan, resume: bool | None, watch: Watch) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """What a run's folder holds already: its record, or else the checkpoint to go on from."""
    record = records.read_record(plan.folder)
    if record is not None:
        _check_same_run(plan, record["run_id"])
        return record, None
    latest, problem = checkpoint.latest_checkpoint(plan.folder / "checkpoints")
    if problem is not None:
        watch.say(f"{problem} Going on from the checkpoint before it.")
    if latest is not None:
        _check_same_run(plan, latest.state["run_id"])
        if resume is False:
            raise UserError(f"{plan.folder} holds an unfinished run: leave out --no-resume to go on, or choose another --output.")
    elif resume:
        raise UserError(f"There is nothing to resume in {plan.folder}.")
    return None, latest


def trainer_spec(plan: Plan) -> TrainerSpec:
    """What a backend needs to train a planned run."""
    return TrainerSpec(
        model=plan.model,
        optim=plan.config.optim(),
        method=plan.config.method_spec(),
        adapter=plan.config.adapter(),
        num_layers=plan.config.trained_layers,
        runtime=dataclasses.replace(plan.config.runtime(plan.precision), micro_batch_size=plan.micro_batch_size),
        seed=plan.config.seed,
    )


def start_trainer(plan: Plan, trainer: Trainer, watch: Watch) -> Plan:
    """Give a trainer the start weights and what its method needs; returns the plan with the rows that are replayed."""
    if plan.start is None:
        return plan
    trainer.load(plan.start.weights)
    reference = plan.config.method_spec().reference if plan.config.reference_log_probs == REFERENCE_LIVE else None
    reference = reference or ("start" if plan.config.compare_to_start else None)
    if reference is not None:
        # Where the base is frozen, it is the start model: nothing is copied.
        trainer.set_reference(reference if plan.config.adapter() is None else "adapters_off")
    with plan.group.rank_zero_first():
        return with_replay(plan, trainer, watch)


def prepare_run(plan: Plan, latest: Checkpoint | None, trainer: Trainer, watch: Watch) -> RunState:
    """The state of a run whose trainer has been started; with a latest checkpoint, both go on from it.

    From here on the folder is the run's: `config.yaml` is written into it.
    """
    if plan.group.rank == 0:
        _write_config(plan)
    config = plan.config
    evaluate = config.steps_per_eval or max(1, math.ceil(plan.num_steps / EVALUATIONS_PER_RUN))
    curve = _base_curve(plan)
    identity = {
        "run_id": plan.run_id,
        "backend": plan.backend,
        "is_pretraining": config.is_pretraining,
        "tokenizer_hash": next(iter(plan.stores.values())).tokenizer_hash,
        "base_curve": curve,
        "pretrained_on": identity_of(sources_of(config.target), plan.stores) if config.is_pretraining else None,
    }
    if (adapter := config.adapter()) is not None:
        assert plan.start is not None
        identity |= {"adapter": dataclasses.asdict(adapter), "base": base_of(plan.start)}
    target_train, target_val, pretrain_val = plan.windows
    run = RunState(
        folder=plan.folder,
        model=plan.model,
        tokenizer=plan.tokenizer,
        schedule=plan.schedule,
        stream=plan.stream,
        target_train=target_train,
        target_val=target_val,
        pretrain_val=pretrain_val,
        cadence=Cadence(report=config.steps_per_report, evaluate=evaluate, save=config.save_every or evaluate),
        stop=StopRules(
            num_steps=plan.num_steps,
            target_loss=config.stop_target_loss,
            patience=config.stop_patience,
            max_forgetting=config.max_forgetting,
            max_seconds=None if config.stop_minutes is None else config.stop_minutes * 60,
            max_skipped=config.max_skipped,
        ),
        observer=watch.observer(_title(config), plan.folder),
        compares_with_start=config.compare_to_start,
        identity=identity,
    )
    if plan.group.rank == 0:
        run.observer = tracked(
            run.observer,
            config.log_to,
            plan.folder,
            run_id=plan.run_id,
            title=_title(config),
            config=dataclasses.asdict(config),
            step=0 if latest is None else latest.state["step"],
        )
    if latest is not None:
        trainer.load(latest.weights)
        trainer.load_state(latest.training_state)
        run.resume(latest.state)
        if plan.group.rank == 0:
            _check_history(plan.folder / records.HISTORY, latest.state, watch)
        watch.say(f"Resuming at step {run.step:,} of {plan.num_steps:,}.")
    return run


def _base_curve(plan: Plan) -> list[list[float]]:
    """Validation loss against tokens of the base model; empty where it was pretrained on something else than is measured here."""
    if plan.start is None or not plan.start.state["is_pretraining"]:
        return []
    learnt = plan.start.state.get("pretrained_on")
    same = learnt in (None, identity_of(sources_of(plan.config.pretrain), plan.stores))
    curve: list[list[float]] = plan.start.state["curve"] if same else []
    return curve


def finish_run(plan: Plan, run: RunState, trainer: Trainer, *, stack_size: int = 1) -> dict[str, Any]:
    """The record of a run that has ended for good, written into its folder by rank 0."""
    record = _record(plan, run, trainer) | {"stack_size": stack_size}
    if plan.group.rank == 0:
        history = plan.folder / records.HISTORY
        record["history_rows"] = read_history(history).num_rows if history.exists() else 0
        # The record comes last: a run that has one is not looked at again, and what a kill left in its folder would stay.
        checkpoint.prune(plan.folder / "checkpoints")
        records.write_record(plan.folder, record)
    return record


def _check_history(path: Path, state: dict[str, Any], watch: Watch) -> None:
    """Announce it when evaluations that the checkpoint knows of are no longer in the history."""
    steps = read_history(path)["step"].to_pylist() if path.exists() else []
    if 0 not in steps or state["last"]["step"] not in steps:
        watch.say(f"{path} has lost evaluations up to step {state['last']['step']:,}; the record will be right, the history short.")


def _record(plan: Plan, run: RunState, trainer: Trainer) -> dict[str, Any]:
    config = plan.config
    assert run.start is not None
    best = run.best or run.start
    rows = run.step * plan.stream.batch_size
    pretrain_rows = plan.stream.mixture.num_pretrain_before(rows)
    tokens = plan.stream.tokens_before(run.step)
    data: dict[str, dict[str, Any]] = {}
    sides = ((config.target, "target", plan.stream.target), (config.pretrain, "pretrain", plan.stream.pretrain))
    for (name, role, side), seen in zip(sides, plan.stream.tokens_of_sources(run.step), strict=True):
        for number, source in enumerate(sources_of(name)):
            if source not in data:
                member = side.members[number] if isinstance(side, Blend) else side
                data[source] = {
                    "fingerprint": plan.stores[source].fingerprint,
                    "role": role,
                    "unique_tokens": 0 if member is None else member.num_tokens,
                    "tokens_seen": seen[number] if side is not None else 0,
                }
    if plan.stream.replay is not None:
        served, unique = plan.stream.replay.tokens_before(run.step)
        data[f"replay:{replay_name(config)}"] = {
            "fingerprint": plan.replay_fingerprint,
            "role": "replay",
            "unique_tokens": unique,
            "tokens_seen": served,
        }
    forgetting, lost = None, None
    if best["pretrain_val"] is not None and not config.is_pretraining:
        forgetting = best["pretrain_val"] - run.start["pretrain_val"]
        curve = [(point[0], point[1]) for point in run.identity["base_curve"]]
        lost = dataclasses.asdict(progress_lost(curve, run.start["pretrain_val"], best["pretrain_val"]))
    for name, entry in data.items():
        source = name.removeprefix("replay:")
        if source in plan.published:
            entry["same_as_published"] = plan.published[source]
    return {
        "schema_version": records.SCHEMA_VERSION,
        "run_id": plan.run_id,
        "science_version": SCIENCE_VERSION,
        "status": run.status,
        "reason": run.reason,
        "stopped_by": run.stopped_by,
        "backend": plan.backend,
        "device": trainer.device,
        "world_size": plan.group.size,
        "precision": plan.precision,
        "method": dataclasses.asdict(config.method_spec()),
        "config": dataclasses.asdict(config),
        "versions": records.installed_versions(),
        "seed": config.seed,
        "init": "scratch" if plan.start is None else plan.start.state["run_id"],
        "fine_tune_type": config.fine_tune_type,
        "adapter": None if (adapter := config.adapter()) is None else dataclasses.asdict(adapter),
        "num_params": num_params(plan.model),
        "num_trainable_params": plan.num_trainable_params,
        "num_non_embedding_params": num_non_embedding_params(plan.model),
        "num_steps": run.step,
        "learning_rate": plan.schedule.peak,
        "wall_seconds": run.elapsed_seconds,
        "tokens_per_second": run.step * run.tokens_per_step / run.elapsed_seconds if run.elapsed_seconds else None,
        "peak_memory_bytes": trainer.peak_memory_bytes(),
        "micro_batch_size": trainer.micro_batch_size,
        "num_resumes": run.num_resumes,
        "num_skipped": run.num_skipped,
        "p": {
            "asked": config.p,
            "rows": pretrain_rows / rows if rows else 0.0,
            "tokens": tokens[1] / sum(tokens) if sum(tokens) else 0.0,
        },
        "data": data,
        "losses": {"start": run.start, "best": best, "end": run.last},
        "selection": _selection(config, run),
        "forgetting_nats": forgetting,
        "progress_lost": lost,
        "reference_log_probs": error_of_kept_log_probs(plan, trainer),
        "pretrain_curve": run.curve if config.is_pretraining else None,
        "ended_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _selection(config: TrainConfig, run: RunState) -> dict[str, Any]:
    """What `best` is: the lowest target validation loss, among evaluations that have forgotten no more than the limit if there is one."""
    limit, over = config.max_forgetting, None
    if limit is not None and run.start is not None and run.last is not None and run.last["pretrain_val"] is not None:
        over = run.last["step"] if run.last["pretrain_val"] - run.start["pretrain_val"] > limit else None
    return {"measure": "target_val", "max_forgetting": limit, "over_the_limit_at": over}


def _title(config: TrainConfig) -> str:
    if config.is_pretraining:
        return "pretraining"
    share = f"p = {config.p}"
    return f"finetuning, {share if config.method == 'injection' else config.method}"


def with_base(plan: Plan, watch: Watch) -> Plan:
    """The plan with its base model trained, by this process or by the one that holds its folder."""
    assert plan.base is not None
    folder = plan.base.folder
    (missing,) = plan.group.agree(records.read_record(folder) is None)
    if missing:
        watch.say(f"Training the base model first; it is kept in {folder}")
        execute(plan.base, watch=watch, wait=True)
    if (record := records.read_record(folder)) is not None:
        _refuse_diverged(record, folder, "The base model diverged")
    return dataclasses.replace(plan, base=None, start=checkpoint.open_checkpoint(folder / "checkpoints" / "last"))


def _refuse_diverged(record: dict[str, Any], folder: Path, what: str) -> None:
    if record["status"] == "diverged":
        way_out = "change what it is trained with, or remove the folder to train it again"
        raise RunFailed(f"{what}: {record['reason']}. Its record: {folder / records.RECORD}; {way_out}.")


def _check_same_run(plan: Plan, found: str) -> None:
    if found == plan.run_id:
        return
    differing = ""
    stored = plan.folder / records.CONFIG
    if stored.is_file():
        before, now = read_yaml(stored), dataclasses.asdict(_chosen(plan))
        # Those that a run is named by: others may change when it goes on.
        named_by = [f.name for f in dataclasses.fields(plan.config) if f.metadata["science"] or f.name == "precision"]
        keys = [key for key in named_by if before.get(key) != now[key]]
        differing = f" (differing: {', '.join(keys) or 'what the data or the start weights hold'})"
    raise UserError(f"{plan.folder} holds another run, {found}{differing}: choose another --output.")


def _write_config(plan: Plan) -> None:
    write_text(plan.folder / records.CONFIG, to_yaml(_chosen(plan)))


def _chosen(plan: Plan) -> TrainConfig:
    """The configuration with what the backend chose of it: the same file asks for the same run on other hardware."""
    return dataclasses.replace(plan.config, precision=plan.precision)
