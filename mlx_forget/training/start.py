"""What a finetune starts from: the checkpoint that a configuration names, and what a run must respect because of it."""

import dataclasses

from mlx_forget import checkpoint
from mlx_forget.checkpoint import Checkpoint
from mlx_forget.config import TrainConfig
from mlx_forget.errors import UserError
from mlx_forget.ladder import ModelSpec, model_spec
from mlx_forget.pipeline.hub import parse_id
from mlx_forget.pipeline.opened import Opened
from mlx_forget.pipeline.store import TokenStore
from mlx_forget.pipeline.vocabularies import Vocabulary, tokenizer_in
from mlx_forget.pretrained import PretrainedSpec
from mlx_forget.trainer import Capabilities
from mlx_forget.training.watch import Watch


def find_start(config: TrainConfig) -> Checkpoint:
    """The checkpoint that `--init`, or a `--model` that is no ladder name, stands for.

    Raises:
        UserError: there is none.
    """
    name = config.start_name
    assert name is not None
    try:
        return checkpoint.find_checkpoint(name, trust_remote_code=config.trust_remote_code)
    except UserError as error:
        if config.init == "auto" and "There is no checkpoint" in str(error) and parse_id(name) is None and "/" not in name:
            # Most likely a ladder name with a slip: the sentence that lists them.
            model_spec(name, 1, 1)
        raise


def fit_to_start(
    config: TrainConfig,
    start: Checkpoint,
    model: ModelSpec | PretrainedSpec,
    capabilities: Capabilities,
    vocabulary: Vocabulary,
    watch: Watch,
) -> TrainConfig:
    """The configuration as a backend can run it from these weights; what it changes is said.

    Raises:
        UserError: the tokenizer has ids that the model does not know.
    """
    checkpoint.check_vocabulary(start.folder, vocabulary, model)
    if not start.is_own:
        watch.say(special_tokens(vocabulary))
    if isinstance(model, PretrainedSpec) and config.rows == "documents" and not capabilities.document_masks:
        watch.say(f"{model.architecture} takes no document mask on this backend: rows are padded instead, one document each.")
        return dataclasses.replace(config, rows="padded")
    return config


def differences(name: str, store: TokenStore, vocabulary: Vocabulary, opened: Opened) -> list[str]:
    """What a store was made with that the model does not have, a sentence each."""
    if store.tokenizer_hash == vocabulary.hash and vocabulary.chat_template is None:
        return []
    own = opened.vocabulary(tokenizer_in(store.folder))
    said = []
    for what, index, other in (("begin", store.bos_id, vocabulary.bos_id), ("end", store.eos_id, vocabulary.eos_id)):
        if index != other:
            said.append(
                f"{name} was prepared with other special tokens than the model's: its documents {what} with {own.piece(index)!r}, the "
                f"model's with {vocabulary.piece(other)!r}. Prepare it again with the model's tokenizer unless that is meant."
            )
    masked = any(split.has_loss_mask for split in store.splits.values())
    templates = [None if one.chat_template is None else one.chat_template.hash for one in (own, vocabulary)]
    if masked and templates[0] != templates[1]:
        said.append(
            f"{name} holds conversations in another form than the model's chat template: prepare it again with its tokenizer."
        )
    return said


def special_tokens(vocabulary: Vocabulary) -> str:
    """Which tokens begin rows and end documents, in a sentence."""
    names = [repr(vocabulary.piece(index)) for index in (vocabulary.bos_id, vocabulary.eos_id)]
    template = (
        "conversations by its chat template" if vocabulary.chat_template else "it has no chat template: conversations are [INST]"
    )
    return f"The checkpoint's tokenizer: rows start with {names[0]}, documents end with {names[1]}; {template}."
