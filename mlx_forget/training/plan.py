"""From a configuration to everything that a run is: model, data, schedule, steps, name and folder; nothing is trained yet."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_forget import checkpoint, costs
from mlx_forget.adapters import num_trainable
from mlx_forget.backends import choose_backend, join_group, load_backend
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.config import TrainConfig
from mlx_forget.config_keys import EVALUATIONS_PER_RUN, REFERENCE_LIVE, REPLAY_SELF
from mlx_forget.distributed import ALONE, Group
from mlx_forget.errors import UserError
from mlx_forget.evaluate import Windows
from mlx_forget.fuse import whole_checkpoint
from mlx_forget.ladder import (
    ModelSpec,
    default_context,
    default_row_length,
    linear_shapes,
    model_spec,
    num_non_embedding_params,
    num_params,
    train_flops_per_token,
)
from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pipeline.catalog import builtin_tokenizer, resolve_store
from mlx_forget.pipeline.corpora import CORPORA, build_corpus, forget_home
from mlx_forget.pipeline.opened import Opened
from mlx_forget.pipeline.reference_rows import row_bytes
from mlx_forget.pipeline.rows import PADDED, Rows
from mlx_forget.pipeline.store import TokenStore
from mlx_forget.pipeline.vocabularies import find_tokenizer, tokenizer_in
from mlx_forget.pretrained import LEARNING_RATE, PretrainedSpec
from mlx_forget.schedule import Schedule
from mlx_forget.trainer import Precision
from mlx_forget.training.checks import check_method, check_model
from mlx_forget.training.data import (
    identity_of,
    replay_name,
    replay_rows_per_step,
    run_data,
    sampled_tokens,
    sources_of,
    stored_replay,
)
from mlx_forget.training.identity import run_id
from mlx_forget.training.learning_rates import schedule
from mlx_forget.training.start import differences, find_start, fit_to_start
from mlx_forget.training.tracking import check_sink
from mlx_forget.training.watch import Watch


@dataclass(frozen=True)
class Plan:
    """A run that can start: everything is resolved and checked.

    Args:
        base: the plan of the base model that `init: auto` stands for, or None.
        start: the checkpoint to start from, or None: from scratch, or from `base` once that is trained.
        published: whether each built-in corpus is the one that published numbers were measured on.
        replay_fingerprint: of the store that replay rows come from, once it is there.
        group: the processes that train this run together.
        micro_batch_size: rows per forward pass: as asked, or as many as the memory holds; None is all of a step.
        num_devices: that it is planned for.
        on_cpu: whether these are CPUs.
    """

    config: TrainConfig
    backend: str
    precision: Precision
    model: ModelSpec | PretrainedSpec
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
    micro_batch_size: int | None = None
    num_devices: int = 1
    on_cpu: bool = False

    def step(self, num_devices: int | None = None) -> costs.Step:
        """A training step on one of so many devices, by default of those that it is planned for."""
        row_length = self.stream.target.row_length
        return _step(self.config, self.model, self.precision, row_length, num_devices or self.num_devices, on_cpu=self.on_cpu)

    def flops(self) -> float:
        """Of all steps and evaluations; of the base model too, where that is still to be trained."""
        evaluate = self.config.steps_per_eval or max(1, math.ceil(self.num_steps / EVALUATIONS_PER_RUN))
        per_window = train_flops_per_token(self.model) * self.stream.target.row_length / 3
        windows = {id(own): len(own.tokens) for own in self.windows if own is not None}
        evaluations = (math.ceil(self.num_steps / evaluate) + 1) * sum(windows.values()) * per_window
        return self.num_steps * self.step(1).flops + evaluations + (0 if self.base is None else self.base.flops())

    @property
    def _attended(self) -> int | None:
        """Tokens that attention runs over where that is not the model's context."""
        return self.stream.target.row_length if isinstance(self.model, PretrainedSpec) else None

    @property
    def num_trainable_params(self) -> int:
        """Parameters that the run changes: all, those of its last blocks, or those of its adapters."""
        return sum(math.prod(shape) for shape in self.step().trained.values())

    def summary(self) -> dict[str, Any]:
        """What the run will be and cost."""
        tokens = self.num_steps * self.stream.batch_size * self.stream.target.row_length
        return {
            "run_id": self.run_id,
            "folder": str(self.folder),
            "backend": self.backend,
            "precision": self.precision,
            "model": self.model.summary() if isinstance(self.model, PretrainedSpec) else dataclasses.asdict(self.model),
            "num_params": num_params(self.model),
            "num_trainable_params": self.num_trainable_params,
            "num_non_embedding_params": num_non_embedding_params(self.model),
            "num_steps": self.num_steps,
            "num_tokens": tokens,
            "num_pretrain_tokens": self.stream.tokens_before(self.num_steps)[1],
            "method": self.config.method,
            "num_replay_tokens": self.num_steps * replay_rows_per_step(self.config) * self.stream.target.row_length,
            "kept_log_prob_bytes": self._kept_log_prob_bytes(),
            "unique_target_tokens": self.stream.target.num_tokens,
            "learning_rate": self.schedule.peak,
            "train_flops": tokens * train_flops_per_token(self.model, self._attended),
            **costs.summary(self.step(), load_backend(self.backend).kept_bytes, rows=self.micro_batch_size),
            "base": None if self.base is None else self.base.summary(),
        }

    def _kept_log_prob_bytes(self) -> int:
        """What the log-probabilities of the reference take beside the replay stores; 0 where they are computed live."""
        config, length = self.config, self.stream.target.row_length
        if config.reference_log_probs == REFERENCE_LIVE:
            return 0
        num_rows = 0
        for name in stored_replay(config):
            rows = self.stores[name].split("train").num_rows(length)
            num_rows += min(rows, config.replay_limits.get(name, rows * length) // length)
        if replay_name(config) == REPLAY_SELF:
            num_rows = -(-sampled_tokens(config, self.num_steps, length) // length)
        return num_rows * row_bytes(config.reference_log_probs, length, self.model.vocab_size)


@dataclass(frozen=True)
class Target:
    """The devices that a run is planned for.

    Args:
        device: one by its data sheet; None is what this machine has.
        num_devices: None is one for each process of this run.
        must_fit: refuse a model of which not one row fits.
    """

    device: costs.Device | None = None
    num_devices: int | None = None
    must_fit: bool = True


HERE = Target()


def plan_run(
    config: TrainConfig,
    *,
    folder: Path | str | None = None,
    watch: Watch | None = None,
    target: Target = HERE,
    opened: Opened | None = None,
) -> Plan:
    """Resolve and check a run. Corpora and files are tokenised here if they are not yet; nothing is trained.

    Where a launcher started several processes, they join here, and rank 0 prepares the data before the others look.

    Args:
        opened: stores, tokenizers and start models that plans made at the same time share.

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
        plan = _plan(config, backend, group, None if folder is None else Path(folder), watch.of(group), target, opened or Opened())
    return _with_one_micro_batch(plan)


def _with_one_micro_batch(plan: Plan) -> Plan:
    """The plan with the rows per forward pass that fit on every process: those that share a model take every pass together."""
    if plan.group.size == 1:
        return plan
    rows = plan.step().rows
    smallest = plan.group.smallest(plan.micro_batch_size or rows)
    base = None if plan.base is None else _with_one_micro_batch(plan.base)
    asked = plan.config.micro_batch_size
    return dataclasses.replace(plan, micro_batch_size=asked or (None if smallest == rows else smallest), base=base)


def _plan(
    config: TrainConfig, backend: str, group: Group, folder: Path | None, watch: Watch, where: Target, opened: Opened
) -> Plan:
    capabilities = load_backend(backend).describe()
    fast_bf16 = capabilities.fast_bf16 or where.device is not None
    precision: Precision = config.precision if config.precision != "auto" else "bf16" if fast_bf16 else "fp32"
    num_devices = where.num_devices or group.size
    check_method(config, backend, capabilities)
    check_sink(config.log_to)

    base, start, default_rate = None, None, None
    if config.init == "scratch" and config.start_name is not None:
        model_spec(config.model, 1, 1)
    if config.start_name is None and config.init == "auto":
        base = _plan(
            config.base_config(), backend, group, None, dataclasses.replace(watch, say=lambda sentence: None), where, opened
        )
        base = dataclasses.replace(base, folder=forget_home() / "bases" / base.folder.name)
        tokenizer, model, base_peak, init = base.tokenizer, base.model, base.schedule.peak, base.run_id
    elif config.init == "scratch":
        tokenizer = _tokenizer_file(config, watch)
        vocab_size = opened.vocabulary(tokenizer).vocab_size
        model = model_spec(config.model, vocab_size, config.max_seq_length or default_context(config.model))
        base_peak, init = None, "scratch"
    else:
        named = ("start", config.start_name, config.init, config.trust_remote_code)
        start, model = opened.once(named, lambda: _start(config, watch))
        tokenizer = start.tokenizer
        default_rate = None if start.is_own else LEARNING_RATE
        config = fit_to_start(config, start, model, capabilities, opened.vocabulary(tokenizer), watch)
        base_peak, init = start.state.get("peak_learning_rate"), start.state["files"][checkpoint.WEIGHTS]
        own = opened.vocabulary(tokenizer)
        if config.tokenizer is not None and opened.vocabulary(find_tokenizer(config.tokenizer)).hash != own.hash:
            raise UserError(
                f"--tokenizer {config.tokenizer} is not the tokenizer that {config.start_name} was trained with: leave it out."
            )
    check_model(config, model)
    if (adapter := config.adapter()) is not None:
        num_trainable(linear_shapes(model), adapter)
    row_length = config.max_seq_length or default_row_length(model)
    if row_length > model.context_length:
        raise UserError(f"--max-seq-length {row_length} exceeds the model's context of {model.context_length} tokens.")

    on_cpu = where.device is None and (config.device == "cpu" or not capabilities.accelerator)
    step = _step(config, model, precision, row_length, num_devices, on_cpu=on_cpu)
    micro_batch_size = _rows_that_fit(config, step, backend, where)
    targets, pools, replays = sources_of(config.target), sources_of(config.pretrain), stored_replay(config)
    stores = {
        name: resolve_store(name, tokenizer, progress=watch.progress, opened=opened) for name in {**targets, **pools, **replays}
    }
    if start is not None:
        vocabulary = opened.vocabulary(tokenizer)
        for sentence in (said for name, store in stores.items() for said in differences(name, store, vocabulary, opened)):
            watch.say(sentence)
    published = {name: _same_as_published(name, watch) for name in stores if name in CORPORA}
    if config.tokens_per_param is not None:
        num_tokens = config.tokens_per_param * num_params(model)
        config = dataclasses.replace(config, iters=math.ceil(num_tokens / (config.batch_size * row_length)), tokens_per_param=None)
    if config.beta2_half_life_tokens is not None:
        # The decay of one step, so that what counts of a gradient halves after so many tokens (Marek et al. 2025).
        beta2 = 0.5 ** (config.batch_size * row_length / config.beta2_half_life_tokens)
        config = dataclasses.replace(config, beta2=beta2, beta2_half_life_tokens=None)
    stream, windows, num_steps = run_data(config, stores, row_length)
    if config.rows in PADDED:
        for name in targets | pools:
            split = stores[name].split("train")
            if num_long := Rows(split, row_length, config.rows).num_long:  # type: ignore[arg-type]
                say_long = f"{num_long:,} of {split.num_documents:,} documents are longer than a row of {row_length} tokens"
                watch.say(f"{name}: {say_long} and {PADDED[config.rows]} (--rows {', '.join(PADDED)}).")
    if config.compare_to_start and windows[2] is not None and windows[2].segment is not None:
        raise UserError("--compare-to-start reads rows without document masks: give --rows packed or padded.")
    rates = schedule(config, model, base_peak, default_peak_rate=default_rate)
    data = {"target": identity_of(targets, stores), "pretrain": identity_of(pools, stores)}
    if replays:
        data["replay"] = identity_of(replays, stores)
    for name in config.replay_limits:
        if name not in replays:
            raise UserError(
                f"replay_limits names {name}, which is no source of replay_data ({', '.join(replays) or config.replay_data})."
            )
    if config.replay_limits:
        data["replay_limits"] = ",".join(str(config.replay_limits.get(name, "all")) for name in replays)
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
        micro_batch_size=micro_batch_size,
        num_devices=num_devices,
        on_cpu=on_cpu,
    )


def _start(config: TrainConfig, watch: Watch) -> tuple[Checkpoint, ModelSpec | PretrainedSpec]:
    """The start weights, whole, and the shape of their model; on which base another tool's adapters are taken is said."""
    found = find_start(config)
    start = whole_checkpoint(found)
    if start is not found and not found.is_own:
        watch.say(f"{found.folder} holds adapters, which are taken on {start.state['fused_from']['base']['folder']}.")
    return start, start.model_spec()


def _step(
    config: TrainConfig, model: ModelSpec | PretrainedSpec, precision: Precision, row_length: int, num_devices: int, *, on_cpu: bool
) -> costs.Step:
    replayed = replay_rows_per_step(config)
    method = config.method_spec()
    kl_rows = config.batch_size if method.kl_on_task else replayed if method.has_kl else 0
    return costs.Step(
        model=model,
        optim=config.optim(),
        method=method,
        precision=precision,
        rows=math.ceil((config.batch_size + replayed) / num_devices),
        row_length=row_length,
        grad_checkpoint=config.grad_checkpoint,
        num_shards=num_devices if config.shard else 1,
        num_devices=num_devices,
        kl_rows=math.ceil(kl_rows / num_devices),
        adapter=config.adapter(),
        num_layers=config.trained_layers,
        on_cpu=on_cpu,
    )


def _rows_that_fit(config: TrainConfig, step: costs.Step, backend: str, where: Target) -> int | None:
    """Rows per forward pass: as asked, or as many as the memory holds; None where that is all of a step.

    Raises:
        UserError: not one row fits, or processes are asked to share weights that cannot.
    """
    trainer = load_backend(backend)
    if config.shard and not trainer.describe().shard:
        raise UserError(f"Backend {backend!r} cannot share weights among processes: leave --shard out.")
    available: float | None
    if where.device is not None:
        available, name = where.device.memory_bytes, where.device.name
    else:
        own = None if config.device == "cpu" else trainer.memory_bytes()
        available, name = (own, "the device") if own is not None else (costs.host_memory_bytes(), "this machine")
    if where.must_fit:
        costs.refuse_what_cannot_fit(step, trainer.kept_bytes, available, name)
    if config.micro_batch_size is not None or available is None:
        return config.micro_batch_size
    fitting = costs.fitting_rows(step, trainer.kept_bytes, available)
    return None if fitting == step.rows else fitting


def _same_as_published(name: str, watch: Watch) -> bool:
    """Whether a built-in corpus is the published one; the answer is announced with what differs."""
    corpus = build_corpus(name)
    differences = "" if corpus.published else f" ({'; '.join(corpus.differences)})" if corpus.differences else ""
    watch.say(f"Corpus {name}: same as published: {'yes' if corpus.published else 'no'}{differences}")
    return corpus.published


def _tokenizer_file(config: TrainConfig, watch: Watch) -> Path:
    if config.tokenizer is not None:
        return find_tokenizer(config.tokenizer)
    for name in {**sources_of(config.target), **sources_of(config.pretrain)}:
        stored = tokenizer_in(Path(name).expanduser()) if name not in CORPORA else None
        if stored is not None and stored.is_file():
            return stored
    return builtin_tokenizer(config.vocab_size, progress=watch.progress)
