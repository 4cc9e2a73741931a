"""The ladder of GPT-2-style models: sizes, parameter counts, FLOPs, and the one initialiser.

A rung varies two things only, depth and width; vocabulary and context come from the data. Weights are named as Hugging Face
names GPT-2's, and every backend starts from the arrays made here, so a seed means the same model everywhere.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget.errors import UserError, unknown
from mlx_forget.pretrained import DEFAULT_ROW_LENGTH, PretrainedSpec

LAYER_NORM_EPSILON = 1e-5
# GPT-2's 0.02 at its own width of 768, scaled so that activations keep their size along the ladder.
INIT_STD_AT_768 = 0.02

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
}


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a GPT-2-style decoder: learned positions, biases, tied head.

    Args:
        num_layers: number of blocks.
        width: the residual stream's width, a multiple of `num_heads`.
        num_heads: attention heads.
        vocab_size: rows of the tied embedding matrix.
        context_length: longest input, in tokens.
    """

    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    context_length: int

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


def model_spec(name: str, vocab_size: int, context_length: int) -> ModelSpec:
    """The spec of a ladder name (`small`, `0.65m`) or of a shape written `LAYERSxWIDTH` (`4x96`).

    Heads are 64 wide from width 512 on and 32 wide below (16 where 32 does not divide the width).

    Raises:
        UserError: unknown name, or a width that no head size divides.
    """
    if name in SIZES:
        num_layers, width = SIZES[name]
    elif match := re.fullmatch(r"(\d+)x(\d+)", name):
        num_layers, width = int(match[1]), int(match[2])
    else:
        raise unknown("model size", name, SIZES)
    head_dim = next((h for h in ((64, 32, 16) if width >= 512 else (32, 16)) if width % h == 0), None)
    if num_layers < 1 or not width or head_dim is None:
        raise UserError(f"Model shape {name!r}: layers must be at least 1 and the width a multiple of 16.")
    return ModelSpec(num_layers, width, width // head_dim, vocab_size, context_length)


def is_ladder_name(name: str) -> bool:
    """Whether `model_spec` takes a name; any other stands for a checkpoint."""
    return name in SIZES or re.fullmatch(r"\d+x\d+", name) is not None


def param_shapes(spec: ModelSpec | PretrainedSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter under its Hugging Face name; GPT-2's matrices are [in, out] as its Conv1D stores them."""
    if isinstance(spec, PretrainedSpec):
        return dict(spec.shapes)
    d = spec.width
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


def num_params(spec: ModelSpec | PretrainedSpec) -> int:
    """All parameters, the tied embedding counted once: the N of the laws."""
    if isinstance(spec, PretrainedSpec):
        return spec.num_params
    return sum(int(np.prod(shape)) for shape in param_shapes(spec).values())


def num_non_embedding_params(spec: ModelSpec | PretrainedSpec) -> int:
    """Parameters without the token and position embeddings."""
    if isinstance(spec, PretrainedSpec):
        return spec.num_non_embedding_params
    return num_params(spec) - (spec.vocab_size + spec.context_length) * spec.width


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
    """Whether weight decay applies to a parameter: to matrices and both embeddings, never to biases and norms."""
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return name.endswith(".weight") and not module.startswith("ln_") and "norm" not in module


def initial_weights(spec: ModelSpec, seed: int) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield (name, float32 array), one tensor at a time: norms one, biases zero, matrices normal.

    The standard deviation is 0.02 sqrt(768 / width), divided by sqrt(2 L) in the residual projections (as GPT-2, at its width).

    Each tensor draws from a counter-based generator keyed by (seed, its index), so its values depend on nothing else.
    """
    matrix_std = INIT_STD_AT_768 * (768 / spec.width) ** 0.5
    for index, (name, shape) in enumerate(param_shapes(spec).items()):
        if ".ln_" in name and name.endswith("weight"):
            yield name, np.ones(shape, np.float32)
        elif name.endswith("bias"):
            yield name, np.zeros(shape, np.float32)
        else:
            std = matrix_std / (2 * spec.num_layers) ** 0.5 if "c_proj" in name else matrix_std
            generator = np.random.Generator(np.random.Philox(key=[seed, index]))
            yield name, generator.standard_normal(shape, np.float32) * np.float32(std)


def hf_config(spec: ModelSpec, *, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """The `config.json` with which transformers loads a ladder checkpoint as `GPT2LMHeadModel`."""
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
        "n_inner": (None, 4 * int(config.get("n_embd") or 0)),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for key, allowed in fixed.items():
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
        )
    except KeyError as missing:
        raise UserError(f"Not a ladder checkpoint: config.json has no {missing.args[0]!r}.") from None
