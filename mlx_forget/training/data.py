"""The data of a run: which sources a configuration names, their rows by step, the frozen windows, and the rows that are replayed."""

from fractions import Fraction
from pathlib import Path

from mlx_forget.config import TrainConfig
from mlx_forget.config_keys import BUILTIN_TARGET_TOKENS, REPLAY_ONLINE, REPLAY_PRETRAIN, REPLAY_SELF
from mlx_forget.errors import UserError
from mlx_forget.evaluate import Windows
from mlx_forget.methods import METHODS
from mlx_forget.pipeline.batches import BatchStream
from mlx_forget.pipeline.corpora import CORPORA
from mlx_forget.pipeline.mixture import Mixture
from mlx_forget.pipeline.rows import Layout
from mlx_forget.pipeline.shares import ShareSchedule, Stage, constant_share, parse_sources, parse_stages
from mlx_forget.pipeline.sides import Blend, RowSubset, Side
from mlx_forget.pipeline.store import TokenStore

# The Fisher information of EWC is measured on this many rows.
FISHER_ROWS = 256
# A run samples no more of its start model unless it is told to.
MAX_SAMPLED_TOKENS = 2_000_000


def replay_name(config: TrainConfig) -> str | None:
    """What replay rows come from: `self`, `online`, the name of a store of the plan, or None where the method reads none."""
    if not METHODS[config.method].reads_replay:
        return None
    return config.pretrain if config.replay_data == REPLAY_PRETRAIN else config.replay_data


def stored_replay(config: TrainConfig) -> dict[str, Fraction]:
    """The stores that replay rows come from, with their shares; none where the model is sampled during the run."""
    name = replay_name(config)
    return {} if name in (None, REPLAY_SELF, REPLAY_ONLINE) else sources_of(name)


def replay_rows_per_step(config: TrainConfig) -> int:
    """Rows that the method adds to each step."""
    return 0 if config.method_spec().replay_term is None else config.replay_rows or max(1, config.batch_size // 4)


def sampled_tokens(config: TrainConfig, num_steps: int, length: int) -> int:
    """Tokens that a run with `replay_data: self` samples of its start model."""
    needed = (
        num_steps * replay_rows_per_step(config) * length if config.method_spec().replay_term is not None else FISHER_ROWS * length
    )
    return config.replay_tokens or min(needed, MAX_SAMPLED_TOKENS)


def sources_of(name: str | None) -> dict[str, Fraction]:
    """The sources behind --target or --pretrain with their shares: one, or several as NAME=SHARE,NAME=SHARE; none of None."""
    if name is None:
        return {}
    # Where "=" is followed by a slash and no share such as 1/3, it is part of a path, as in folders named KEY=VALUE.
    last = name.rpartition("=")[2]
    is_path = ("/" in last and not last.replace("/", "", 1).strip().isdigit()) or Path(name).expanduser().exists()
    return {name: Fraction(1)} if is_path else parse_sources(name)


def identity_of(shares: dict[str, Fraction], stores: dict[str, TokenStore]) -> str | None:
    """What a side is for a run's name: a fingerprint, or those of several sources with their shares."""
    if len(shares) < 2:
        return next((stores[name].fingerprint for name in shares), None)
    return ",".join(f"{stores[name].fingerprint}={share}" for name, share in shares.items())


def run_data(
    config: TrainConfig, stores: dict[str, TokenStore], row_length: int
) -> tuple[BatchStream, tuple[Windows, Windows, Windows | None], int]:
    """The batch stream, the three frozen window sets and the number of steps after token and epoch limits."""
    layout: Layout = config.rows  # type: ignore[assignment]

    def side(name: str | None, split: str, num_tokens: int | None = None) -> Side:
        """The rows of one source, or of several by their shares, of which each has its share of the tokens."""
        shares = sources_of(name)
        members = tuple(
            RowSubset.of_tokens(
                stores[source].split(split),
                row_length,
                None if num_tokens is None else int(num_tokens * share),
                layout=layout,
                mask_prompt=config.mask_prompt,
            )
            for source, share in shares.items()
        )
        return members[0] if len(members) == 1 else Blend(members, tuple(shares.values()))

    num_tokens = config.target_tokens
    if num_tokens is None and config.target in CORPORA and not config.is_pretraining:
        num_tokens = min(BUILTIN_TARGET_TOKENS, stores[config.target].split("train").num_tokens)
    target = side(config.target, "train", num_tokens)
    pretrain = None
    if config.pretrain is not None and not config.is_pretraining:
        pretrain = side(config.pretrain, "train")
    share, stages = _row_shares(config, target, pretrain)
    num_steps = config.iters
    if config.stop_tokens is not None:
        num_steps = min(num_steps, config.stop_tokens // (config.batch_size * row_length))
    if config.stop_epochs is not None:
        if share is None:
            raise UserError("--stop-epochs needs a constant p: give --iters instead.")
        target_rows = config.stop_epochs * target.num_rows
        num_steps = min(num_steps, int(target_rows / (config.batch_size * (1 - share))))
    if num_steps < 1:
        raise UserError("The token or epoch limit is below one step: raise it, or lower --batch-size.")
    mixture = Mixture(
        target.num_rows,
        pretrain.num_rows if pretrain else 0,
        ShareSchedule(stages, num_steps * config.batch_size) if share is None else share,
        config.seed,
        config.mixture,
        target=target.mixture_members() if isinstance(target, Blend) else (),
        pretrain=pretrain.mixture_members() if isinstance(pretrain, Blend) else (),
        pretrain_epochs=config.pretrain_epochs,
    )
    mixture.check_pool(num_steps * config.batch_size, row_length)
    stream = BatchStream(target=target, pretrain=pretrain, mixture=mixture, batch_size=config.batch_size, num_steps=num_steps)

    def validation(name: str) -> Windows:
        return Windows.of(name, side(name, "validation"), config.eval_rows)

    target_val = validation(config.target)
    if config.is_pretraining or config.pretrain == config.target:
        pretrain_val: Windows | None = target_val
    else:
        pretrain_val = None if config.pretrain is None else validation(config.pretrain)
    return stream, (Windows.of("train", target, config.eval_rows), target_val, pretrain_val), num_steps


def _row_shares(config: TrainConfig, target: Side, pretrain: Side | None) -> tuple[Fraction | None, tuple[Stage, ...]]:
    """p as a share of rows: the constant one or None, and its stages.

    A share of tokens is converted by the mean number of tokens that count in a row as each side is served.
    """
    share, stages = constant_share(config.p), parse_stages(config.p)
    if config.p_of == "rows" or pretrain is None:
        return share, stages
    per_target, per_pretrain = (_tokens_per_row(side) for side in (target, pretrain))

    def of_rows(p: Fraction) -> Fraction:
        return (p * per_target / (p * per_target + (1 - p) * per_pretrain)).limit_denominator(10**9)

    converted = tuple(Stage(of_rows(stage.first), of_rows(stage.last), stage.until) for stage in stages)
    return None if share is None else of_rows(share), converted


def _tokens_per_row(side: Side) -> Fraction:
    """The mean number of tokens that count in a row of a side; of several sources by their shares, whatever their sizes."""
    if isinstance(side, Blend):
        return sum((share * _tokens_per_row(one) for one, share in zip(side.members, side.shares, strict=True)), Fraction(0))
    return Fraction(side.num_tokens, side.num_rows)
