"""Methods against each other, from the runs of a sweep: how much of plain finetuning's forgetting each removes, and at what target loss.

Two readings, because a run that learns less also forgets less: at the run's own minimum of the target validation loss, and, of all its
evaluations whose target validation loss is within 1% of plain finetuning's minimum, at the one that has forgotten least. With a limit of
forgetting there is a third: of the evaluations under it, the one with the lowest target loss. Seeds are averaged; the spread is the
standard deviation over them.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_forget.adapters import ATTENTION
from mlx_forget.config import TrainConfig
from mlx_forget.config_keys import REFERENCE_LIVE, REPLAY_PRETRAIN, REPLAY_SELF
from mlx_forget.durable_files import write_text
from mlx_forget.errors import UserError
from mlx_forget.history import read_history
from mlx_forget.methods import METHODS
from mlx_forget.records import Run
from mlx_forget.studies.seeds import deviation_text, mean_and_sd

CSV_COLUMNS = ("method", "seed", "step", "learning_rate", "target_train_loss", "target_val_loss", "pretrain_val_loss")
TOLERANCE = 0.01
# How runs write a share of nothing.
_NOTHING = ("0", "0%", "0.0")
# Toward zero, where nobody says: not worth a word.
_DECAY = TrainConfig.weight_decay

_TEXTS = {
    "plain": "plain finetuning",
    "injection": "injection",
    "anchored-adamw": "anchored AdamW",
    "l2-sp": "L2-SP",
    "ewc": "EWC",
    "ntp-replay": "NTP replay",
    "kl-replay": "KL replay",
    "lwf": "learning without forgetting",
    "low-lr": "lower rate",
}
# What kinds of adapters are called.
ADAPTERS = {"lora": "LoRA", "dora": "DoRA", "ia3": "IA3"}
_SYMBOLS = {"lambda": "λ", "c": "c", "factor": "×"}


@dataclass(frozen=True)
class Trajectory:
    """One run: its method in words, and its evaluations in order."""

    label: str
    method: str
    seed: int
    record: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the lowest target validation loss."""
        return min(self.rows, key=lambda row: float(row["target_val_loss"]))

    def forgetting(self, row: dict[str, Any]) -> float:
        """Rise of the pretraining loss since the start, nats per token."""
        return float(row["pretrain_val_loss"] - self.rows[0]["pretrain_val_loss"])

    def least_forgetting(self, target_loss: float) -> dict[str, Any] | None:
        """Of the evaluations whose target loss is at most this, the one that has forgotten least."""
        reached = [row for row in self.rows if row["target_val_loss"] <= target_loss]
        return min(reached, key=self.forgetting) if reached else None

    def best_under(self, limit: float) -> dict[str, Any]:
        """Of the evaluations that have forgotten at most `limit` nats, which the start always has, the one with the lowest target loss."""
        return min((row for row in self.rows if self.forgetting(row) <= limit), key=lambda row: float(row["target_val_loss"]))


@dataclass(frozen=True)
class Row:
    """One method, over its seeds: means, and standard deviations over seeds (None for one seed).

    Args:
        step, target, forgetting: at the minimum of the target validation loss.
        target_excess: that minimum over plain finetuning's, as a share.
        removed: share of plain finetuning's forgetting at its minimum that is not there at this method's.
        removed_within: the same, at the evaluation within 1% of plain's minimum that has forgotten least; None where a seed has none.
        tokens_factor: tokens trained on per step over those of plain finetuning.
        limit, step_under, target_under, target_under_sd: the limit of forgetting if one was given, and where its best evaluation is.
    """

    label: str
    method: str
    seeds: list[int]
    step: float
    target: float
    target_sd: float | None
    target_excess: float
    forgetting: float
    forgetting_sd: float | None
    removed: float
    removed_sd: float | None
    removed_within: float | None
    tokens_factor: float
    limit: float | None = None
    step_under: float | None = None
    target_under: float | None = None
    target_under_sd: float | None = None


def load_trajectories(runs: Sequence[Run], seed: int | None = None) -> list[Trajectory]:
    """The finetuning runs, in the order of the table of methods.

    Raises:
        UserError: no finished finetuning runs.
    """
    found = []
    for run in runs:
        record = run.record
        if record["forgetting_nats"] is None or (seed is not None and record["seed"] != seed):
            continue
        rows = read_history(run.history).to_pylist()
        found.append(Trajectory(describe(record["config"]), _method(record["config"]), record["seed"], record, rows))
    if not found:
        raise UserError("There are no finished finetuning runs here that measured a pretraining loss.")
    # Adapters by themselves come after plain finetuning.
    names = ["plain", "lora", "dora", "ia3", *(name for name in METHODS if name != "plain")]
    found.sort(key=lambda t: (names.index(t.method), t.record["config"].get("replay_data") != REPLAY_SELF, t.label, t.seed))
    return found


def _method(config: dict[str, Any]) -> str:
    """What a run is compared as: its method, or its adapters where they are all that differs from plain finetuning."""
    kind, name = config.get("fine_tune_type", "full"), _name_of(config)
    return str(kind) if kind != "full" and name == "plain" else name


def _name_of(config: dict[str, Any]) -> str:
    """The method of a run; an injection of nothing is plain finetuning."""
    return "plain" if config["method"] == "injection" and str(config["p"]) in _NOTHING else str(config["method"])


def _adapters(config: dict[str, Any]) -> str:
    if config["fine_tune_type"] == "ia3":
        return ADAPTERS["ia3"]
    kind = ADAPTERS[config["fine_tune_type"]]
    scaling = {"alpha/r": "α/r", "alpha/sqrt(r)": "α/√r", "none": "unscaled"}[config["lora_scaling"]]
    alpha = "" if config["lora_scaling"] == "none" else f", α = {config['lora_alpha']:g}"
    modules = "" if config["lora_target_modules"] == ATTENTION else f", {config['lora_target_modules']}"
    last = f", last {config['lora_num_layers']} blocks" if config.get("lora_num_layers") else ""
    return f"{kind} r = {config['lora_rank']}{modules}{last}, {scaling}{alpha}"


def describe(config: dict[str, Any], *, with_strength: bool = True) -> str:
    """A run's method in words, with its coefficient and where its replay rows come from."""
    name = _name_of(config)
    method = METHODS[name]
    coefficient = config.get("coefficient")
    parts = [_TEXTS[name]]
    if config.get("fine_tune_type", "full") != "full":
        # Adapters are compared at rates of their own.
        rate = f", rate {config['learning_rate']:g}" if config.get("learning_rate") else ""
        parts = [f"{_adapters(config)}{rate}" + ("" if name == "plain" else f": {_TEXTS[name]}")]
    elif config.get("lora_num_layers"):
        parts.append(f"last {config['lora_num_layers']} blocks")
    if method.reads_replay and name != "ewc":
        data = config["replay_data"]
        parts.append({REPLAY_SELF: "self-generated", REPLAY_PRETRAIN: "real data"}.get(data, str(data)))
    if str(config["p"]) not in _NOTHING:
        parts.append(f"p = {config['p']}")
    if method.strength is not None and with_strength:
        value = method.default if coefficient is None else coefficient
        equals = " " if method.strength == "factor" else " = "
        parts.append(f"{_SYMBOLS[method.strength]}{equals}{value:g}")
    if method.make(0.0).decays_to_zero and config.get("weight_decay", _DECAY) != _DECAY:
        parts.append(f"decay {config['weight_decay']:g}")
    parts += [str(config[key]) for key, usual in (("optimizer", "adamw"), ("lr_schedule", None)) if config.get(key, usual) != usual]
    if config.get("reference_log_probs", REFERENCE_LIVE) != REFERENCE_LIVE:
        parts.append(f"log-probabilities {config['reference_log_probs']}")
    return ", ".join(parts)


def common_limit(trajectories: Sequence[Trajectory]) -> float | None:
    """The `max_forgetting` that every run was trained with, or None."""
    limits = {t.record["config"].get("max_forgetting") for t in trajectories}
    return limits.pop() if len(limits) == 1 else None


def table(trajectories: Sequence[Trajectory], *, max_forgetting: float | None = None) -> list[Row]:
    """One row per method; `max_forgetting` also reads each under a limit, in nats, by default the one all runs were trained with.

    Raises:
        UserError: two runs with one method and seed, or a seed without a plain run to compare with.
    """
    if len({(t.label, t.seed) for t in trajectories}) != len(trajectories):
        raise UserError("Two runs have the same method and seed: a comparison of methods needs runs that differ in nothing else.")
    # Of several plain runs, such as with other decays, the usual one.
    usual_last = sorted(trajectories, key=lambda t: t.label == _TEXTS["plain"])
    plain = {t.seed: t for t in usual_last if t.method == "plain"}
    lacking = sorted({t.seed for t in trajectories} - set(plain))
    if lacking:
        raise UserError(f"Seed {lacking[0]} has no run of method plain, with which the others are compared.")
    limit = common_limit(trajectories) if max_forgetting is None else max_forgetting
    labels = dict.fromkeys(t.label for t in trajectories)
    return [_row([t for t in trajectories if t.label == label], plain, limit) for label in labels]


def _row(group: list[Trajectory], plain: dict[int, Trajectory], limit: float | None) -> Row:
    def over_seeds(measure: Callable[[Trajectory, Trajectory], float]) -> tuple[float, float | None]:
        return mean_and_sd([measure(t, plain[t.seed]) for t in group])

    def removed_at(row: dict[str, Any], t: Trajectory, base: Trajectory) -> float:
        lost = base.forgetting(base.best)
        return 1 - t.forgetting(row) / lost if lost else math.nan

    def removed_within(t: Trajectory, base: Trajectory) -> float:
        row = t.least_forgetting((1 + TOLERANCE) * base.best["target_val_loss"])
        return math.nan if row is None else removed_at(row, t, base)

    target, target_sd = over_seeds(lambda t, base: t.best["target_val_loss"])
    forgetting, forgetting_sd = over_seeds(lambda t, base: t.forgetting(t.best))
    removed, removed_sd = over_seeds(lambda t, base: removed_at(t.best, t, base))
    within, _ = over_seeds(removed_within)
    under: dict[str, float | None] = {}
    if limit is not None:
        under["step_under"], _ = over_seeds(lambda t, base: t.best_under(limit)["step"])
        under["target_under"], under["target_under_sd"] = over_seeds(lambda t, base: t.best_under(limit)["target_val_loss"])
    return Row(
        limit=limit,
        **under,
        label=group[0].label,
        method=group[0].method,
        seeds=[t.seed for t in group],
        step=over_seeds(lambda t, base: t.best["step"])[0],
        target=target,
        target_sd=target_sd,
        target_excess=over_seeds(lambda t, base: t.best["target_val_loss"] / base.best["target_val_loss"] - 1)[0],
        forgetting=forgetting,
        forgetting_sd=forgetting_sd,
        removed=removed,
        removed_sd=removed_sd,
        removed_within=None if math.isnan(within) else within,
        tokens_factor=over_seeds(lambda t, base: _tokens_per_step(t))[0],
    )


def _tokens_per_step(trajectory: Trajectory) -> float:
    """Tokens trained on per step, replay included, over those of the task."""
    sources = trajectory.record["data"].values()
    replayed = sum(row["tokens_seen"] for row in sources if row["role"] == "replay")
    task = sum(row["tokens_seen"] for row in sources if row["role"] != "replay")
    return float(1 + replayed / max(1, task))


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The table as aligned text."""
    width, limit = max(len(row.label) for row in rows), rows[0].limit
    under = "" if limit is None else f"  {f'under {limit:g} nats':>16}  {'at':>6}"
    lines = [
        f"{'method':<{width}}  {'seeds':>5}  {'minimum at':>10}  {'target val':>16}  {'to plain':>8}  {'forgetting (nats)':>18}  "
        f"{'removed':>15}  {'removed within 1%':>17}  {'tokens':>6}{under}"
    ]
    for row in rows:
        within = "" if row.removed_within is None else f"{row.removed_within:.1%}"
        if row.target_under is not None:
            under = f"  {row.target_under:>8.4f}{deviation_text(row.target_under_sd):>8}  {row.step_under:>6,.0f}"
        lines.append(
            f"{row.label:<{width}}  {len(row.seeds):>5}  {row.step:>10,.0f}  {row.target:>8.4f}{deviation_text(row.target_sd):>8}  "
            f"{row.target_excess:>+8.2%}  {row.forgetting:>+10.4f}{deviation_text(row.forgetting_sd):>8}  "
            f"{row.removed:>8.1%}{'' if row.removed_sd is None else f'±{row.removed_sd:.1%}':>7}  {within:>17}  {row.tokens_factor:>5.2f}x{under}"
        )
    lines.append(
        "Read at the minimum of each run's target validation loss. removed: share of plain finetuning's forgetting. removed within 1%: the "
        "same at the evaluation that has forgotten least of those within 1% of plain's minimum. ± is the standard deviation over seeds."
    )
    if limit is not None:
        chosen = min(rows, key=lambda row: math.inf if row.target_under is None else row.target_under)
        lines.append(
            f"under {limit:g} nats: the lowest target validation loss of the evaluations that have forgotten at most that. "
            f"Lowest of all: {chosen.label}, {chosen.target_under:.4f}."
        )
    return lines


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table as plain values."""
    return [asdict(row) for row in rows]


def write_csv(trajectories: Sequence[Trajectory], path: Path) -> None:
    """Every evaluation of every run, columns `CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for t in trajectories:
        for row in t.rows:
            writer.writerow([t.label, t.seed, *(row[column] for column in CSV_COLUMNS[2:])])
    write_text(path, text.getvalue())
