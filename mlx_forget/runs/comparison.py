"""Runs side by side: what they were told differently, what they lost, and how surely they differ."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.errors import UserError
from mlx_forget.evaluate import Estimate, paired_difference
from mlx_forget.history import read_history
from mlx_forget.records import HISTORY, RECORD, Run, read_record

# What a record says about how a run was made, besides its configuration.
_PROVENANCE = (
    "backend",
    "device",
    "precision",
    "init",
    "num_params",
    "learning_rate",
    "world_size",
    "stack_size",
    "science_version",
)
_MISSING = "-"


@dataclass(frozen=True)
class Comparison:
    """Runs beside the first of them.

    Args:
        runs: at least two.
        differences: {key: value of each run} of everything that they were told or made with differently.
        paired: each run's losses at its minimum less those of the first run at its own, {target_val | pretrain_val: estimate} with standard
            errors over windows; None where their windows are not the same, and for the first run.
    """

    runs: list[Run]
    differences: dict[str, list[Any]]
    paired: list[dict[str, Estimate] | None]


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare finished runs.

    Raises:
        UserError: fewer than two, or one of them is not a finished run.
    """
    if len(folders) < 2:
        raise UserError("Give two runs or more to compare.")
    runs = [Run(folder, finished(folder)) for folder in folders]
    made = [_described(run.record) for run in runs]
    keys = dict.fromkeys(key for one in made for key in one)
    values = {key: [one.get(key, _MISSING) for one in made] for key in keys}
    differences = {key: found for key, found in values.items() if len({repr(value) for value in found}) > 1}
    return Comparison(runs, differences, [None, *(_paired(run, runs[0]) for run in runs[1:])])


def finished(folder: Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
        UserError: the run has not ended, or there is none.
    """
    record = read_record(folder)
    if record is None:
        begun = " It was begun: resume it with forget train." if (folder / HISTORY).exists() else ""
        raise UserError(f"{folder} holds no finished run (no {RECORD}).{begun}")
    return record


def _described(record: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(record.get("config") or {})
    for key in [key for key, value in config.items() if isinstance(value, Mapping)]:
        config |= {f"{key}.{name}": value for name, value in config.pop(key).items()}
    made = {key: record.get(key, _MISSING) for key in _PROVENANCE}
    made |= {f"version of {name}": version for name, version in (record.get("versions") or {}).items()}
    made |= {f"fingerprint of {name}": source.get("fingerprint") for name, source in record["data"].items()}
    # The configuration may leave to be resolved what the record resolves.
    return {**{key: value for key, value in config.items() if key not in made}, **made}


def _paired(run: Run, first: Run) -> dict[str, Estimate] | None:
    after, before = _windows(run), _windows(first)
    if after is None or before is None:
        return None
    sides = {"target_val": "target", "pretrain_val": "pretrain"}
    same = [name for name in after if name in before and _read_on(run.record, sides[name]) == _read_on(first.record, sides[name])]
    return {name: paired_difference(after[name], before[name]) for name in same}


def _windows(run: Run) -> dict[str, np.ndarray] | None:
    """Per-window losses at the minimum, [num_windows] each; None where the history has them not."""
    step = run.record["losses"]["best"]["step"]
    row = (
        next((row for row in read_history(run.history).to_pylist() if row["step"] == step), None) if run.history.exists() else None
    )
    if row is None:
        return None
    return {name: np.array(row[f"{name}_windows"]) for name in ("target_val", "pretrain_val") if row[f"{name}_windows"]}


def _read_on(record: Mapping[str, Any], role: str) -> tuple[Any, ...]:
    """What decides which windows a loss is read on."""
    data = sorted(source.get("fingerprint") or "" for source in record["data"].values() if source["role"] == role)
    config = record.get("config") or {}
    return (data, *(config.get(key) for key in ("eval_rows", "max_seq_length", "rows", "mask_prompt")))


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        "runs": [
            {
                "folder": str(run.folder),
                "run_id": run.record["run_id"],
                "status": run.record["status"],
                "losses": run.record["losses"],
                "forgetting_nats": run.record["forgetting_nats"],
                "progress_lost": run.record["progress_lost"],
                "less_first": None
                if paired is None
                else {name: {"mean": one.mean, "stderr": one.stderr} for name, one in paired.items()},
            }
            for run, paired in zip(comparison.runs, comparison.paired, strict=True)
        ],
        "differences": comparison.differences,
    }


def lines(comparison: Comparison) -> list[str]:
    """The comparison as aligned text: a column per run."""
    runs = comparison.runs
    rows: list[tuple[str, list[str]]] = [("run", [run.record["run_id"] for run in runs]), ("", [])]
    rows += [(key, [_shown(value) for value in values]) for key, values in comparison.differences.items()]
    if not comparison.differences:
        rows.append(("(made alike in every key)", []))
    rows.append(("", []))
    rows.append(("status", [run.record["status"] for run in runs]))
    for name, text in (("start", "at the start"), ("best", "at the minimum of the target loss"), ("end", "at the end")):
        losses = [run.record["losses"][name] for run in runs]
        rows.append((text, []))
        rows.append(("  step", [f"{one['step']:,}" for one in losses]))
        for key, label in (("target_train", "target train"), ("target_val", "target validation"), ("pretrain_val", "pretraining")):
            rows.append((f"  {label}", [_nats(one[key]) for one in losses]))
    rows.append(("forgetting (nats)", [_nats(run.record["forgetting_nats"], "+") for run in runs]))
    for name, label in (("target_val", "target validation less the first's"), ("pretrain_val", "pretraining less the first's")):
        values = ["" if paired is None or name not in paired else _estimate(paired[name]) for paired in comparison.paired]
        if any(values):
            rows.append((label, values))
    label_width = max(len(label) for label, _ in rows)
    widths = [max(len(values[i]) for _, values in rows if values) for i in range(len(runs))]
    return [
        f"{label:<{label_width}}  " * bool(label or values)
        + "  ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=False))
        for label, values in rows
    ]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:11]}..{text[-11:]}"


def _nats(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4f}"


def _estimate(one: Estimate) -> str:
    return f"{one.mean:+.4f}" + ("" if math.isnan(one.stderr) else f"±{one.stderr:.4f}")
