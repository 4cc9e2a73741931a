"""What a run asks of its backend and of its start: methods, replay and adapters that cannot be are refused before anything is made."""

from mlx_forget.config import TrainConfig
from mlx_forget.config_keys import REFERENCE_LIVE, REPLAY_ONLINE, REPLAY_PRETRAIN, REPLAY_SELF
from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec
from mlx_forget.methods import METHODS, TERM_REPLAY_KL
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.trainer import Capabilities


def check_method(config: TrainConfig, backend: str, capabilities: Capabilities) -> None:
    """Refuse a method that the backend has not, or that reads what the run has not.

    Raises:
        UserError: what is missing, and the way out.
    """
    method = config.method_spec()
    terms = [term for term, coefficient in enumerate(method.coefficients) if coefficient]
    lacking = [term for term in terms if term not in capabilities.terms]
    if lacking or (method.has_anchor and not capabilities.anchor) or (method.ewc and not capabilities.fisher):
        raise UserError(f"Backend {backend!r} does not have what method {config.method!r} needs.")
    row = METHODS[config.method]
    if config.fine_tune_type != "full":
        _check_adapters(config, backend, capabilities)
    elif config.trained_layers is not None and (config.is_pretraining or config.shard or method.has_anchor):
        what = "starts from scratch" if config.is_pretraining else "shares weights" if config.shard else f"is by {config.method}"
        raise UserError(
            f"--num-layers freezes all weights but those of the last blocks, and this run {what}: leave one of them out."
        )
    if config.compare_to_start and (config.is_pretraining or config.pretrain is None):
        raise UserError(
            "--compare-to-start reads the pretraining windows of a finetune: give --init and --pretrain, or leave it out."
        )
    if config.is_pretraining and (method.reference is not None or row.reads_replay):
        raise UserError(f"Method {config.method!r} keeps what a start model knows, and init: scratch has none: give --init.")
    if row.reads_replay and config.replay_data == REPLAY_PRETRAIN and config.pretrain is None:
        raise UserError(
            "--replay-data pretrain replays the pretraining data, and --pretrain is none: give it, or --replay-data self."
        )
    if row.reads_replay and config.replay_data == REPLAY_ONLINE and method.ewc:
        raise UserError(
            "The Fisher information of ewc is measured before training: --replay-data online has no rows then; take self."
        )
    if config.shard and (method.has_kl or method.ewc or config.compare_to_start):
        what = "--compare-to-start" if config.compare_to_start else f"Method {config.method!r}"
        raise UserError(f"{what} reads a whole second model: it does not go with --shard.")
    if config.shard and config.optimizer != "adamw":
        raise UserError(f"Optimizer {config.optimizer!r} needs whole matrices: --shard takes adamw.")
    if config.reference_log_probs != REFERENCE_LIVE and config.shard:
        raise UserError("A sharded model does not give its log-probabilities away: leave reference_log_probs live.")
    if config.reference_log_probs != REFERENCE_LIVE and (
        method.replay_term != TERM_REPLAY_KL or config.replay_data == REPLAY_ONLINE
    ):
        what = "online replay, whose rows never come again" if method.replay_term == TERM_REPLAY_KL else f"method {config.method!r}"
        if row.reads_replay and config.coefficient == 0 and METHODS[config.method].make(1.0).replay_term == TERM_REPLAY_KL:
            what = f"{config.method} with coefficient 0, which asks nothing"
        raise UserError(
            f"reference_log_probs {config.reference_log_probs} keeps what kl-replay asks of stored rows, not of {what}: leave it live."
        )
    if row.reads_replay and config.replay_data in (REPLAY_SELF, REPLAY_ONLINE) and not capabilities.sample:
        raise UserError(f"Backend {backend!r} cannot sample: give --replay-data.")


def check_model(config: TrainConfig, model: ModelSpec | PretrainedSpec) -> None:
    """Refuse what this model cannot be trained with.

    Raises:
        UserError: it has fewer blocks than are asked for, or cannot be shared among processes.
    """
    if config.shard and not isinstance(model, ModelSpec):
        raise UserError("--shard knows the models of the ladder: leave it out for a checkpoint of another tool.")
    if config.lora_num_layers is not None and config.lora_num_layers > model.num_layers:
        raise UserError(
            f"--num-layers is {config.lora_num_layers}, but {config.start_name or config.model} has {model.num_layers} blocks: give at "
            "most so many, or leave it out to train all."
        )


def _check_adapters(config: TrainConfig, backend: str, capabilities: Capabilities) -> None:
    """Refuse adapters where they cannot be, or where the method is about the weights that they freeze."""
    if config.fine_tune_type not in capabilities.adapters:
        raise UserError(f"Backend {backend!r} has no {config.fine_tune_type}: leave --fine-tune-type out.")
    if config.is_pretraining:
        raise UserError(
            f"--fine-tune-type {config.fine_tune_type} freezes the start weights, and init: scratch has none: give --init."
        )
    if config.shard:
        raise UserError("--shard shares what is trained, and adapters are small: leave it out.")
    if config.method_spec().has_anchor:
        raise UserError(
            f"Method {config.method!r} holds every weight near its start, where adapters freeze them: take kl-replay, ntp-replay, lwf or "
            "injection, or --fine-tune-type full."
        )
