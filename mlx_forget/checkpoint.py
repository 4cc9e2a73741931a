"""Checkpoints: whole or absent, checked before they are used, readable by either backend and by transformers.

    checkpoints/last/      model.safetensors, training_state.safetensors, config.json, tokenizer.model (or .json), state.json
    checkpoints/previous/  the one before, kept until the run ends
    checkpoints/best/      the weights at the lowest target validation loss; no training state

A run that trains adapters saves them alone, as adapter_model.safetensors with peft's adapter_config.json, and once more in mlx-lm/ for
mlx-lm; `state.json` names the base that they belong to, and `fuse` makes a whole checkpoint of both.

`state.json` lists the checksum of every other file. A checkpoint is written beside its place and renamed, so a kill at any moment
leaves `last` or `previous` whole.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from safetensors import SafetensorError

from mlx_forget import adapters, imported_adapters
from mlx_forget.durable_files import SEAL, is_whole, read_object, sealed, sha256_of, sync
from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec, hf_config, linear_shapes, spec_from_hf_config
from mlx_forget.pipeline.vocabularies import JSON_FILE, SENTENCEPIECE_FILE, Vocabulary, copy_tokenizer, special_ids, tokenizer_in
from mlx_forget.pretrained import CONFIG as CONFIG
from mlx_forget.pretrained import PretrainedSpec, find_pretrained, older_keys, read_config, read_pretrained
from mlx_forget.trainer import AdapterSpec, Trainer
from mlx_forget.weight_files import WEIGHTS as WEIGHTS
from mlx_forget.weight_files import refuse_pickles, weights_sha256

SCHEMA_VERSION = 1
TRAINING_STATE = "training_state.safetensors"
STATE = "state.json"
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Args:
        folder: where it is.
        state: what the loop needs to go on, and what a finetune needs to know of its base.
        trust_remote_code: whether the user lets code that comes with it run; no file says so.
    """

    folder: Path
    state: dict[str, Any]
    trust_remote_code: bool = False

    @property
    def adapter(self) -> AdapterSpec | None:
        """What it holds instead of whole weights, if it does."""
        return adapter_of(self.state)

    @property
    def weights(self) -> Path:
        """The weights that its run trained: those of a whole model (the folder where they are in several files), or adapters."""
        if self.adapter is not None:
            file: str = self.state.get("adapter_file", adapters.WEIGHTS)
            return self.folder / file
        single = self.folder / WEIGHTS
        return single if single.is_file() else self.folder

    @property
    def training_state(self) -> Path:
        return self.folder / TRAINING_STATE

    @property
    def tokenizer(self) -> Path:
        return tokenizer_in(self.folder)

    @property
    def is_own(self) -> bool:
        """Whether a run of this tool trained it."""
        return "schema_version" in self.state and not self.state.get("is_imported", False)

    def model_spec(self) -> ModelSpec | PretrainedSpec:
        """The model's shape: a rung of the ladder where it is one, whoever wrote it, else what it is."""
        config = read_config(self.folder)
        try:
            return spec_from_hf_config(config)
        except UserError:
            return read_pretrained(self.folder, trust_remote_code=self.trust_remote_code)


def adapter_of(state: dict[str, Any]) -> AdapterSpec | None:
    """The adapters that a run's state speaks of, or None.

    Raises:
        KeyError, TypeError, ValueError: it speaks of something else.
    """
    given = state.get("adapter")
    if given is None:
        return None
    targets, layers = tuple(map(str, given["target_modules"])), given["num_layers"]
    numbers = {"rank": int(given["rank"]), "alpha": float(given["alpha"]), "dropout": float(given["dropout"])}
    spec = AdapterSpec(**{**given, **numbers, "target_modules": targets, "num_layers": None if layers is None else int(layers)})
    if spec.kind not in get_args(get_type_hints(AdapterSpec)["kind"]) or spec.rank < 1 or not math.isfinite(spec.scale):
        raise ValueError
    return spec


def _check(state: dict[str, Any]) -> None:
    """Refuse what is no state of a checkpoint: whatever reads one counts on it.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    # Another name than a run gives its adapters is said of imported ones alone, which have no such file.
    if "adapter_file" in state:
        raise ValueError
    if adapter_of(state) is not None:
        base = state["base"]
        # Places and names are made of them.
        if not (re.fullmatch("[0-9a-f]{64}", base["weights_sha256"]) and isinstance(base["folder"], str) and "run_id" in base):
            raise ValueError
        if adapters.WEIGHTS not in state["files"]:
            raise ValueError
    if not isinstance(state.get("step", 0), int) or not all(len(point) == 2 for point in state.get("curve") or ()):
        raise ValueError


def save_checkpoint(
    folder: Path,
    trainer: Trainer,
    model: ModelSpec | PretrainedSpec,
    tokenizer: Path,
    state: dict[str, Any],
    *,
    with_training_state: bool,
) -> None:
    """Write a checkpoint at `folder`; one that stood there becomes `previous` beside it (`best` is simply replaced)."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    adapter = adapter_of(state)
    with _system_errors(aside):
        trainer.save(aside / (WEIGHTS if adapter is None else adapters.WEIGHTS), trainable_only=adapter is not None)
        if with_training_state:
            trainer.save_state(aside / TRAINING_STATE)
    copy_tokenizer(tokenizer, aside)
    config = config_of(model, tokenizer)
    (aside / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    if isinstance(model, PretrainedSpec):
        code = [path.name for path in sorted(model.folder.glob("*.py"))] if model.trust_remote_code else []
        copy_companions(model.folder, aside, code)
    if adapter is not None:
        adapters.write_configs(
            aside,
            adapter,
            linear_shapes(model),
            base=state["base"]["folder"],
            num_layers=model.num_layers,
            model_type=config["model_type"],
        )
    seal(aside, state)
    old = folder.with_name("previous" if with_training_state else f".{folder.name}.old")
    if folder.exists():
        _remove(old)
        os.rename(folder, old)
    os.rename(aside, folder)
    sync(folder.parent)
    if not with_training_state:
        _remove(old)


def copy_companions(source: Path, folder: Path, code: Iterable[str]) -> None:
    """What a checkpoint of another tool has beside its weights: how to generate, and the files of its code. None is run here."""
    for name in (GENERATION_CONFIG, *code):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def config_of(model: ModelSpec | PretrainedSpec, tokenizer: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint: the ladder's own, or that of the start with the type of the weights as they are saved."""
    if isinstance(model, PretrainedSpec):
        config = {key: value for key, value in older_keys(read_config(model.folder)).items() if key != "dtype"}
        return config | {"torch_dtype": "float32"}
    bos_id, eos_id = special_ids(tokenizer)
    return hf_config(model, bos_token_id=bos_id, eos_token_id=eos_id)


def seal(folder: Path, state: dict[str, Any]) -> None:
    """Write `state.json` with the checksums of everything else in a checkpoint's folder, and make sure that all is on disk."""
    files = {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    content = {"schema_version": SCHEMA_VERSION, **state, "files": files}
    (folder / STATE).write_text(json.dumps(sealed(content), indent=1), encoding="utf-8")
    for path in [*folder.rglob("*")]:
        sync(path)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose every file matches its checksum.

    Raises:
        UserError: no checkpoint there, a schema this version does not read, or a damaged file (named).
    """
    try:
        state = read_object(folder / STATE)
        version, files = state["schema_version"], dict(state["files"])
        if not all(isinstance(name, str) for name in files):
            raise TypeError
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it has no {STATE}.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"Checkpoint {folder} is damaged: {STATE} cannot be read.") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"Checkpoint {folder} has schema {version}, this version reads {SCHEMA_VERSION}.")
    if not is_whole(state):
        raise UserError(f"Checkpoint {folder} is damaged: the checksum of {STATE} does not match.")
    state.pop(SEAL, None)
    for name, wanted in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"Checkpoint {folder} names files outside of it, which is refused.")
        # A name that no file can have is no file.
        if not os.path.isfile(path) or sha256_of(path) != wanted:
            raise UserError(f"Checkpoint file {path} is damaged or missing (its checksum does not match).")
    try:
        _check(state)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError):
        raise UserError(f"Checkpoint {folder} is damaged: {STATE} is not what a run writes.") from None
    return Checkpoint(folder, state)


def places(path: Path) -> tuple[Path, ...]:
    """Where a folder that a user names may have its checkpoint: itself, or the last one of a run folder."""
    return path, path / "checkpoints" / "last", path / "last"


def check_vocabulary(folder: Path, vocabulary: Vocabulary, model: ModelSpec | PretrainedSpec) -> None:
    """Refuse a model whose tokenizer has ids that it does not know: what would be read for them is no number of the model.

    Raises:
        UserError: it has.
    """
    if vocabulary.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {vocabulary.vocab_size:,} ids and its model knows {model.vocab_size:,}: "
            "they do not belong together."
        )


def find_checkpoint(name: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint that a user means: a folder of this tool, the last one of a run folder, or a Hugging Face folder or Hub id.

    Adapters of peft and mlx-lm are a checkpoint too, whose base is named and not yet looked for.

    Raises:
        UserError: none there, or damaged.
    """
    path = Path(name).expanduser()
    for candidate in places(path):
        if (candidate / STATE).exists():
            return replace(open_checkpoint(candidate), trust_remote_code=trust_remote_code)
    if imported_adapters.is_imported(path):
        return _of_adapters(path, trust_remote_code=trust_remote_code)
    found = find_pretrained(str(name), trust_remote_code=trust_remote_code)
    if found is not None and imported_adapters.is_imported(found):
        return _of_adapters(found, trust_remote_code=trust_remote_code)
    if found is not None:
        return _of_another_tool(str(name), found, trust_remote_code=trust_remote_code)
    if path.exists():
        refuse_pickles(path)
        raise UserError(
            f"{path} holds no checkpoint: give a run folder, one of its checkpoints/last or checkpoints/best, or a Hugging Face folder."
        )
    raise UserError(f"There is no checkpoint at {path}.")


def _of_another_tool(name: str, folder: Path, *, trust_remote_code: bool) -> Checkpoint:
    """A checkpoint whose state is no more than what its files say."""
    read_pretrained(folder, trust_remote_code=trust_remote_code)
    digest = weights_sha256(folder)
    state = {
        "run_id": f"{Path(name).name}-{digest[:12]}",
        "files": {WEIGHTS: digest},
        "is_pretraining": False,
        "curve": [],
    }
    checkpoint = Checkpoint(folder, state, trust_remote_code)
    if not checkpoint.tokenizer.is_file():
        raise UserError(f"{folder} has no {JSON_FILE} and no {SENTENCEPIECE_FILE}: copy its tokenizer's files there.")
    return checkpoint


def _of_adapters(folder: Path, *, trust_remote_code: bool) -> Checkpoint:
    """Adapters of another tool, with what their files say of them."""
    found = imported_adapters.read_adapter(folder)
    digest = weights_sha256(found.weights)
    state = {
        "run_id": f"{folder.resolve().name}-{digest[:12]}",
        "files": {adapters.WEIGHTS: digest},
        "is_pretraining": False,
        "curve": [],
        "is_imported": True,
        "adapter": asdict(found.spec),
        "adapter_file": found.weights.name,
        "base": {"folder": found.base, "run_id": None, "weights_sha256": None},
    }
    return Checkpoint(folder, state, trust_remote_code)


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
        # The latter before safetensors 0.6.
        found = re.search(r"(?:\(os error |Os \{ code: )(\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from None
