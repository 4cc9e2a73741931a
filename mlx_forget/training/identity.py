"""What names a run: a hash of the keys that change the science, and of nothing about the machine."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mlx_forget.config import TrainConfig
from mlx_forget.config_keys import REPLAY_ONLINE, REPLAY_PRETRAIN, REPLAY_SELF
from mlx_forget.ladder import is_ladder_name
from mlx_forget.pipeline.shares import describe_share
from mlx_forget.specs import Precision

# Raised when the same configuration would give other numbers than before.
SCIENCE_VERSION = 1


def science(config: TrainConfig) -> dict[str, Any]:
    """The keys that change the science and differ from their defaults; p as an exact share, data by fingerprint elsewhere."""
    given = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = {} if f.name == "base" else f.default
        if f.name == "replay_data" and value not in (REPLAY_SELF, REPLAY_ONLINE, REPLAY_PRETRAIN):
            continue
        # Start weights are known by their hash, wherever they lie.
        if f.name == "model" and not is_ladder_name(value):
            continue
        if f.metadata["science"] and value != default and f.name not in ("base", "init", "target", "pretrain", "tokenizer"):
            given[f.name] = value
    return given | {"p": describe_share(config.p)}


def run_id(
    config: TrainConfig,
    *,
    precision: Precision,
    learning_rate: float,
    data: Mapping[str, str | None],
    init: str,
) -> str:
    """Twelve hex digits that name a run: science keys, precision, resolved rate, data fingerprints and start weights."""
    content = {
        "science_version": SCIENCE_VERSION,
        "keys": science(config) | {"learning_rate": learning_rate},
        "precision": precision,
        "data": dict(data),
        "init": init,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
