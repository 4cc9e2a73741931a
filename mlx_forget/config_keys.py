"""Every key of a run, its type, its only default and its help, in the order of `--help`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_forget.adapters import ALL_LINEAR, ATTENTION
from mlx_forget.ladder import SIZES
from mlx_forget.methods import METHODS
from mlx_forget.schedule import DECAYS, Decay
from mlx_forget.specs import Optimizer, Precision

# A built-in corpus stands for the small set that a user has.
BUILTIN_TARGET_TOKENS = 100_000
EVALUATIONS_PER_RUN = 20

# What `replay_data` may be besides data.
REPLAY_SELF, REPLAY_ONLINE, REPLAY_PRETRAIN = "self", "online", "pretrain"
# What `reference_log_probs` is where a forward pass gives them every step.
REFERENCE_LIVE = "live"
# The p of injection where nobody says.
INJECTED_SHARE = "1%"


def _key(default: Any, text: str, *, science: bool = True, aliases: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "science": science, "aliases": aliases})


def _machine(default: Any, text: str, *, aliases: tuple[str, ...] = ()) -> Any:
    return _key(default, text, science=False, aliases=aliases)


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """Every key of `forget train`; `science` ones name a run, the others are the affair of a machine."""

    backend: str = _machine("auto", "mlx, cuda (PyTorch, also on a CPU) or auto.")
    model: str = _key(
        "0.65m",
        f"Ladder size ({', '.join(SIZES)}), LAYERSxWIDTH, or a checkpoint to finetune: a Hugging Face folder or id\\[@revision].",
    )
    init: str = _key(
        "auto",
        "Start weights: a run, checkpoint or Hugging Face folder or id, scratch, or auto: those of a checkpoint that is --model, else the "
        "base model of `base`, trained once and kept.",
    )
    trust_remote_code: bool = _machine(False, "Run the Python code that comes with a checkpoint.")
    target: str = _key(
        "code",
        "What to learn: a built-in corpus, a recipe, a store, a file, a folder or a Hub id; or several: NAME=70%,NAME=30%.",
        aliases=("data",),
    )
    pretrain: str | None = _key("prose", "What not to forget, in the same forms; none measures no forgetting.", aliases=("replay",))
    p: str = _key(
        None,
        f"Share of rows that are pretraining data: 1%; 0..5%, a ramp; or 50% until 90%, 5%. Default: {INJECTED_SHARE} for injection, else 0.",
        aliases=("replay_ratio",),
    )
    p_of: Literal["rows", "tokens"] = _key("rows", "What p is a share of, where rows differ in tokens to learn.")
    pretrain_epochs: int = _key(1, "How often a pretraining row may be served.")
    rows: str = _key(
        "packed",
        "packed; documents: packed, kept apart; padded: one conversation or document a row, longer ones in several; truncated: "
        "their first row alone; whole: only those that fit a row.",
    )
    mask_prompt: bool = _key(True, "Learn only what the data marks as to be learnt, such as answers.")
    target_tokens: int | None = _key(
        None,
        f"Unique target tokens (D_ft); smaller sets are prefixes of larger ones. Default: {BUILTIN_TARGET_TOKENS:,} of a built-in corpus, else all.",
    )
    mixture: Literal["exact", "bernoulli"] = _key("exact", "How p is realised: exact counts, or independent draws.")
    method: str = _key("injection", f"How to keep from forgetting: {'; '.join(f'{n}: {m.text}' for n, m in METHODS.items())}.")
    coefficient: float | None = _key(
        None,
        f"Strength of the method: {', '.join(f'{m.strength} of {n} [{m.default:g}]' for n, m in METHODS.items() if m.strength)}.",
    )
    replay_data: str = _key(
        REPLAY_SELF,
        f"Where ntp-replay, kl-replay and ewc take rows from: {REPLAY_SELF} (sampled from the start model and kept), "
        f"{REPLAY_ONLINE} (sampled while training, never repeated), {REPLAY_PRETRAIN}, or data in the forms of --target, such as a store of forget replay.",
    )
    anchor_precision: Precision = _key(
        "fp32", "How methods that hold the weights near the start keep it: fp32, or bf16: half the memory."
    )
    replay_rows: int | None = _key(None, "Replay rows added to each step; default: a quarter of --batch-size.")
    replay_tokens: int | None = _key(
        None, "Tokens to sample where replay_data is self; default: what the run needs, at most 2M, then they repeat."
    )
    fine_tune_type: Literal["full", "lora", "dora", "ia3"] = _key(
        "full",
        "full: train every weight; lora, dora: freeze them and train low-rank adapters, which are all that is saved; ia3: vectors that scale "
        "keys, values and what enters the feed-forward's last map.",
    )
    lora_rank: int = _key(8, "Rank of the adapters.", aliases=("lora_r", "rank"))
    lora_alpha: float = _key(16.0, "What the adapters' product is multiplied by, together with --lora-scaling.")
    lora_scaling: Literal["alpha/r", "alpha/sqrt(r)", "none"] = _key(
        "alpha/r", "alpha/r; alpha/sqrt(r), which is rsLoRA; or none, which is 1."
    )
    lora_dropout: float = _key(0.0, "Share of an adapter's inputs that a step leaves out.")
    lora_target_modules: str = _key(
        ATTENTION,
        f"What gets an adapter: {ATTENTION}, {ALL_LINEAR}, or names of modules such as attn.c_attn,mlp.c_fc.",
        aliases=("lora_target", "target_modules"),
    )
    lora_num_layers: int | None = _key(
        None,
        "Only the last so many blocks are trained: their adapters, or with --fine-tune-type full their weights; default: all.",
        aliases=("num_layers",),
    )
    compare_to_start: bool = _key(
        False,
        "Compare with the start model at every evaluation: cross-entropy to its distribution (the forgetting L_f of Kalajdzievski 2024), KL "
        "and agreement on the pretraining windows.",
    )
    reference_log_probs: str = _key(
        REFERENCE_LIVE,
        "Where kl-replay takes the start model's log-probabilities from: live (a forward pass every step), full (float16, kept beside the "
        "replay store), or top-64 and the like (the likeliest tokens and the exact rest).",
    )
    replay_limits: Mapping[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Of a source of replay_data that is named here, only the first so many tokens are replayed.",
            "science": False,
            "aliases": (),
            "cli": False,
        },
    )
    tokenizer: str | None = _key(
        None,
        "A tokenizer.model or tokenizer.json, a folder or Hub id (hf:OWNER/NAME) that has one; default: the base's, else one trained on the built-in prose.",
    )
    vocab_size: int = _key(2048, "Vocabulary of the built-in tokenizer.")

    iters: int = _key(600, "Optimiser steps.", aliases=("max_steps",))
    tokens_per_param: float | None = _key(None, "Train this many tokens per parameter instead of --iters steps.")
    batch_size: int = _key(16, "Rows per step, over all devices.")
    max_seq_length: int | None = _key(
        None,
        "Tokens per row; default: the base's context (of a Hugging Face checkpoint at most 2048), 128 for laptop sizes, 1024 above.",
        aliases=("sequence_len",),
    )
    learning_rate: float | None = _key(
        None,
        "Peak rate; default: by size from scratch, a fixed share of the base's peak when finetuning, 1e-5 for checkpoints of other tools.",
    )
    lr_schedule: Decay | None = _key(None, f"{', '.join(DECAYS)}; default: cosine from scratch, constant when finetuning.")
    warmup: float = _key(0.005, "Share of the steps that warm up.")
    lr_final: float = _key(0.01, "Last rate over the peak, of every schedule but constant.")
    lr_decay_share: float = _key(0.2, "Share of the steps in which wsd and infinite decay at the end.")
    lr_cooldown_share: float = _key(0.25, "Share of the steps in which infinite falls to its plateau.")
    lr_plateau: float = _key(0.5, "Rate of infinite's plateau over the peak.")
    optimizer: Optimizer = _key("adamw", "adamw, or adafactor: its second moments of a matrix are a row and a column.")
    weight_decay: float = _key(0.1, "Decoupled decay of matrices and embeddings, multiplied by the rate.")
    beta1: float = _key(0.9, "AdamW's first decay.")
    beta2: float = _key(0.95, "AdamW's second decay.")
    beta2_half_life_tokens: int | None = _key(
        None, "Tokens after which a gradient counts half in AdamW's second moment, whatever the batch size; replaces --beta2."
    )
    max_grad_norm: float = _key(5.0, "Clip the global gradient norm; 0: never.")
    seed: int = _key(0, "Orders the data; initialises a model from scratch.")

    steps_per_eval: int | None = _key(
        None, f"Steps between evaluations; default: {EVALUATIONS_PER_RUN} evaluations.", aliases=("eval_steps",)
    )
    eval_rows: int = _key(128, "Frozen windows per evaluation set.")
    stop_target_loss: float | None = _key(None, "Stop once the target validation loss is at or below this.")
    stop_patience: int | None = _key(None, "Stop after this many evaluations without a better target validation loss.")
    stop_tokens: int | None = _key(None, "Stop after this many training tokens.")
    stop_epochs: float | None = _key(None, "Stop after this many passes over the target tokens.")
    max_forgetting: float | None = _key(
        None, "Stop once pretraining loss has risen by more than this, in nats; best stays under it."
    )
    max_skipped: int = _key(0, "Non-finite updates to survive before the run counts as diverged.")
    stop_minutes: float | None = _machine(None, "Stop after this many minutes of training.")

    precision: Literal["auto", "fp32", "bf16"] = _machine("auto", "auto: bf16 on a GPU that multiplies it fast, else fp32.")
    device: str | None = _machine(None, "Insist on a device such as cuda:1 or cpu.")
    compile: bool | None = _machine(None, "Compile the step; default: where it pays.")
    micro_batch_size: int | None = _machine(
        None, "Rows per forward pass; the result is that of the whole batch. Default: as many as fit."
    )
    grad_checkpoint: bool = _machine(False, "Recompute activations to save memory.", aliases=("gradient_checkpointing",))
    shard: bool = _machine(False, "Share weights, gradients and moments among the processes of the run (PyTorch's FSDP2).")
    num_threads: int | None = _machine(None, "CPU threads.")
    memory_limit_gb: float | None = _machine(None, "Never use more memory than this.")
    steps_per_report: int = _machine(10, "Steps between progress reports.", aliases=("logging_steps",))
    log_to: Literal["tensorboard", "wandb"] | None = _machine(
        None, "Write losses for tensorboard or wandb (offline) too, into the run folder.", aliases=("report_to",)
    )
    save_every: int | None = _machine(None, "Steps between checkpoints; default: at every evaluation.", aliases=("save_steps",))

    base: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Keys of the pretraining run behind init: auto.",
            "science": True,
            "aliases": (),
            "cli": False,
        },
    )
