"""The models of an audit: a folder opened as what an audit needs to know of it, whatever wrote it.

A kind of folder joins `_OPENERS` with a function that says whether a folder is of that kind, and one that opens it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget import checkpoint, records
from mlx_forget.errors import UserError
from mlx_forget.fuse import whole_checkpoint
from mlx_forget.imported_adapters import is_imported
from mlx_forget.ladder import ModelSpec, is_ladder_name, num_params, param_shapes
from mlx_forget.pipeline.corpora import forget_home
from mlx_forget.pipeline.hub import parse_id
from mlx_forget.pipeline.vocabularies import Vocabulary, load_vocabulary
from mlx_forget.pretrained import PretrainedSpec, is_pretrained, names_in_files
from mlx_forget.weight_files import read_tensor, refuse_pickles, tensor_names, weight_files

AUTO = "auto"


@dataclass(frozen=True)
class Model:
    """A checkpoint that can be audited.

    Args:
        name: short, for titles.
        folder: where it was found.
        spec: its shape.
        weights: a safetensors file in the names of `spec`, or a folder of several.
        tokenizer_file: what its text is tokenised with.
        tokenizer: that, open.
        bos_id: stands before every text.
        step: optimiser steps behind it, where known.
        curve: (tokens, pretraining validation loss) along its own pretraining, empty for a finetune.
        record: the record of the run that made it, where there is one.
        base: what adapters of another tool sit on.
    """

    name: str
    folder: Path
    spec: ModelSpec | PretrainedSpec
    weights: Path
    tokenizer_file: Path
    tokenizer: Vocabulary
    bos_id: int
    step: int | None
    curve: tuple[tuple[float, float], ...]
    record: dict[str, Any] | None
    base: Path | None = None

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Every weight, one at a time, in the order of their names."""
        wanted = param_shapes(self.spec)
        places: dict[str, tuple[Path, str]] = {}
        for path in weight_files(self.weights):
            places |= {name: (path, stored) for stored, name in names_in_files(tensor_names(path), wanted).items()}
        for name, (path, stored) in sorted(places.items()):
            yield name, read_tensor(path, stored)

    @property
    def description(self) -> str:
        """How it was trained, in words."""
        at = "" if self.step is None else f", step {self.step:,}"
        if self.record is None:
            return f"checkpoint {self.name}" if self.base is None else f"adapters {self.name} on {self.base}"
        config = self.record["config"]
        if config["init"] == "scratch":
            return f"pretrained on {config['target']}{at}"
        kind = "" if config.get("fine_tune_type", "full") == "full" else f" by {config['fine_tune_type']}"
        return f"finetuned{kind} on {config['target']} with p = {config['p']}{at}"

    def summary(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "folder": str(self.folder),
            "run_id": None if self.record is None else self.record["run_id"],
            "step": self.step,
            "num_params": num_params(self.spec),
        }


def open_pair(base: str, tuned: str, *, say: Callable[[str], None], trust_remote_code: bool = False) -> tuple[Model, Model]:
    """The two models of an audit, checked to be comparable token by token.

    Args:
        base: a folder, or `auto`: the checkpoint that `tuned` was finetuned from.
        trust_remote_code: whether code that comes with them may run.

    Raises:
        UserError: one cannot be opened, or they differ in shape, vocabulary or tokenizer.
    """
    stand_in = None if base == AUTO else base
    after = open_model(Path(tuned).expanduser(), say=say, trust_remote_code=trust_remote_code, stand_in=stand_in)
    start = _start_of(after, trust_remote_code=trust_remote_code) if base == AUTO else Path(base).expanduser()
    before = open_model(start, say=say, trust_remote_code=trust_remote_code)
    for one in (before, after):
        checkpoint.check_vocabulary(one.folder, one.tokenizer, one.spec)
    if before.spec.vocab_size != after.spec.vocab_size:
        raise UserError(
            f"The vocabularies differ: {before.folder} has {before.spec.vocab_size:,} entries, {after.folder} {after.spec.vocab_size:,}. "
            "An audit compares a model with its own finetune."
        )
    if before.spec != after.spec:
        raise UserError(
            f"The architectures differ: {before.folder} is {_shape(before.spec)}, {after.folder} is {_shape(after.spec)}. "
            "An audit compares a model with its own finetune."
        )
    if before.tokenizer.hash != after.tokenizer.hash:
        raise UserError(
            f"The tokenizers differ: {before.folder} has {before.tokenizer.hash[:12]}, {after.folder} {after.tokenizer.hash[:12]}. "
            "Losses per token can only be compared on the same tokens."
        )
    return before, after


def open_model(
    folder: Path,
    *,
    say: Callable[[str], None] = lambda sentence: None,
    trust_remote_code: bool = False,
    stand_in: str | None = None,
) -> Model:
    """A model from a folder of any known kind.

    Args:
        stand_in: the base of another tool's adapters where the folder that they name is not here.

    Raises:
        UserError: nothing there, no weights, pickled weights only, or a damaged file.
    """
    if not folder.exists() and parse_id(str(folder)) is None:
        raise UserError(f"There is no folder {folder}.")
    for recognises, opened in _OPENERS:
        if recognises(folder):
            return opened(folder, say, trust_remote_code, stand_in)
    if folder.exists():
        refuse_pickles(folder)
    raise UserError(
        f"{folder} holds no model: give a run folder, one of its checkpoints/last or checkpoints/best, or a Hugging Face folder or id."
    )


def _holds_checkpoint(folder: Path) -> bool:
    return any((place / checkpoint.STATE).is_file() for place in checkpoint.places(folder))


def _open_checkpoint(folder: Path, say: Callable[[str], None], trust_remote_code: bool, stand_in: str | None) -> Model:
    found = checkpoint.find_checkpoint(folder, trust_remote_code=trust_remote_code)
    for needed in (found.weights, found.tokenizer, found.folder / checkpoint.CONFIG):
        if not needed.is_file():
            raise UserError(f"{found.folder} has no {needed.name}.")
    state = found.state
    run_folder = found.folder.parent.parent if found.folder.parent.name == "checkpoints" else None
    record = None if run_folder is None else records.read_record(run_folder)
    step = state.get("step")
    best = None if run_folder is None else run_folder / "checkpoints" / "best" / checkpoint.STATE
    if folder != found.folder and best is not None and best.is_file() and (state.get("best") or {}).get("step") != step:
        say(
            f"{folder}: reading checkpoints/last, step {step:,}; the lowest target validation loss was at step "
            f"{state['best']['step']:,} (checkpoints/best)."
        )
    curve = tuple((float(point[0]), float(point[1])) for point in state.get("curve") or ())
    identifier = state.get("run_id") or found.folder.name
    tokenizer = load_vocabulary(found.tokenizer)
    whole = whole_checkpoint(found)
    return Model(
        name=f"{identifier}-step{step}" if step is not None else str(identifier),
        folder=found.folder,
        spec=whole.model_spec(),
        weights=whole.weights,
        tokenizer_file=found.tokenizer,
        tokenizer=tokenizer,
        bos_id=tokenizer.bos_id,
        step=step,
        curve=curve if state.get("is_pretraining") else (),
        record=record,
    )


def _is_of_another_tool(folder: Path) -> bool:
    return is_pretrained(folder) or is_imported(folder) or (not folder.exists() and parse_id(str(folder)) is not None)


def _open_pretrained(folder: Path, say: Callable[[str], None], trust_remote_code: bool, stand_in: str | None) -> Model:
    """A checkpoint of another tool, or its adapters on their base; of its training nothing is known."""
    found = checkpoint.find_checkpoint(folder, trust_remote_code=trust_remote_code)
    whole, base = whole_checkpoint(found, stand_in=stand_in), None
    if whole is not found:
        base = Path(whole.state["fused_from"]["base"]["folder"])
        say(f"{folder} holds adapters, which are taken on {base}.")
    tokenizer = load_vocabulary(whole.tokenizer)
    return Model(
        name=str(found.state["run_id"]),
        folder=found.folder,
        spec=whole.model_spec(),
        weights=whole.weights,
        tokenizer_file=whole.tokenizer,
        tokenizer=tokenizer,
        bos_id=tokenizer.bos_id,
        step=None,
        curve=(),
        record=None,
        base=base,
    )


_Opener = Callable[[Path, Callable[[str], None], bool, str | None], Model]
_OPENERS: tuple[tuple[Callable[[Path], bool], _Opener], ...] = (
    (_holds_checkpoint, _open_checkpoint),
    (_is_of_another_tool, _open_pretrained),
)


def _start_of(tuned: Model, *, trust_remote_code: bool) -> Path:
    """What a finetune started from, as its record names it: the folder of `init`, or a base in the cache; of adapters, their base.

    Raises:
        UserError: no record, nothing there any more, or another run in the folder.
    """
    if tuned.base is not None:
        return tuned.base
    init = None if tuned.record is None else tuned.record.get("init")
    if tuned.record is None or init in (None, "scratch"):
        raise UserError(f"{tuned.folder} has no record that says what it was finetuned from: name BASE by its folder.")
    config = tuned.record["config"]
    named = str(config.get("init") or AUTO)
    if named == AUTO and not is_ladder_name(str(config.get("model"))):
        named = str(config["model"])
    others = []
    for folder in () if named == AUTO else _init_folders(named, tuned.folder):
        if any((place / checkpoint.STATE).is_file() for place in checkpoint.places(folder)):
            if checkpoint.find_checkpoint(folder).state.get("run_id") == init:
                return folder
            others.append(folder)
        elif _is_of_another_tool(folder):
            if checkpoint.find_checkpoint(folder, trust_remote_code=trust_remote_code).state["run_id"] == init:
                return folder
            others.append(folder)
    bases = forget_home() / "bases"
    # Each backend trains a base of its own, which differs in its last digits.
    found = bases / f"{init}-{tuned.record['backend']}"
    if found.is_dir():
        return found
    if others:
        raise UserError(
            f"{tuned.folder} was finetuned from run {init}, but {others[0]} holds another one: name BASE by its folder."
        )
    where = bases if named == AUTO else f"{named} and not in {bases}"
    raise UserError(f"{tuned.folder} was finetuned from run {init}, which is not in {where}: name BASE by its folder.")


def _init_folders(named: str, tuned: Path) -> list[Path]:
    """Where a folder may be that was named relative to where the finetune was started: here, or above its run folder."""
    path = Path(named).expanduser()
    return [path] if path.is_absolute() else [path, *(parent / path for parent in tuned.resolve().parents[2:5])]


def _shape(spec: ModelSpec | PretrainedSpec) -> str:
    kind = f"{spec.architecture}, " if isinstance(spec, PretrainedSpec) else ""
    return kind + f"{spec.num_layers} layers of width {spec.width}, {spec.num_heads} heads, context {spec.context_length}"
