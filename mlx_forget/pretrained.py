"""Checkpoints of other tools: a folder or Hub id with `config.json` and safetensors, read as facts; no weight is loaded here.

The facts come from `config.json` and from the headers of the weight files, so they cost no memory and need no framework.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_forget.durable_files import read_object
from mlx_forget.errors import UserError
from mlx_forget.weight_files import read_header, weight_files

CONFIG = "config.json"

# Rows are no longer than this unless they are asked to be: contexts of 131,072 tokens are common, and their activations are not small.
DEFAULT_ROW_LENGTH = 2048
# What a finetune of all weights starts from where nobody says; also mlx-lm's.
LEARNING_RATE = 1e-5

# What a snapshot of a model repository is fetched for.
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_EMBEDDING = re.compile(r"(^|\.)(wte|wpe|embed_tokens|embed_in|embed_out|lm_head|word_embeddings|tok_embeddings|embed_positions)\.")
# Kept by older files, computed by every newer one.
_BUFFERS = re.compile(r"(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class PretrainedSpec:
    """The shape of a checkpoint of another tool. Two are equal if one is a finetune of the other.

    Args:
        architecture: the class of its `config.json`, such as `LlamaForCausalLM`.
        model_type: the family, such as `llama`.
        num_layers, width, num_heads: blocks, residual stream, attention heads.
        vocab_size: rows of the output matrix; the tokenizer may use fewer.
        context_length: longest input, in tokens.
        shapes: (name, shape) of every weight in Hugging Face names, a tied matrix once; packed where it is quantised.
        mlp_width: of the layer within a block's feed-forward part.
        bits: of a quantised base's weights, else None.
        folder: where it is.
        trust_remote_code: whether code that comes with it may run.
    """

    architecture: str
    model_type: str
    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    context_length: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    mlp_width: int = 0
    bits: int | None = None
    folder: Path = field(default=Path(), compare=False)
    trust_remote_code: bool = field(default=False, compare=False)

    def summary(self) -> dict[str, Any]:
        """Its facts for records, without the list of weights."""
        names = ("architecture", "model_type", "num_layers", "width", "num_heads", "vocab_size", "context_length", "bits")
        return {name: getattr(self, name) for name in names}

    def kept_bytes(self, precision: str) -> int:
        """What the gradient needs of one token in one block, in bytes: for estimates. Norms are computed in float32.

        Counted of a gated block: both norms' inputs and outputs, queries, keys, values and their mixture, and four arrays as wide as the
        gate; nothing was measured.
        """
        narrow = 4 if precision == "fp32" else 2
        return 16 * self.width + narrow * (6 * self.width + 4 * self.mlp_width)

    @cached_property
    def unpacked(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight as it computes; of quantised ones what they stand for, without their scales."""
        if self.bits is None:
            return dict(self.shapes)
        names = dict(self.shapes)
        whole: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes:
            module, _, kind = name.rpartition(".")
            packed = f"{module}.scales" in names
            if packed and kind in ("scales", "biases"):
                continue
            whole[name] = (*shape[:-1], shape[-1] * 32 // self.bits) if packed and kind == "weight" else shape
        return whole

    def mismatch(self, own: Mapping[str, tuple[int, ...]], library: str, way_out: str) -> str:
        """What is wrong with its files, in a sentence, given the name and shape of every weight that a library's module has."""
        stored = dict(self.shapes)
        lacking, unknown = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
        if lacking and not unknown:
            return f"{self.folder} lacks {len(lacking)} of the {len(own)} weights of its {self.architecture} ({lacking[0]}): fetch it again."
        if unknown and not lacking:
            return (
                f"{self.folder} holds {len(unknown)} weights that {library}'s {self.architecture} does not know ({unknown[0]}), so that they "
                "would be lost: give the original checkpoint, or one without them."
            )
        odd = (lacking or sorted(name for name in own if own[name] != stored[name]))[0]
        return (
            f"{self.folder}: {library} holds the weights of {self.architecture} in another form than its files do ({odd}), so that they "
            f"could not be saved as they were: {way_out}."
        )

    @property
    def num_params(self) -> int:
        """All parameters, a tied matrix once; of packed weights as many as they stand for."""
        return sum(math.prod(shape) for shape in self.unpacked.values())

    @property
    def num_non_embedding_params(self) -> int:
        """Parameters without token and position embeddings and without an output matrix of its own."""
        return sum(math.prod(shape) for name, shape in self.unpacked.items() if not _EMBEDDING.search(name))


def is_pretrained(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint in Hugging Face form."""
    return (folder / CONFIG).is_file()


def find_pretrained(name: str, *, trust_remote_code: bool = False) -> Path | None:
    """The folder behind a folder's name or a Hub id (`OWNER/NAME`, `OWNER/NAME@REVISION`); None for anything else.

    Raises:
        UserError: the Hub cannot give it (missing, gated, no network and not in the cache).
    """
    path = Path(name).expanduser()
    if path.exists():
        return path if is_pretrained(path) else None
    from mlx_forget.pipeline.hub import parse_id

    hub = parse_id(name)
    return None if hub is None else _fetch(hub.id, hub.revision, trust_remote_code=trust_remote_code)


def read_pretrained(folder: Path, *, trust_remote_code: bool = False) -> PretrainedSpec:
    """The facts of a checkpoint in a folder.

    Raises:
        UserError: no weights, pickled weights only, a damaged file, code that is not trusted, or no causal language model.
    """
    config = read_config(folder)
    files = weight_files(folder)
    facts = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "?"
    if not trust_remote_code and "model_file" in config:
        raise UserError(f"{folder} comes with code ({config['model_file']}): read it, then give --trust-remote-code to run it.")
    quantised = config.get("quantization") or config.get("quantization_config") or {}
    try:
        width = _fact(facts, "hidden_size", "n_embd", "d_model", "dim")
        return PretrainedSpec(
            architecture=architecture,
            model_type=str(facts["model_type"]),
            num_layers=_fact(facts, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
            width=width,
            num_heads=_fact(facts, "num_attention_heads", "n_head", "num_heads", "n_heads"),
            vocab_size=_fact(facts, "vocab_size"),
            context_length=_fact(facts, "max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx"),
            shapes=tuple(_shapes(files, config)),
            mlp_width=int(facts.get("intermediate_size") or facts.get("n_inner") or facts.get("ffn_dim") or 4 * width),
            bits=int(quantised["bits"]) if "bits" in quantised else None,
            folder=folder,
            trust_remote_code=trust_remote_code,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / CONFIG} does not describe a language model: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as it stands.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return read_object(folder / CONFIG)
    except OSError as error:
        raise UserError(f"Cannot read {folder / CONFIG}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} must be one JSON object: {error}") from None


def older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says its rotary embedding also in the keys of older files.

    transformers 5 writes `rope_parameters` alone, and tools that read `rope_theta` and `rope_scaling` fall back to their defaults: a
    checkpoint then loads without complaint and computes something else.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return dict(config)
    whole = rope.get("full_attention", rope)
    local = rope.get("sliding_attention")
    older: dict[str, Any] = {}
    if "rope_theta" in whole:
        older["rope_theta"] = whole["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in whole.items() if key != "rope_theta"}
    if "partial_rotary_factor" in whole:
        older["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if isinstance(local, Mapping) and "rope_theta" in local:
        older["rope_local_base_freq"] = local["rope_theta"]
    return {**older, **config}


def canonical_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The name of each weight by its name in the file, in the form that transformers writes today.

    Buffers are left out, and the output matrix where it is tied to the embeddings; GPT-2's first files have no `transformer.` prefix.
    """
    gpt2 = config.get("model_type") == "gpt2"
    tied = gpt2 or config.get("tie_word_embeddings") is True
    canonical = {}
    for name in names:
        if _BUFFERS.search(name) or (tied and name == "lm_head.weight"):
            continue
        bare = gpt2 and not name.startswith("transformer.")
        canonical[name] = f"transformer.{name}" if bare else name
    return canonical


def names_in_files(stored: Iterable[str], wanted: Mapping[str, Any]) -> dict[str, str]:
    """The name that a model has for each weight in a file, by the name there; what the model does not keep is left out."""
    renamed = {}
    for name in stored:
        if name not in wanted and (_BUFFERS.search(name) or name == "lm_head.weight"):
            continue
        prefixed = f"transformer.{name}"
        renamed[name] = prefixed if name not in wanted and prefixed in wanted else name
    return renamed


def _shapes(files: list[Path], config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= {name: tuple(entry["shape"]) for name, entry in read_header(file).items() if name != "__metadata__"}
    names = canonical_names(shapes, config)
    return sorted((new, shapes[old]) for old, new in names.items())


def _fact(facts: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        if facts.get(key) is not None:
            return int(facts[key])
    raise KeyError(f"it has none of {', '.join(keys)}")


def _fetch(identifier: str, revision: str | None, *, trust_remote_code: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{identifier} is on the Hub, and fetching it needs `huggingface_hub`: pip install 'mlx-forget[hf]'"
        ) from None
    patterns = [*_FILES, "*.py"] if trust_remote_code else list(_FILES)
    try:
        return Path(snapshot_download(identifier, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise _refusal(identifier + (f"@{revision}" if revision else ""), error) from None


def _refusal(name: str, error: Exception) -> UserError:
    """What the Hub did not give, as one sentence with the way out."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split())
    if "GatedRepoError" in kinds or "401" in text[:40]:
        return UserError(f"{name} is gated or private: accept its terms on its page on the Hub, then run: hf auth login")
    if "RevisionNotFoundError" in kinds:
        return UserError(f"{name}: there is no such revision on the Hub.")
    if "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds:
        return UserError(f"{name} is no folder here, and no model of that name is on the Hub (or it is private: hf auth login).")
    if "LocalEntryNotFoundError" in kinds or "OfflineModeIsEnabled" in kinds or isinstance(error, OSError):
        return UserError(
            f"{name} is no folder here and not in the Hub's cache, and the Hub cannot be reached: go online, unset HF_HUB_OFFLINE, "
            "or give a folder with its files."
        )
    return UserError(f"{name} cannot be fetched from the Hub ({type(error).__name__}): {text[:200]}")
