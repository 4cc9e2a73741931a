"""What an audit reads of a store."""

from types import SimpleNamespace

import numpy as np

from mlx_forget.audit.texts import read_text
from mlx_forget.pipeline.catalog import documents_of, write_store
from mlx_forget.pipeline.vocabularies import find_tokenizer
from tests.pipeline.test_chat_template import CHATML, bare, with_template, write_chats  # noqa: F401


def test_a_conversation_begins_once(with_template, tmp_path):  # noqa: F811
    """Where BOS is the mark before a role, it is in the document and not before it."""
    vocabulary = with_template(CHATML, bos="<|im_start|>", eos="<|im_end|>")
    tokenizer = find_tokenizer(str(tmp_path / "model"))
    write_store(tmp_path / "store", [documents_of(write_chats(tmp_path))], tokenizer)
    model = SimpleNamespace(tokenizer_file=tokenizer, tokenizer=vocabulary, record=None)
    text = read_text("chats", str(tmp_path / "store"), [model], max_tokens=1000, say=lambda sentence: None)
    windows = text.windows(32)
    beginning = [vocabulary.bos_id, *vocabulary.encode("user").tolist()]
    assert (windows.tokens[:, : len(beginning)] == np.array(beginning)).all()
    assert len(windows.tokens) > 3
    assert all(len(mask) == len(document) for mask, document in zip(text.loss_masks, text.documents, strict=True))
