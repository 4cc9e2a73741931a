"""One run, from a configuration to a record: plan it (cheap, and where all bad input is refused), then execute it."""

import dataclasses
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget import checkpoint, records
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.config import (
    BUILTIN_TARGET_TOKENS,
    EVALUATIONS_PER_RUN,
    REPLAY_ONLINE,
    REPLAY_PRETRAIN,
    REPLAY_SELF,
    SCIENCE_VERSION,
    TrainConfig,
    read_yaml,
    run_id,
    schedule,
    to_yaml,
)
from mlx_forget.distributed import ALONE, Group
from mlx_forget.errors import Interrupted, RunFailed, UserError
from mlx_forget.evaluate import Windows, progress_lost
from mlx_forget.history import read_history
from mlx_forget.ladder import (
    ModelSpec,
    model_spec,
    num_non_embedding_params,
    num_params,
    train_flops_per_token,
)
from mlx_forget.loop import Cadence, Observer, Report, RunState, StopRules, drive
from mlx_forget.methods import METHODS
from mlx_forget.pipeline.batches import BatchStream, Blend, ReplayRows, RowSubset, Side
from mlx_forget.pipeline.catalog import builtin_tokenizer, resolve_store, silent
from mlx_forget.pipeline.corpora import CORPORA, build_corpus, forget_home
from mlx_forget.pipeline.mixture import Mixture
from mlx_forget.pipeline.rows import Layout
from mlx_forget.pipeline.shares import ShareSchedule, Stage, constant_share, parse_sources, parse_stages
from mlx_forget.pipeline.store import TokenStore
from mlx_forget.pipeline.tokenise import Progress
from mlx_forget.pipeline.vocabularies import find_tokenizer, load_vocabulary, tokenizer_in
from mlx_forget.replay import OnlineReplay, SampleSpec, origin_note, sample_store
from mlx_forget.schedule import Schedule
from mlx_forget.trainer import Capabilities, Precision, Trainer, TrainerSpec, choose_backend, join_group, load_backend

# The Fisher information of EWC is measured on this many rows.
FISHER_ROWS = 256
# A run samples no more of its start model unless it is told to.
MAX_SAMPLED_TOKENS = 2_000_000


class NoObserver(Observer):
    """Nobody watches."""

    def on_report(self, report: Report) -> None:
        pass

    def on_evaluation(self, row: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Watch:
    """How a run talks to its caller.

    Args:
        say: one announced sentence.
        progress: preparation work (activity, fraction done).
        observer: makes the observer of a run from its title.
        interrupted: the number of the signal that asked to stop, or None.
    """

    say: Callable[[str], None] = lambda sentence: None
    progress: Progress = silent
    observer: Callable[[str, Path], Observer] = lambda title, folder: NoObserver()
    interrupted: Callable[[], int | None] = lambda: None

    def of(self, group: Group) -> "Watch":
        """What a process of a group says: rank 0 speaks for all."""
        return self if group.rank == 0 else Watch(interrupted=self.interrupted)


@dataclass(frozen=True)
class Plan:
    """A run that can start: everything is resolved and checked.

    Args:
        base: the plan of the base model that `init: auto` stands for, or None.
        start: the checkpoint to start from, or None: from scratch, or from `base` once that is trained.
        published: whether each built-in corpus is the one that published numbers were measured on.
        replay_fingerprint: of the store that replay rows come from, once it is there.
        group: the processes that train this run together.
    """

    config: TrainConfig
    backend: str
    precision: Precision
    model: ModelSpec
    schedule: Schedule
    stream: BatchStream
    windows: tuple[Windows, Windows, Windows | None]
    stores: dict[str, TokenStore]
    published: dict[str, bool]
    tokenizer: Path
    num_steps: int
    run_id: str
    folder: Path
    base: "Plan | None"
    start: Checkpoint | None
    replay_fingerprint: str | None = None
    group: Group = ALONE

    def summary(self) -> dict[str, Any]:
        """What the run will be and cost."""
        tokens = self.num_steps * self.stream.batch_size * self.stream.target.row_length
        return {
            "run_id": self.run_id,
            "folder": str(self.folder),
            "backend": self.backend,
            "precision": self.precision,
            "model": dataclasses.asdict(self.model),
            "num_params": num_params(self.model),
            "num_non_embedding_params": num_non_embedding_params(self.model),
            "num_steps": self.num_steps,
            "num_tokens": tokens,
            "num_pretrain_tokens": self.stream.tokens_before(self.num_steps)[1],
            "method": self.config.method,
            "num_replay_tokens": self.num_steps * _replay_rows_per_step(self.config) * self.stream.target.row_length,
            "unique_target_tokens": self.stream.target.num_tokens,
            "learning_rate": self.schedule.peak,
            "train_flops": tokens * train_flops_per_token(self.model),
            "base": None if self.base is None else self.base.summary(),
        }


def plan_run(config: TrainConfig, *, folder: Path | None = None, watch: Watch | None = None) -> Plan:
    """Resolve and check a run. Corpora and files are tokenised here if they are not yet; nothing is trained.

    Where a launcher started several processes, they join here, and rank 0 prepares the data before the others look.

    Raises:
        UserError: anything about the request that cannot work.
    """
    watch = watch or Watch()
    backend = config.backend
    if backend == "auto":
        backend, reason = choose_backend()
        watch.say(f"Backend {backend}: {reason}.")
    group = join_group(backend)
    with group.rank_zero_first():
        return _plan(config, backend, group, folder, watch.of(group))


def _plan(config: TrainConfig, backend: str, group: Group, folder: Path | None, watch: Watch) -> Plan:
    capabilities = load_backend(backend).describe()
    precision: Precision = config.precision if config.precision != "auto" else "bf16" if capabilities.fast_bf16 else "fp32"
    _check_method(config, backend, capabilities)

    base, start = None, None
    if config.init == "auto":
        base = _plan(config.base_config(), backend, group, None, dataclasses.replace(watch, say=lambda sentence: None))
        base = dataclasses.replace(base, folder=forget_home() / "bases" / base.folder.name)
        tokenizer, model, base_peak, init = base.tokenizer, base.model, base.schedule.peak, base.run_id
    elif config.init == "scratch":
        tokenizer = _tokenizer_file(config, watch)
        vocab_size = load_vocabulary(tokenizer).vocab_size
        model = model_spec(config.model, vocab_size, config.max_seq_length or _default_context(config.model))
        base_peak, init = None, "scratch"
    else:
        start = checkpoint.find_checkpoint(Path(config.init).expanduser())
        tokenizer, model = start.tokenizer, start.model_spec()
        base_peak, init = start.state.get("peak_learning_rate"), start.state["files"][checkpoint.WEIGHTS]
        if (
            config.tokenizer is not None
            and load_vocabulary(find_tokenizer(config.tokenizer)).hash != load_vocabulary(tokenizer).hash
        ):
            raise UserError(
                f"--tokenizer {config.tokenizer} is not the tokenizer that {config.init} was trained with: leave it out."
            )
    row_length = config.max_seq_length or model.context_length
    if row_length > model.context_length:
        raise UserError(f"--max-seq-length {row_length} exceeds the model's context of {model.context_length} tokens.")

    targets, pools, replays = sources_of(config.target), sources_of(config.pretrain), _stored_replay(config)
    stores = {name: resolve_store(name, tokenizer, progress=watch.progress) for name in {**targets, **pools, **replays}}
    published = {name: _same_as_published(name, watch) for name in stores if name in CORPORA}
    if config.tokens_per_param is not None:
        num_tokens = config.tokens_per_param * num_params(model)
        config = dataclasses.replace(config, iters=math.ceil(num_tokens / (config.batch_size * row_length)), tokens_per_param=None)
    stream, windows, num_steps = _data(config, stores, row_length)
    rates = schedule(config, model, base_peak)
    data = {"target": _identity(targets, stores), "pretrain": _identity(pools, stores)}
    if replays:
        data["replay"] = _identity(replays, stores)
    identifier = run_id(config, precision=precision, learning_rate=rates.peak, data=data, init=init)
    return Plan(
        config=config,
        backend=backend,
        precision=precision,
        model=model,
        schedule=rates,
        stream=stream,
        windows=windows,
        stores=stores,
        published=published,
        tokenizer=tokenizer,
        num_steps=num_steps,
        run_id=identifier,
        folder=folder or Path("runs") / f"{identifier}-{backend}",
        base=base,
        start=start,
        group=group,
    )


def execute(plan: Plan, *, resume: bool | None = None, watch: Watch | None = None, wait: bool = False) -> dict[str, Any]:
    """Train a planned run to its end and return its record; a run that is done returns its record at once.

    Args:
        resume: True insists on a checkpoint to go on from, False refuses one, None goes on from one if it is there.
        wait: wait for another process that is training in the same folder, instead of refusing.

    Raises:
        UserError: the folder holds another run, is in use, or `resume` cannot be met.
        RunFailed: the run diverged.
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
            watch.say(f"This run is done already: {plan.folder / records.RECORD}")
            return record
        with group.rank_zero_first():
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
        if record["status"] == "diverged":
            raise RunFailed(f"The run diverged: {record['reason']}. Its record: {plan.folder / records.RECORD}")
        return record


def look_into(plan: Plan, resume: bool | None, watch: Watch) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """What a run's folder holds already: its record, or else the checkpoint to go on from; writes `config.yaml` into it."""
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
    if plan.group.rank == 0:
        _write_config(plan)
    return None, latest


def trainer_spec(plan: Plan) -> TrainerSpec:
    """What a backend needs to train a planned run."""
    return TrainerSpec(
        model=plan.model,
        optim=plan.config.optim(),
        method=plan.config.method_spec(),
        runtime=plan.config.runtime(plan.precision),
        seed=plan.config.seed,
    )


def start_trainer(plan: Plan, trainer: Trainer, watch: Watch) -> Plan:
    """Give a trainer the start weights and what its method needs; returns the plan with the rows that are replayed."""
    if plan.start is None:
        return plan
    trainer.load(plan.start.weights)
    reference = plan.config.method_spec().reference
    if reference is not None:
        trainer.set_reference(reference)
    with plan.group.rank_zero_first():
        return _with_replay(plan, trainer, watch)


def prepare_run(plan: Plan, latest: Checkpoint | None, trainer: Trainer, watch: Watch) -> RunState:
    """The state of a run whose trainer has been started; with a latest checkpoint, both go on from it."""
    config = plan.config
    evaluate = config.steps_per_eval or max(1, math.ceil(plan.num_steps / EVALUATIONS_PER_RUN))
    curve = plan.start.state["curve"] if plan.start is not None and plan.start.state["is_pretraining"] else []
    identity = {
        "run_id": plan.run_id,
        "backend": plan.backend,
        "is_pretraining": config.is_pretraining,
        "tokenizer_hash": next(iter(plan.stores.values())).tokenizer_hash,
        "base_curve": curve,
    }
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
        identity=identity,
    )
    if latest is not None:
        trainer.load(latest.weights)
        trainer.load_state(latest.training_state)
        run.resume(latest.state)
        if plan.group.rank == 0:
            _check_history(plan.folder / records.HISTORY, latest.state, watch)
        watch.say(f"Resuming at step {run.step:,} of {plan.num_steps:,}.")
    return run


def finish_run(plan: Plan, run: RunState, trainer: Trainer, *, stack_size: int = 1) -> dict[str, Any]:
    """The record of a run that has ended for good, written into its folder by rank 0."""
    record = _record(plan, run, trainer) | {"stack_size": stack_size}
    if plan.group.rank == 0:
        records.write_record(plan.folder, record)
        checkpoint.prune(plan.folder / "checkpoints")
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
        length, served = plan.stream.target.row_length, run.step * plan.stream.replay.rows_per_step
        data[f"replay:{_replay_name(config)}"] = {
            "fingerprint": plan.replay_fingerprint,
            "role": "replay",
            "unique_tokens": min(served, plan.stream.replay.num_unique or served) * length,
            "tokens_seen": served * length,
        }
    forgetting, lost = None, None
    if best["pretrain_val"] is not None and not config.is_pretraining:
        forgetting = best["pretrain_val"] - run.start["pretrain_val"]
        curve = [(point[0], point[1]) for point in run.identity["base_curve"]]
        lost = dataclasses.asdict(progress_lost(curve, run.start["pretrain_val"], best["pretrain_val"]))
    for name, same in plan.published.items():
        data[name]["same_as_published"] = same
    return {
        "schema_version": records.SCHEMA_VERSION,
        "run_id": plan.run_id,
        "science_version": SCIENCE_VERSION,
        "status": run.status,
        "reason": run.reason,
        "backend": plan.backend,
        "device": trainer.device,
        "world_size": plan.group.size,
        "precision": plan.precision,
        "method": dataclasses.asdict(config.method_spec()),
        "config": dataclasses.asdict(config),
        "versions": records.installed_versions(),
        "seed": config.seed,
        "init": "scratch" if plan.start is None else plan.start.state["run_id"],
        "num_params": num_params(plan.model),
        "num_non_embedding_params": num_non_embedding_params(plan.model),
        "num_steps": run.step,
        "learning_rate": plan.schedule.peak,
        "wall_seconds": run.elapsed_seconds,
        "tokens_per_second": run.step * run.tokens_per_step / run.elapsed_seconds if run.elapsed_seconds else None,
        "peak_memory_bytes": trainer.peak_memory_bytes(),
        "num_resumes": run.num_resumes,
        "num_skipped": run.num_skipped,
        "p": {
            "asked": config.p,
            "rows": pretrain_rows / rows if rows else 0.0,
            "tokens": tokens[1] / sum(tokens) if sum(tokens) else 0.0,
        },
        "data": data,
        "losses": {"start": run.start, "best": best, "end": run.last},
        "forgetting_nats": forgetting,
        "progress_lost": lost,
        "pretrain_curve": run.curve if config.is_pretraining else None,
        "ended_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _data(
    config: TrainConfig, stores: dict[str, TokenStore], row_length: int
) -> tuple[BatchStream, tuple[Windows, Windows, Windows | None], int]:
    """The batch stream, the three frozen window sets and the number of steps after token and epoch limits."""
    layout: Layout = config.rows  # type: ignore[assignment]

    def side(name: str | None, split: str, num_tokens: int | None = None) -> Side:
        """The rows of one source, or of several by their shares, of which each has its share of the tokens."""
        shares = sources_of(name)
        members = tuple(
            RowSubset.of_tokens(
                stores[source].split(split),
                row_length,
                None if num_tokens is None else int(num_tokens * share),
                layout=layout,
                mask_prompt=config.mask_prompt,
            )
            for source, share in shares.items()
        )
        return members[0] if len(members) == 1 else Blend(members, tuple(shares.values()))

    num_tokens = config.target_tokens
    if num_tokens is None and config.target in CORPORA and not config.is_pretraining:
        num_tokens = min(BUILTIN_TARGET_TOKENS, stores[config.target].split("train").num_tokens)
    target = side(config.target, "train", num_tokens)
    pretrain = None
    if config.pretrain is not None and not config.is_pretraining:
        pretrain = side(config.pretrain, "train")
    share, stages = _row_shares(config, target, pretrain)
    num_steps = config.iters
    if config.stop_tokens is not None:
        num_steps = min(num_steps, config.stop_tokens // (config.batch_size * row_length))
    if config.stop_epochs is not None:
        if share is None:
            raise UserError("--stop-epochs needs a constant p: give --iters instead.")
        target_rows = config.stop_epochs * target.num_rows
        num_steps = min(num_steps, int(target_rows / (config.batch_size * (1 - share))))
    if num_steps < 1:
        raise UserError("The token or epoch limit is below one step: raise it, or lower --batch-size.")
    mixture = Mixture(
        target.num_rows,
        pretrain.num_rows if pretrain else 0,
        ShareSchedule(stages, num_steps * config.batch_size) if share is None else share,
        config.seed,
        config.mixture,
        target=target.mixture_members() if isinstance(target, Blend) else (),
        pretrain=pretrain.mixture_members() if isinstance(pretrain, Blend) else (),
        pretrain_epochs=config.pretrain_epochs,
    )
    mixture.check_pool(num_steps * config.batch_size, row_length)
    stream = BatchStream(target=target, pretrain=pretrain, mixture=mixture, batch_size=config.batch_size, num_steps=num_steps)

    def validation(name: str) -> Windows:
        return Windows.of(name, side(name, "validation"), config.eval_rows)

    target_val = validation(config.target)
    if config.is_pretraining or config.pretrain == config.target:
        pretrain_val: Windows | None = target_val
    else:
        pretrain_val = None if config.pretrain is None else validation(config.pretrain)
    return stream, (Windows.of("train", target, config.eval_rows), target_val, pretrain_val), num_steps


def _title(config: TrainConfig) -> str:
    if config.is_pretraining:
        return "pretraining"
    share = f"p = {config.p}"
    return f"finetuning, {share if config.method == 'injection' else config.method}"


def _check_method(config: TrainConfig, backend: str, capabilities: Capabilities) -> None:
    method = config.method_spec()
    terms = [term for term, coefficient in enumerate(method.coefficients) if coefficient]
    lacking = [term for term in terms if term not in capabilities.terms]
    if lacking or (method.has_anchor and not capabilities.anchor) or (method.ewc and not capabilities.fisher):
        raise UserError(f"Backend {backend!r} does not have what method {config.method!r} needs.")
    row = METHODS[config.method]
    if config.is_pretraining and (method.reference is not None or row.reads_replay):
        raise UserError(f"Method {config.method!r} keeps what a start model knows, and init: scratch has none: give --init.")
    if row.reads_replay and config.replay_data == REPLAY_PRETRAIN and config.pretrain is None:
        raise UserError(
            "--replay-data pretrain replays the pretraining data, and --pretrain is none: give it, or --replay-data self."
        )
    if row.reads_replay and config.replay_data == REPLAY_ONLINE and method.ewc:
        raise UserError(
            "The Fisher information of ewc is measured before training: --replay-data online has no rows then; take self."
        )
    if row.reads_replay and config.replay_data in (REPLAY_SELF, REPLAY_ONLINE) and not capabilities.sample:
        raise UserError(f"Backend {backend!r} cannot sample: give --replay-data.")


def _replay_name(config: TrainConfig) -> str | None:
    """What replay rows come from: `self`, `online`, the name of a store of the plan, or None where the method reads none."""
    if not METHODS[config.method].reads_replay:
        return None
    return config.pretrain if config.replay_data == REPLAY_PRETRAIN else config.replay_data


def _stored_replay(config: TrainConfig) -> dict[str, Fraction]:
    """The stores that replay rows come from, with their shares; none where the model is sampled during the run."""
    name = _replay_name(config)
    return {} if name in (None, REPLAY_SELF, REPLAY_ONLINE) else sources_of(name)


def _replay_rows_per_step(config: TrainConfig) -> int:
    """Rows that the method adds to each step."""
    return 0 if config.method_spec().replay_term is None else config.replay_rows or max(1, config.batch_size // 4)


def _with_replay(plan: Plan, trainer: Trainer, watch: Watch) -> Plan:
    """The plan with the rows that its method replays; the model, which holds the start weights, is sampled here if it is to write them."""
    name, config = _replay_name(plan.config), plan.config
    if name is None:
        return plan
    assert plan.start is not None
    length = plan.stream.target.row_length
    rows_per_step = _replay_rows_per_step(config)
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
        shares = _stored_replay(config)
        for source in shares:
            note = origin_note(plan.stores[source], plan.start)
            if note is not None:
                watch.say(note)
        members = tuple(RowSubset.of_tokens(plan.stores[source].split("train"), length, None) for source in shares)
        subset = members[0] if len(members) == 1 else Blend(members, tuple(shares.values()))
        fingerprint = _identity(shares, plan.stores)
    replay = None if term is None else ReplayRows(subset, rows_per_step, term, config.seed)
    if config.method_spec().ewc:
        trainer.set_fisher(*_fisher_rows(subset))
    return dataclasses.replace(plan, stream=dataclasses.replace(plan.stream, replay=replay), replay_fingerprint=fingerprint)


def _fisher_rows(subset: Side) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    rows = np.arange(min(FISHER_ROWS, subset.num_rows), dtype=np.int64)
    tokens = np.empty((len(rows), subset.row_length + 1), np.int32)
    subset.read(rows, tokens)
    return tokens, np.ones((len(rows), subset.row_length), np.uint8)


def sources_of(name: str | None) -> dict[str, Fraction]:
    """The sources behind --target or --pretrain with their shares: one, or several as NAME=SHARE,NAME=SHARE; none of None."""
    if name is None:
        return {}
    return {name: Fraction(1)} if Path(name).expanduser().exists() else parse_sources(name)


def _identity(shares: dict[str, Fraction], stores: dict[str, TokenStore]) -> str | None:
    """What a side is for a run's name: a fingerprint, or those of several sources with their shares."""
    if len(shares) < 2:
        return next((stores[name].fingerprint for name in shares), None)
    return ",".join(f"{stores[name].fingerprint}={share}" for name, share in shares.items())


def _row_shares(config: TrainConfig, target: Side, pretrain: Side | None) -> tuple[Fraction | None, tuple[Stage, ...]]:
    """p as a share of rows: the constant one or None, and its stages.

    A share of tokens is converted by the mean number of tokens that count in a row of each side.
    """
    share, stages = constant_share(config.p), parse_stages(config.p)
    if config.p_of == "rows" or pretrain is None:
        return share, stages
    per_target, per_pretrain = (Fraction(side.num_tokens, side.num_rows) for side in (target, pretrain))

    def of_rows(p: Fraction) -> Fraction:
        return (p * per_target / (p * per_target + (1 - p) * per_pretrain)).limit_denominator(10**9)

    converted = tuple(Stage(of_rows(stage.first), of_rows(stage.last), stage.until) for stage in stages)
    return None if share is None else of_rows(share), converted


def _same_as_published(name: str, watch: Watch) -> bool:
    """Whether a built-in corpus is the published one; the answer is announced with what differs."""
    corpus = build_corpus(name)
    differences = "" if corpus.published else f" ({'; '.join(corpus.differences)})" if corpus.differences else ""
    watch.say(f"Corpus {name}: same as published: {'yes' if corpus.published else 'no'}{differences}")
    return corpus.published


def with_base(plan: Plan, watch: Watch) -> Plan:
    """The plan with its base model trained, by this process or by the one that holds its folder."""
    assert plan.base is not None
    folder = plan.base.folder
    (missing,) = plan.group.agree(records.read_record(folder) is None)
    if missing:
        watch.say(f"Training the base model first; it is kept in {folder}")
        execute(plan.base, watch=watch, wait=True)
    return dataclasses.replace(plan, base=None, start=checkpoint.open_checkpoint(folder / "checkpoints" / "last"))


def _tokenizer_file(config: TrainConfig, watch: Watch) -> Path:
    if config.tokenizer is not None:
        return find_tokenizer(config.tokenizer)
    for name in {**sources_of(config.target), **sources_of(config.pretrain)}:
        stored = tokenizer_in(Path(name).expanduser()) if name not in CORPORA else None
        if stored is not None and stored.is_file():
            return stored
    return builtin_tokenizer(config.vocab_size, progress=watch.progress)


def _default_context(model: str) -> int:
    """128 for the laptop sizes, 1,024 for the paper's."""
    return 1024 if model_spec(model, 1, 1).width >= 512 else 128


def _check_same_run(plan: Plan, found: str) -> None:
    if found == plan.run_id:
        return
    differing = ""
    stored = plan.folder / records.CONFIG
    if stored.is_file():
        before, now = read_yaml(stored), dataclasses.asdict(plan.config)
        keys = [key for key in now if before.get(key) != now[key]]
        differing = f" (differing: {', '.join(keys)})" if keys else ""
    raise UserError(f"{plan.folder} holds another run, {found}{differing}: choose another --output.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"Cannot write to {folder}: no permission.")


def _write_config(plan: Plan) -> None:
    aside = plan.folder / f".{records.CONFIG}.part"
    aside.write_text(to_yaml(plan.config), encoding="utf-8")
    os.replace(aside, plan.folder / records.CONFIG)


@contextmanager
def only_group(group: Group, folder: Path, *, wait: bool) -> Iterator[None]:
    """Make a run folder and hold it for the processes of a group: rank 0 has the lock, and the others know that it has."""
    with ExitStack() as held:
        with group.rank_zero_first():
            if group.rank == 0:
                _make_folder(folder)
                held.enter_context(_only_process(folder, wait=wait))
        yield


@contextmanager
def _only_process(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a run folder for this process; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"Another process is training in {folder}: wait for it, or choose another --output.") from None
        yield
