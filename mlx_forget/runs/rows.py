"""A run's record as one flat row: the columns of the laws, what was read, what shaped the run, and where it comes from.

Numbers are nats per token, tokens, seconds and bytes. The keys of the run's configuration are columns of the same name, except where the
record knows better (the rate that was resolved, the share that was served); those of its base model are `base_KEY`.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_forget.records import SCHEMA_VERSION

Row = dict[str, Any]

# Columns that a law may read, and those by which runs are grouped for one. `loss` is the pretraining loss, `L_ft` the target loss.
LAW_COLUMNS = ("N", "D", "p", "r", "R", "P", "steps", "L0", "L_ft", "loss", "run", "base", "method", "domain", "backend", "seed")
# What marks a table as made of our records: `forget runs export` writes it, and a reader then treats its rows as it treats run folders.
MARK = "record_schema"
# What the laws of forgetting describe: pretraining rows mixed in, or none, and nothing else that keeps the model where it was.
METHODS_OF_THE_LAWS = ("plain", "injection")
DAMAGED = "damaged or not of this tool"
TEXTS = ("run", "base", "method", "domain", "backend", "status")
NUMBERS = (
    *("N", "D", "p", "r", "R", "P", "steps", "L0", "L_ft", "loss", "seed", "forgetting_nats", "forgetting_ce", "forgetting_kl"),
    *("num_steps", "tokens_seen", "loss_fraction_lost", "token_equivalent_lost", "max_forgetting"),
)


def record_row(record: Mapping[str, Any]) -> Row:
    """The row of a record: what is read is read at the lowest target validation loss; p is the share of tokens that was served.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is no record of this tool.
    """
    sources: Mapping[str, Mapping[str, Any]] = record["data"]
    target = {name: source for name, source in sources.items() if source["role"] == "target"}
    replayed = [source for source in sources.values() if source["role"] in ("pretrain", "replay")]
    seen = _total(sources.values(), "tokens_seen")
    share = _total(replayed, "tokens_seen") / seen if seen else None
    best, start, end = record["losses"]["best"], record["losses"].get("start") or {}, record["losses"].get("end") or {}
    config: Mapping[str, Any] = record.get("config") or {}
    lost, asked = record.get("progress_lost") or {}, record.get("p") or {}
    row: Row = {
        "N": record["num_params"],
        "D": _total(target.values(), "unique_tokens") or None,
        "p": share,
        "r": share,
        "R": None if share is None else 1 - share,
        "P": record.get("num_trainable_params", record["num_params"]),
        "steps": best["step"],
        "L0": start.get("pretrain_val"),
        "L_ft": best["target_val"],
        "loss": best["pretrain_val"],
        "run": record["run_id"],
        "base": record.get("init"),
        "method": (record.get("method") or {}).get("name") or config.get("method", "injection"),
        "domain": "+".join(sorted(target)),
        "backend": record.get("backend"),
        "seed": record.get("seed"),
        "status": record["status"],
        "reason": record.get("reason"),
        "stopped_by": record.get("stopped_by"),
        "forgetting_nats": record.get("forgetting_nats"),
        "loss_fraction_lost": lost.get("loss_fraction"),
        "token_equivalent_lost": lost.get("token_equivalent"),
        "target_train": best.get("target_train"),
        "target_val_start": start.get("target_val"),
        "target_val_end": end.get("target_val"),
        "pretrain_val_end": end.get("pretrain_val"),
        "forgetting_ce": best.get("forgetting_ce"),
        "forgetting_kl": best.get("forgetting_kl"),
        "p_asked": asked.get("asked", config.get("p")),
        "p_rows": asked.get("rows"),
        "num_steps": record.get("num_steps"),
        "tokens_seen": seen,
        "num_non_embedding_params": record.get("num_non_embedding_params"),
        "learning_rate": record.get("learning_rate"),
        "learning_rate_asked": config.get("learning_rate"),
        "device": record.get("device"),
        "precision": record.get("precision"),
        "world_size": record.get("world_size", 1),
        "stack_size": record.get("stack_size", 1),
        "wall_seconds": record.get("wall_seconds"),
        "tokens_per_second": record.get("tokens_per_second"),
        "peak_memory_bytes": record.get("peak_memory_bytes"),
        "num_resumes": record.get("num_resumes"),
        "ended_at": record.get("ended_at"),
        "versions": ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items()),
        "fingerprints": ", ".join(f"{name} {source.get('fingerprint')}" for name, source in sources.items()),
        "science_version": record.get("science_version"),
        MARK: record["schema_version"],
    }
    published = [source["same_as_published"] for source in sources.values() if "same_as_published" in source]
    row["same_as_published"] = all(published) if published else None
    for key, value in config.items():
        if isinstance(value, Mapping):
            row |= {f"{key}_{name}": _cell(inner) for name, inner in value.items() if f"{key}_{name}" not in row}
        elif key not in row:
            row[key] = _cell(value)
    _check_kinds(row)
    return row


def _check_kinds(row: Row) -> None:
    """Records that were never sealed may say anything.

    Raises:
        TypeError: text where a number belongs, or the reverse.
    """
    for names, kinds in ((TEXTS, (str,)), (NUMBERS, (int, float))):
        for name in names:
            if row.get(name) is not None and not isinstance(row[name], kinds):
                raise TypeError(name)
    if None in (row["run"], row["status"], row["method"]):
        raise TypeError


def read_content(record: object) -> Row | str:
    """The row of what a record file holds, or why there is none, as a phrase that follows a number."""
    try:
        version = record["schema_version"]  # type: ignore[index]
    except (KeyError, TypeError):
        return DAMAGED
    if version != SCHEMA_VERSION:
        return f"of record schema {version}, where this release reads {SCHEMA_VERSION}"
    try:
        return record_row(record)  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError, ValueError):
        return DAMAGED


def fitted_row(row: Mapping[str, Any], *, response: str, adapters: bool = True) -> Row | str:
    """The row as a law reads it, or why it cannot be fitted, as a phrase that follows a number.

    Args:
        response: what `loss` is: "pretraining", "target", "forgetting" (cross-entropy to the start model), or "loss" for laws of
            pretraining from scratch.
        adapters: whether the law describes runs that trained adapters.
    """
    if row["status"] not in ("finished", "stopped"):
        return str(row["status"])
    if row["base"] == "scratch" and response != "loss":
        return "pretrained from scratch, where nothing could be forgotten"
    if not adapters and (kind := row.get("fine_tune_type") or "full") != "full":
        return f"trained with {kind}, which this law does not describe"
    if not adapters and row.get("P") and row.get("N") and row["P"] < row["N"]:
        return "trained in their last blocks alone, which this law does not describe"
    made = dict(row)
    if response == "forgetting":
        if row.get("forgetting_ce") is None:
            return "that were not compared with their start model (--compare-to-start)"
        made["loss"] = row["forgetting_ce"]
    if response == "target":
        made |= {"loss": row["L_ft"], "r": row["R"]}
    missing = [name for name in ("N", "D", "loss", *(["L0"] if response == "pretraining" else [])) if made[name] is None]
    return f"without {' and '.join(missing)}" if missing else made


def fitted_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], *, response: str, adapters: bool = True
) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows that a law can be fitted to, and the sources of the others by reason.

    A run that occurs twice counts once. A run that starts from a finetune among the rows, as a later stage does, is left out: the laws are
    of finetunes of a pretrained model. Runs of other methods are left out unless there is nothing else: by themselves they are a study of
    that method; among others they would pass as runs without it.

    Args:
        rows: (source, row) pairs in order.
    """
    made, source_of, left_out = dict[tuple[Any, Any], Row](), dict[tuple[Any, Any], str](), dict[str, list[str]]()
    rows = list(rows)
    finetunes = {row["run"] for _, row in rows if row["base"] not in (None, "scratch")}
    for source, row in rows:
        found = fitted_row(row, response=response, adapters=adapters)
        if not isinstance(found, str) and row["base"] in finetunes:
            found = "that started from a finetune, not from a pretrained model,"
        key = (row["run"], row["backend"])
        if not isinstance(found, str) and key not in made:
            made[key], source_of[key] = found, source
        else:
            left_out.setdefault(found if isinstance(found, str) else "copied from another folder", []).append(source)
    described = {key for key, row in made.items() if row["method"] in METHODS_OF_THE_LAWS}
    if described:
        for key in [key for key in made if key not in described]:
            left_out.setdefault(f"trained with {made.pop(key)['method']}, which is not injection,", []).append(source_of[key])
    return list(made.values()), left_out


def _cell(value: Any) -> Any:
    """A value as one cell of a table holds it."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _total(sources: Iterable[Mapping[str, Any]], key: str) -> float:
    return float(sum(source.get(key) or 0 for source in sources))
