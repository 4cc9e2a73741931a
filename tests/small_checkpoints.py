"""Small checkpoints of real architectures with a tokenizer and a chat template of their own.

The configurations are transformers' own, the weights are named and shaped here, so that none of it needs PyTorch; where that is installed,
transformers loads them and is what the backends are compared with.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
WORDS = "the quick brown fox jumps over the lazy dog while seven wise owls sing of rivers, stones and rain. "
CONTEXT = 64

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "cohere": "CohereForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@cache
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer of about 400 pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([WORDS * 20, "user assistant system question answer number letters"], trainer)
    return tokenizer.to_str()


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE, bos: str | None = "<|bos|>", eos: str = "<|eos|>") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def vocab_size() -> int:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_json()).get_vocab_size()


def config_of(kind: str):
    """A transformers configuration: llama (with its own rotary base), llama-tied, qwen2, qwen3, gemma2, cohere or gpt2."""
    import transformers as t

    shape = {**SHAPE, "vocab_size": vocab_size(), "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1}
    return {
        # With the rotary base of Llama 3, which is no library's default.
        "llama": lambda: t.LlamaConfig(**shape, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}),
        "llama-tied": lambda: t.LlamaConfig(**shape, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**shape),
        "qwen3": lambda: t.Qwen3Config(**shape, head_dim=8, tie_word_embeddings=True),
        "gemma2": lambda: t.Gemma2Config(**shape, head_dim=8, sliding_window=CONTEXT, final_logit_softcapping=5.0),
        "cohere": lambda: t.CohereConfig(**shape, pad_token_id=0),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=vocab_size(), n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
        ),
    }[kind]()


def weight_shapes(config) -> dict[str, tuple[int, ...]]:
    """Shape of every weight under the name that transformers gives it, in its order; a tied head is left out."""
    if config.model_type == "gpt2":
        from mlx_forget.ladder import model_spec, param_shapes

        return param_shapes(model_spec(f"{config.n_layer}x{config.n_embd}", config.vocab_size, config.n_positions))
    width, wide, kind = config.hidden_size, config.intermediate_size, config.model_type
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind == "gemma2" else []
    shapes = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for number in range(config.num_hidden_layers):
        block = f"model.layers.{number}."
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (size, width)
            if kind == "qwen2":
                shapes[f"{block}self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{block}self_attn.o_proj.weight"] = (width, queries)
        if kind == "qwen3":
            shapes |= {f"{block}self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes |= {f"{block}mlp.{name}_proj.weight": (wide, width) for name in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (width, wide)
        shapes |= {f"{block}{name}.weight": (width,) for name in norms[: 1 if kind == "cohere" else None]}
    shapes["model.norm.weight"] = (width,)
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (config.vocab_size, width)}


def write_checkpoint(folder: Path, kind: str = "llama", *, seed: int = 0, scale: float = 0.2, config=None, **tokenizer) -> Path:
    """A checkpoint with random weights, large enough that every one of them matters; of a configuration of its own where one is given."""
    from safetensors.numpy import save_file

    config = config_of(kind) if config is None else config
    config.architectures, config.dtype = [ARCHITECTURES[config.model_type]], "float32"
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    generator = np.random.default_rng(seed)
    # Norms of all but Gemma are a factor, those of Gemma are one less.
    weights = {
        name: (generator.standard_normal(shape) * scale + (len(shape) == 1 and kind != "gemma2")).astype(np.float32)
        for name, shape in weight_shapes(config).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, **tokenizer)
    return folder


def transformers_logits(folder: Path, tokens, **inputs):
    """float32[B, T, V] of int[B, T] tokens, as transformers computes them; the test is skipped where there is no PyTorch."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.as_tensor(tokens).long(), **inputs).logits.numpy()
