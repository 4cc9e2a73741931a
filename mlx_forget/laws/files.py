"""fit.json: a fit as a file that predicts again, and says how it was made. The draws lie beside it."""

import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_forget.durable_files import read_object, replacing, sha256_of, write_text
from mlx_forget.errors import UserError
from mlx_forget.laws.bootstrap import Widening
from mlx_forget.laws.fitted import Fit
from mlx_forget.laws.forms import Law, get_law
from mlx_forget.laws.predictor import Predictor, reasons_of
from mlx_forget.laws.profiles import Interval
from mlx_forget.laws.uncertainty import Uncertainty
from mlx_forget.npy_files import array_of

# What the draws of a fit unpack to is some megabytes.
_MOST_DRAWS_BYTES = 1 << 30
SCHEMA_VERSION = 1


def interval_json(interval: Interval) -> dict[str, Any]:
    return {
        "value": interval.value,
        "low": _finite(interval.low),
        "high": _finite(interval.high),
        **({"reason": interval.reason} if interval.reason else {}),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _one(uncertainty: Uncertainty, group: str) -> dict[str, Any]:
    """What is said of one fit, or of one group of a joint fit."""
    fit, draws = uncertainty.fit, uncertainty.draws
    suffix = f"[{group}]" if group else ""
    params = {
        name.removesuffix(suffix): interval_json(interval)
        for name, interval in uncertainty.params.items()
        if "[" not in name or name.endswith(suffix)
    }
    predictor = Predictor.from_uncertainty(uncertainty, group)
    rows = np.ones(fit.num_rows, bool) if fit.group is None else fit.group == fit.model.groups.index(group)
    error = np.abs(fit.predicted / fit.table.columns["loss"] - 1)[rows]
    clusters = uncertainty.clusters
    return {
        "objective": fit.value,
        "num_rows": int(rows.sum()),
        "clusters": {"level": clusters.level, "num": len(np.unique(clusters.index[rows]))},
        "status": fit.certificate.status,
        "reason": fit.certificate.reason,
        "params": params,
        "data_range": {name: list(ends) for name, ends in predictor.data_range.items()},
        "mre": float(np.mean(error)),
        "noise_nats": _finite(fit.noise_nats),
        "bootstrap": {
            "num_resamples": 0 if draws is None else len(draws.u),
            "mre": None if draws is None else _finite(draws.out_of_bag_mre),
            "share_converged": None if draws is None else draws.share_converged,
        },
        "intervals": {
            "method": uncertainty.method,
            "level": uncertainty.level,
            "widen": predictor.widening.at(0.95),
            "inflation": predictor.widening.inflation,
            "degrees_of_freedom": _finite(predictor.widening.degrees),
        },
        "certificate": {
            "num_starts": fit.certificate.num_starts,
            "num_agree": fit.certificate.num_agree,
            "excess": fit.certificate.excess,
            "gradient_norm": fit.certificate.gradient_norm,
            "at_bounds": list(fit.certificate.at_bounds),
        },
        "flags": [
            {
                "kind": flag.kind,
                "parameters": list(flag.parameters),
                "words": flag.words,
                "remedy": flag.remedy,
            }
            for flag in fit.flags
        ],
        "warnings": list(uncertainty.warnings),
    }


def fit_json(
    fits: Mapping[str, Uncertainty], *, by: str | None = None, extrapolation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of fit.json.

    Args:
        fits: one entry named "" for an ordinary fit, or one per group; the groups of a joint fit share one value.
        by: the column of the groups.
        extrapolation: {train_on, num_test, mre, max}, or None.
    """
    first = next(iter(fits.values()))
    fit: Fit = first.fit
    described = {group: _one(uncertainty, group) for group, uncertainty in fits.items()}
    joint = fit.group is not None
    head: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "law": fit.law.name,
        "formula": fit.law.formula,
        "loss": fit.objective.name,
        "link": fit.objective.link,
        "delta": _finite(fit.objective.delta),
        "reduction": "sum",
        "fixed": dict(fit.constraints.fixed),
        "tied": dict(fit.constraints.tied),
        "shared": list(fit.constraints.shared),
        "by": by,
        "columns": list(fit.law.columns),
        "extrapolation": None if extrapolation is None else dict(extrapolation),
    }
    if set(described) == {""}:
        return {**head, **described[""], "groups": {}}
    statuses = [entry["status"] for entry in described.values()]
    worst = next((status for status in statuses if status != "converged"), "converged")
    shared = {name: entry for name, entry in described[next(iter(described))]["params"].items() if name in fit.constraints.shared}
    rows = sum(entry["num_rows"] for entry in described.values())
    ranges: dict[str, list[float]] = {}
    for entry in described.values():
        for name, (low, high) in entry["data_range"].items():
            old = ranges.get(name, [low, high])
            ranges[name] = [min(low, old[0]), max(high, old[1])]
    bootstrapped = [entry["bootstrap"] for entry in described.values()]
    errors = [b["mre"] for b in bootstrapped if b["mre"] is not None]
    return {
        **head,
        "objective": fit.value if joint else sum(entry["objective"] for entry in described.values()),
        "num_rows": rows,
        "status": worst,
        "reason": "; ".join(f"{group}: {entry['reason']}" for group, entry in described.items() if entry["status"] == worst),
        "params": shared,
        "data_range": ranges,
        "mre": sum(entry["mre"] * entry["num_rows"] for entry in described.values()) / rows,
        "bootstrap": {
            "num_resamples": max(b["num_resamples"] for b in bootstrapped),
            "mre": float(np.mean(errors)) if errors else None,
        },
        "groups": described,
    }


def check_target(path: Path) -> None:
    """Refuse, before any work, a file that cannot be written.

    Raises:
        UserError: it is a folder, or lies below something that is none, or in a folder without permission.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file to write, such as {path / 'fit.json'}.")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"Cannot write {path}: {parent} is {'no folder' if not parent.is_dir() else 'not writable'}.")


def write_fit(path: str | os.PathLike[str], content: Mapping[str, Any], fits: Mapping[str, Uncertainty]) -> Path:
    """Write fit.json and, beside it, `<stem>.draws.npz` with the natural parameters of every refit and the fitted rows."""
    target = Path(path)
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for i, (group, uncertainty) in enumerate(fits.items()):
        predictor = Predictor.from_uncertainty(uncertainty, group)
        arrays[f"draws_{i}"] = predictor.draws
        arrays |= {f"column_{i}_{name}": values for name, values in predictor.columns.items()}
    sidecar = target.with_suffix(".draws.npz")
    with replacing(sidecar) as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)
    of_draws = {"draws": sidecar.name, "draws_sha256": sha256_of(sidecar), "draws_groups": list(fits)}
    text = json.dumps({**content, **of_draws}, indent=2, allow_nan=False)
    write_text(target, text + "\n")
    return target


@dataclass(frozen=True)
class SavedFit:
    """A fit.json that was read.

    Args:
        content: the file.
        predictors: one per group; the key is "" for an ordinary fit.
    """

    content: Mapping[str, Any]
    predictors: Mapping[str, Predictor]

    def pick(self, group: str | None) -> Predictor:
        """The predictor of a group, or the only one.

        Raises:
            UserError: no such group, or none was named where there are several.
        """
        if group is None and len(self.predictors) == 1:
            return next(iter(self.predictors.values()))
        if group is not None and set(self.predictors) == {""}:
            raise UserError("This fit has no groups: leave --group out.")
        if group is None or group not in self.predictors:
            asked = "none was named" if group is None else f"not {group!r}"
            raise UserError(f"This fit has the groups {', '.join(self.predictors)}: name one with --group, {asked}.")
        return self.predictors[group]


def read_fit(path: str | os.PathLike[str]) -> SavedFit:
    """Read a fit.json with its draws.

    Raises:
        UserError: no such file, not a fit.json, another schema version, or an unknown law.
    """
    source = Path(path)
    if not source.is_file():
        raise UserError(f"No fit at {source}: make one with `forget fit TABLE --law NAME -o {source.name}`.")
    try:
        content = read_object(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} is not a fit ({error}): give a fit.json that `forget fit -o` wrote.") from None
    if "law" not in content or "params" not in content:
        raise UserError(f"{source} is not a fit: give a fit.json that `forget fit -o` wrote.")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{source} has schema version {version!r} and this release reads {SCHEMA_VERSION}: fit "
            "again, or use the release that wrote it."
        )
    law = get_law(str(content["law"]))
    arrays = _draws(source, str(content.get("draws") or ""), content.get("draws_sha256"))
    try:
        return SavedFit(content, _predictors(content, law, arrays))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{source} is damaged: fit again with `forget fit TABLE --law {law.name} -o {source.name}`.") from None


def _predictors(content: Mapping[str, Any], law: Law, arrays: Mapping[str, Any]) -> dict[str, Predictor]:
    groups: dict[str, Any] = content["groups"] or {"": content}
    # Arrays are numbered by group, in the order of writing.
    numbers = {str(group): number for number, group in enumerate(content.get("draws_groups", groups))}
    predictors = {}
    for group, entry in groups.items():
        i = numbers[group]
        params = {name: float(entry["params"][name]["value"]) for name in law.names}
        flags = [(flag["parameters"], str(flag["words"])) for flag in entry["flags"] if flag["kind"] == "unidentified"]
        ranges = {name: (float(low), float(high)) for name, (low, high) in entry["data_range"].items()}
        if lacking := set(law.columns) - {"L0"} - ranges.keys():
            raise KeyError(*lacking)
        predictors[group] = Predictor(
            law,
            params,
            arrays.get(f"draws_{i}", np.empty((0, len(law.names)))),
            _widening(entry["intervals"]),
            ranges,
            {name: arrays[f"column_{i}_{name}"] for name in law.columns if f"column_{i}_{name}" in arrays},
            group,
            reasons_of(flags, group),
            float("nan") if entry.get("noise_nats") is None else float(entry["noise_nats"]),
        )
    return predictors


def _widening(intervals: Mapping[str, Any]) -> Widening:
    """How draws are widened; a file of before that was kept for each level has the factor of 95% alone."""
    if "inflation" not in intervals:
        return Widening(float(intervals["widen"]))
    degrees = intervals["degrees_of_freedom"]
    return Widening(float(intervals["inflation"]), float("inf") if degrees is None else float(degrees))


def _draws(source: Path, name: str, sha256: str | None) -> dict[str, Any]:
    """The arrays beside a fit.json; none where it was written without, or the file has gone.

    Raises:
        UserError: the file is damaged, or of another fit than one that names its checksum.
    """
    sidecar = source.with_name(Path(name).name) if name else source
    if sidecar == source or not os.path.isfile(sidecar):
        return {}
    if sha256 is not None and sha256_of(sidecar) != sha256:
        raise UserError(
            f"{sidecar} is damaged, or of another fit than {source}: fit again, or remove it to go on without intervals."
        )
    try:
        with zipfile.ZipFile(sidecar) as archive:
            if sum(one.file_size for one in archive.infolist()) > _MOST_DRAWS_BYTES:
                raise ValueError
            return {one.removesuffix(".npy"): array_of(archive.read(one)) for one in archive.namelist()}
    # Besides what a damaged archive is: one that is encrypted, or compressed in a way that Python does not know.
    except (ValueError, OSError, EOFError, LookupError, RuntimeError, zlib.error, zipfile.BadZipFile):
        raise UserError(f"{sidecar} is damaged: fit again, or remove it to go on without intervals.") from None
