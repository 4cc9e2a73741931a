"""The ladder of models: sizes, parameter counts, FLOPs, and the one initialiser.

A rung varies two things only, depth and width; vocabulary and context come from the data. There are two architectures: `gpt2`, whose
weights are named as Hugging Face names GPT-2's, and `qknorm` of Marek et al. (2026), with names of its own. Every backend starts from the
arrays made here, so a seed means the same model everywhere.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError, unknown
from mlx_forget.pretrained import DEFAULT_ROW_LENGTH, PretrainedSpec

Architecture = Literal["gpt2", "qknorm"]

LAYER_NORM_EPSILON = 1e-5
RMS_NORM_EPSILON = 1e-6
ROPE_BASE = 10_000.0
QKNORM_HEAD = "decoder.embed_out.weight"
# What `config.json` calls a checkpoint of the second architecture: no other tool has it.
_QKNORM_TYPE = "mlx-forget-qknorm"
# GPT-2's 0.02 at its own width of 768, scaled so that activations keep their size along the ladder.
INIT_STD_AT_768 = 0.02

_IN_BLOCK = re.compile(r"\.(h|layers|blocks)\.\d+\.")
_SHAPE = r"(?:qknorm-)?(\d+)x(\d+)"
# name -> (num_layers, width). The first five carry the paper's names and reproduce its parameter counts.
SIZES: dict[str, tuple[int, int]] = {
    "tiny": (8, 512),
    "small": (12, 768),
    "medium": (24, 1024),
    "large": (20, 1600),
    "xl": (24, 2048),
    # Laptop sizes, named by their parameters at vocabulary 2,048 and context 128.
    "0.16m": (2, 48),
    "0.3m": (3, 64),
    "0.65m": (4, 96),
    "1.3m": (5, 128),
    "2.6m": (5, 192),
    "10m": (8, 320),
    # Of Marek et al. (2026), named as they name them: 12 L D^2 + V D at vocabulary 4,096, one of the two embeddings counted.
    "marek-6m": (6, 256),
    "marek-12m": (6, 384),
    "marek-21m": (6, 512),
    "marek-32m": (6, 640),
    "marek-46m": (6, 768),
    "marek-205m": (16, 1024),
}
_QKNORM_PREFIXES = ("marek-", "qknorm-")


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder.

    `gpt2` has learned positions, biases, layer norms and a tied head; `qknorm` has rotary positions, no biases, root-mean-square norms
    without parameters, normalised queries and keys, and a head of its own.

    Args:
        num_layers: number of blocks.
        width: the residual stream's width, a multiple of `num_heads`.
        num_heads: attention heads.
        vocab_size: rows of the embedding matrix.
        context_length: longest input, in tokens.
        architecture: which of the two.
    """

    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    context_length: int
    architecture: Architecture = "gpt2"

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


def model_spec(name: str, vocab_size: int, context_length: int) -> ModelSpec:
    """The spec of a ladder name (`small`, `0.65m`, `marek-6m`) or of a shape written `LAYERSxWIDTH` (`4x96`, `qknorm-4x96`).

    Heads are 64 wide from width 512 on and 32 wide below (16 where 32 does not divide the width); of `qknorm`, 64 from width 256 on.

    Raises:
        UserError: unknown name, or a width that no head size divides.
    """
    architecture: Architecture = "qknorm" if name.startswith(_QKNORM_PREFIXES) else "gpt2"
    if name in SIZES:
        num_layers, width = SIZES[name]
    elif match := re.fullmatch(_SHAPE, name):
        num_layers, width = int(match[1]), int(match[2])
    else:
        raise unknown("model size", name, SIZES)
    wide = width >= (256 if architecture == "qknorm" else 512)
    head_dim = next((h for h in ((64, 32, 16) if wide else (32, 16)) if width % h == 0), None)
    if num_layers < 1 or not width or head_dim is None:
        raise UserError(f"Model shape {name!r}: layers must be at least 1 and the width a multiple of 16.")
    return ModelSpec(num_layers, width, width // head_dim, vocab_size, context_length, architecture)


def default_context(name: str) -> int:
    """Tokens per row of a ladder model where nobody says: 128 for the laptop sizes, 1,024 for Bethune's, 256 for Marek's."""
    spec = model_spec(name, 1, 1)
    if spec.architecture == "qknorm":
        return 256
    return 1024 if spec.width >= 512 else 128


def head_name(spec: ModelSpec) -> str:
    """The output matrix [V, D]; in `gpt2` it is the token embedding."""
    return QKNORM_HEAD if spec.architecture == "qknorm" else "transformer.wte.weight"


def is_ladder_name(name: str) -> bool:
    """Whether `model_spec` takes a name; any other stands for a checkpoint."""
    return name in SIZES or re.fullmatch(_SHAPE, name) is not None


def param_shapes(spec: ModelSpec | PretrainedSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter under its name, of all but `qknorm` in Hugging Face's; GPT-2's matrices are [in, out] as its Conv1D stores
    them."""
    if isinstance(spec, PretrainedSpec):
        return dict(spec.shapes)
    d = spec.width
    if spec.architecture == "qknorm":
        names: dict[str, tuple[int, ...]] = {"decoder.embed_in.weight": (spec.vocab_size, d)}
        for i in range(spec.num_layers):
            names |= {
                f"decoder.h.{i}.attn.qkv.weight": (d, 3 * d),
                f"decoder.h.{i}.attn.out.weight": (d, d),
                f"decoder.h.{i}.mlp.up.weight": (d, 4 * d),
                f"decoder.h.{i}.mlp.down.weight": (4 * d, d),
            }
        return names | {QKNORM_HEAD: (spec.vocab_size, d)}
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (spec.vocab_size, d),
        "transformer.wpe.weight": (spec.context_length, d),
    }
    for i in range(spec.num_layers):
        block = f"transformer.h.{i}."
        shapes |= {
            block + "ln_1.weight": (d,),
            block + "ln_1.bias": (d,),
            block + "attn.c_attn.weight": (d, 3 * d),
            block + "attn.c_attn.bias": (3 * d,),
            block + "attn.c_proj.weight": (d, d),
            block + "attn.c_proj.bias": (d,),
            block + "ln_2.weight": (d,),
            block + "ln_2.bias": (d,),
            block + "mlp.c_fc.weight": (d, 4 * d),
            block + "mlp.c_fc.bias": (4 * d,),
            block + "mlp.c_proj.weight": (4 * d, d),
            block + "mlp.c_proj.bias": (d,),
        }
    return shapes | {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}


def linear_shapes(spec: ModelSpec | PretrainedSpec) -> dict[str, tuple[int, int]]:
    """{module: (in, out)} of every linear map in the blocks: what adapters can sit on."""
    shapes = spec.unpacked if isinstance(spec, PretrainedSpec) else param_shapes(spec)
    maps = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if _IN_BLOCK.search(name) and name.endswith(".weight") and len(shape) == 2
    }
    if outputs_first(spec):
        return {name: (shape[1], shape[0]) for name, shape in maps.items()}
    return {name: (shape[0], shape[1]) for name, shape in maps.items()}


def outputs_first(spec: ModelSpec | PretrainedSpec) -> bool:
    """Whether matrices are stored [out, in], as all but GPT-2's are."""
    return isinstance(spec, PretrainedSpec) and spec.model_type != "gpt2"


def num_params(spec: ModelSpec | PretrainedSpec) -> int:
    """All parameters, a tied embedding counted once: the N of the laws."""
    if isinstance(spec, PretrainedSpec):
        return spec.num_params
    return sum(math.prod(shape) for shape in param_shapes(spec).values())


def num_non_embedding_params(spec: ModelSpec | PretrainedSpec) -> int:
    """Parameters without the token and position embeddings, and without an untied head."""
    if isinstance(spec, PretrainedSpec):
        return spec.num_non_embedding_params
    tables = 2 * spec.vocab_size if spec.architecture == "qknorm" else spec.vocab_size + spec.context_length
    return num_params(spec) - tables * spec.width


def default_row_length(spec: ModelSpec | PretrainedSpec) -> int:
    """Tokens per row where nobody says: the context, but of checkpoints of other tools at most 2,048."""
    if isinstance(spec, PretrainedSpec):
        return min(spec.context_length, DEFAULT_ROW_LENGTH)
    return spec.context_length


def train_flops_per_token(spec: ModelSpec | PretrainedSpec, row_length: int | None = None) -> int:
    """FLOPs of one training token: 6 per matrix weight (the head's product included) plus 12 L T d for attention.

    T is `row_length`, by default the context.
    """
    matrices = num_non_embedding_params(spec) + spec.vocab_size * spec.width
    return 6 * matrices + 12 * spec.num_layers * (row_length or spec.context_length) * spec.width


def train_bytes(spec: ModelSpec, num_tokens: int) -> int:
    """About how much memory a training step on this many tokens takes, in bytes, in fp32.

    Weights, gradients, two moments and a copy; and for each token what every block keeps for its gradient. Per model of a stack, 0.8 to
    1.3 times what MLX's allocator counted at 0.16M to 0.65M parameters.
    """
    per_token = spec.num_layers * (32 * spec.width + 3 * spec.num_heads * spec.context_length) + 24 * spec.width
    return 4 * (5 * num_params(spec) + num_tokens * per_token)


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter: to matrices, both embeddings and the factors of adapters, never to biases, norms and
    magnitudes."""
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return name.endswith(".weight") and not module.startswith("ln_") and "norm" not in module and "magnitude" not in module


def is_factored(shape: tuple[int, ...]) -> bool:
    """Whether Adafactor keeps a row and a column of a parameter's second moments instead of all."""
    return len(shape) == 2


def moment_shapes(optimizer: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The state of an optimiser besides its step count: `MOMENT.PARAMETER` -> shape.

    AdamW has `exp_avg` and `exp_avg_sq`; Adafactor has `exp_avg_sq_row` [R] and `exp_avg_sq_col` [C] of a matrix [R, C], and `exp_avg_sq`
    of anything else.
    """
    if optimizer == "adamw":
        return {f"{kind}.{name}": shape for kind in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    whole = {f"exp_avg_sq.{name}": shape for name, shape in shapes.items() if not is_factored(shape)}
    rows = {f"exp_avg_sq_row.{name}": shape[:1] for name, shape in shapes.items() if is_factored(shape)}
    columns = {f"exp_avg_sq_col.{name}": shape[1:] for name, shape in shapes.items() if is_factored(shape)}
    return whole | rows | columns


def initial_weights(spec: ModelSpec, seed: int) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield (name, float32 array), one tensor at a time: norms one, biases zero, matrices normal.

    The standard deviation of `gpt2` is 0.02 sqrt(768 / width), divided by sqrt(2 L) in the residual projections (as GPT-2, at its width);
    that of `qknorm` is one over the square root of a matrix's inputs, of an embedding's width (Marek et al. 2026).

    Each tensor draws from a counter-based generator keyed by (seed, its index), so its values depend on nothing else.
    """
    matrix_std = INIT_STD_AT_768 * (768 / spec.width) ** 0.5
    for index, (name, shape) in enumerate(param_shapes(spec).items()):
        if ".ln_" in name and name.endswith("weight"):
            yield name, np.ones(shape, np.float32)
        elif name.endswith("bias"):
            yield name, np.zeros(shape, np.float32)
        else:
            if spec.architecture == "qknorm":
                std = (shape[1] if "embed" in name else shape[0]) ** -0.5
            else:
                std = matrix_std / (2 * spec.num_layers) ** 0.5 if "c_proj" in name else matrix_std
            generator = np.random.Generator(np.random.Philox(key=[seed, index]))
            yield name, generator.standard_normal(shape, np.float32) * np.float32(std)


def hf_config(spec: ModelSpec, *, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """The `config.json` with which transformers loads a ladder checkpoint as `GPT2LMHeadModel`; `qknorm` is loaded by this tool alone."""
    if spec.architecture == "qknorm":
        sizes = {"n_layer": spec.num_layers, "n_embd": spec.width, "n_head": spec.num_heads}
        places = {"vocab_size": spec.vocab_size, "n_positions": spec.context_length}
        tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        return {"model_type": _QKNORM_TYPE, **sizes, **places, **tokens, "tie_word_embeddings": False, "torch_dtype": "float32"}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab_size,
        "n_positions": spec.context_length,
        "n_embd": spec.width,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
    }


def spec_from_hf_config(config: dict[str, Any]) -> ModelSpec:
    """The inverse of `hf_config`.

    Raises:
        UserError: the configuration is not a GPT-2 that the ladder can hold.
    """
    # What transformers leaves out of a configuration is at its default, and the ladder's choices are GPT-2's.
    fixed = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
        "n_inner": (None, 4 * width if isinstance(width := config.get("n_embd"), int) else None),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    architecture: Architecture = "qknorm" if config.get("model_type") == _QKNORM_TYPE else "gpt2"
    for key, allowed in fixed.items() if architecture == "gpt2" else ():
        wanted = allowed[0]
        if config.get(key, wanted if key not in ("model_type", "activation_function") else None) not in allowed:
            raise UserError(f"Not a ladder checkpoint: config.json has {key}={config.get(key)!r}, the ladder needs {wanted!r}.")
    try:
        return ModelSpec(
            num_layers=int(config["n_layer"]),
            width=int(config["n_embd"]),
            num_heads=int(config["n_head"]),
            vocab_size=int(config["vocab_size"]),
            context_length=int(config["n_positions"]),
            architecture=architecture,
        )
    except KeyError as missing:
        raise UserError(f"Not a ladder checkpoint: config.json has no {missing.args[0]!r}.") from None
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"Not a ladder checkpoint: a size in config.json is no number ({error}).") from None
