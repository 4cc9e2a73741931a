"""Checkpoints: whole or absent, checked before they are used, readable by either backend and by transformers.

    checkpoints/last/      model.safetensors, training_state.safetensors, config.json, tokenizer.model (or .json), state.json
    checkpoints/previous/  the one before, kept until the run ends
    checkpoints/best/      the weights at the lowest target validation loss; no training state

`state.json` lists the checksum of every other file. A checkpoint is written beside its place and renamed, so a kill at any moment
leaves `last` or `previous` whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mlx_forget.durable_files import SEAL, is_whole, sealed, sync
from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec, hf_config, spec_from_hf_config
from mlx_forget.pipeline.vocabularies import copy_tokenizer, special_ids, tokenizer_in
from mlx_forget.trainer import Trainer

SCHEMA_VERSION = 1
WEIGHTS = "model.safetensors"
TRAINING_STATE = "training_state.safetensors"
CONFIG = "config.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Args:
        folder: where it is.
        state: what the loop needs to go on, and what a finetune needs to know of its base.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def training_state(self) -> Path:
        return self.folder / TRAINING_STATE

    @property
    def tokenizer(self) -> Path:
        return tokenizer_in(self.folder)

    def model_spec(self) -> ModelSpec:
        """The model's shape, from `config.json`."""
        return spec_from_hf_config(json.loads((self.folder / CONFIG).read_text(encoding="utf-8")))


def save_checkpoint(
    folder: Path,
    trainer: Trainer,
    model: ModelSpec,
    tokenizer: Path,
    state: dict[str, Any],
    *,
    with_training_state: bool,
) -> None:
    """Write a checkpoint at `folder`; one that stood there becomes `previous` beside it (`best` is simply replaced)."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with _system_errors(aside):
        trainer.save(aside / WEIGHTS)
        if with_training_state:
            trainer.save_state(aside / TRAINING_STATE)
    copy_tokenizer(tokenizer, aside)
    bos_id, eos_id = special_ids(tokenizer)
    (aside / CONFIG).write_text(json.dumps(hf_config(model, bos_token_id=bos_id, eos_token_id=eos_id), indent=1), encoding="utf-8")
    files = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
    content = {"schema_version": SCHEMA_VERSION, **state, "files": files}
    (aside / STATE).write_text(json.dumps(sealed(content), indent=1), encoding="utf-8")
    for path in aside.iterdir():
        sync(path)
    old = folder.with_name("previous" if with_training_state else f".{folder.name}.old")
    if folder.exists():
        _remove(old)
        os.rename(folder, old)
    os.rename(aside, folder)
    sync(folder.parent)
    if not with_training_state:
        _remove(old)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose every file matches its checksum.

    Raises:
        UserError: no checkpoint there, a schema this version does not read, or a damaged file (named).
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        version, files = state["schema_version"], dict(state["files"])
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it has no {STATE}.") from None
    except (ValueError, KeyError, TypeError, NotADirectoryError, RecursionError):
        raise UserError(f"Checkpoint {folder} is damaged: {STATE} cannot be read.") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"Checkpoint {folder} has schema {version}, this version reads {SCHEMA_VERSION}.")
    if not is_whole(state):
        raise UserError(f"Checkpoint {folder} is damaged: the checksum of {STATE} does not match.")
    state.pop(SEAL, None)
    for name, wanted in files.items():
        path = folder / Path(name).name
        if not path.is_file() or _sha256(path) != wanted:
            raise UserError(f"Checkpoint file {path} is damaged or missing (its checksum does not match).")
    return Checkpoint(folder, state)


def places(path: Path) -> tuple[Path, ...]:
    """Where a folder that a user names may have its checkpoint: itself, or the last one of a run folder."""
    return path, path / "checkpoints" / "last", path / "last"


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that a user means by a folder: itself, or the last one of a run folder.

    Raises:
        UserError: none there, or damaged.
    """
    for candidate in places(path):
        if (candidate / STATE).exists():
            return open_checkpoint(candidate)
    if path.exists():
        raise UserError(f"{path} holds no checkpoint: give a run folder or one of its checkpoints/last or checkpoints/best.")
    raise UserError(f"There is no checkpoint at {path}.")


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, str | None]:
    """The newest whole checkpoint with training state of a run, and a sentence if a newer one had to be passed over.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    problem = None
    for name in ("last", "previous"):
        if (folder / name).exists():
            try:
                return open_checkpoint(folder / name), problem
            except UserError as error:
                problem = str(error)
    if problem is not None:
        raise UserError(f"{problem} No other checkpoint of this run is whole: remove {folder.parent} to start again.")
    return None, None


def prune(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    _remove(folder / "previous")
    for part in folder.glob(".*"):
        _remove(part)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill in between never leaves a half under its name."""
    if folder.exists():
        trash = folder.with_name(f".{folder.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        shutil.rmtree(trash)


@contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    """What the system says to safetensors, such as that the disk is full, as the system says it elsewhere."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
