"""Which documents of a text a finetune has already learnt, by the rows that its record says it was given.

A document overlaps when half or more of its spans of 16 tokens occur in those rows. Spans ignore where documents and rows are cut, so
another division of the same file is found too.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget.audit.models import Model
from mlx_forget.audit.texts import Text
from mlx_forget.errors import UserError
from mlx_forget.ladder import default_row_length
from mlx_forget.pipeline.corpora import forget_home
from mlx_forget.pipeline.sides import RowSubset, read_masked
from mlx_forget.pipeline.store import MANIFEST, TokenStore, open_store

SPAN = 16
SEEN_SHARE = 0.5
_ROWS_AT_ONCE = 1 << 14
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Learnt:
    """The rows that a finetune was given.

    Args:
        name: what its record calls them.
        rows: where they are.
    """

    name: str
    rows: RowSubset


def learnt_rows(model: Model) -> tuple[tuple[Learnt, ...], tuple[str, ...]]:
    """The rows of every target of a model's run, and sentences on those that cannot be had; nothing of a model without a record."""
    found, skipped = [], []
    for name, entry in {} if model.record is None else model.record["data"].items():
        if entry["role"] != "target":
            continue
        try:
            found.append(Learnt(name, _rows_of(model, name, entry)))
        except (UserError, OSError) as error:
            reason = str(error).rstrip(".")
            skipped.append(f"Overlap with what the finetune learnt from {name} was not checked: {reason}.")
    return tuple(found), tuple(skipped)


def overlapping_documents(text: Text, learnt: Sequence[Learnt]) -> list[int]:
    """The documents of a text that overlap with the learnt rows, all sources together; those shorter than a span never do."""
    spans = [_spans(document[None]) for document in text.documents]
    owner = np.repeat(np.arange(len(spans)), [len(found) for found in spans])
    wanted = np.concatenate(spans)
    seen = np.zeros(len(wanted), bool)
    order = np.argsort(wanted)
    ranked = wanted[order]
    parts = [(one.rows, start) for one in learnt for start in range(0, one.rows.num_rows, _ROWS_AT_ONCE)]
    for rows, start in parts:
        index = np.arange(start, min(rows.num_rows, start + _ROWS_AT_ONCE))
        tokens, _, _ = read_masked(rows, index)
        found = np.unique(_spans(tokens[:, 1:]))
        first, last = np.searchsorted(ranked, found, side="left"), np.searchsorted(ranked, found, side="right")
        for a, b in zip(first[last > first].tolist(), last[last > first].tolist(), strict=True):
            seen[order[a:b]] = True
    num_spans = np.bincount(owner, minlength=len(spans))
    num_seen = np.bincount(owner, weights=seen, minlength=len(spans))
    return np.flatnonzero((num_spans > 0) & (num_seen >= SEEN_SHARE * num_spans)).tolist()


def _rows_of(model: Model, name: str, entry: dict[str, Any]) -> RowSubset:
    """The rows of one target, as its run cut them.

    Raises:
        UserError: its store is no longer there, or has no such rows.
    """
    assert model.record is not None
    config = model.record["config"]
    store = _find_store(name, entry)
    if store is None:
        raise UserError("its token store is no longer found")
    whole = RowSubset.of_tokens(
        store.split("train"),
        config.get("max_seq_length") or default_row_length(model.spec),
        None,
        layout=config.get("rows", "packed"),
        mask_prompt=config.get("mask_prompt", True),
    )
    # The record counts the labels that were learnt, in the order of the rows.
    if whole.is_masked:
        num_rows = int(np.searchsorted(np.cumsum(whole.num_useful), entry["unique_tokens"], "right"))
    else:
        num_rows = min(whole.num_rows, entry["unique_tokens"] // whole.row_length)
    return dataclasses.replace(whole, num_rows=num_rows)


def _spans(tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint64]:
    """A hash of every run of 16 tokens within each row of int[B, T], uint64[B * (T - 15)]; none where a row is shorter."""
    num = tokens.shape[1] - SPAN + 1
    if num < 1:
        return np.zeros(0, np.uint64)
    codes = (tokens.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    codes ^= codes >> np.uint64(29)
    total = np.zeros((len(tokens), num), np.uint64)
    for offset in range(SPAN):
        total = total * _MULTIPLIER + codes[:, offset : offset + num]
    return total.ravel()


def _find_store(name: str, entry: dict[str, Any]) -> TokenStore | None:
    """The store with the fingerprint that a record names: at its own path, or in the cache."""
    for folder in (Path(name).expanduser(), *sorted((forget_home() / "stores").glob("*"))):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if manifest.get("fingerprint") == entry["fingerprint"]:
            return open_store(folder, verify=False)
    return None
