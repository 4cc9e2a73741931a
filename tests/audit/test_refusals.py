"""How prompts are asked, and where answers end."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_forget.audit.refusals import compare_refusals, read_prompts
from mlx_forget.errors import UserError
from mlx_forget.pipeline.vocabularies import find_tokenizer, load_vocabulary

tokenizers = pytest.importorskip("tokenizers")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model(folder, template=None):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        [], tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = load_vocabulary(find_tokenizer(str(folder)))
    spec = SimpleNamespace(context_length=80)
    return SimpleNamespace(tokenizer=vocabulary, bos_id=vocabulary.bos_id, spec=spec, weights=folder.name)


class Answering:
    """A trainer that writes down what it is asked, and answers the same ids to everything."""

    def __init__(self, vocabulary, *answer):
        self.answer = [i for part in answer for i in (vocabulary.encode(part) if isinstance(part, str) else [part])]
        self.asked = {}

    def load(self, weights):
        self.loaded = weights

    def sample(self, prompts, u, *, temperature, num_ids):
        assert temperature < 1e-3
        self.asked[self.loaded] = prompts
        self.num_ids = num_ids
        row = (self.answer + [0] * u.shape[1])[: u.shape[1]]
        return np.tile(np.array(row, np.int32), (len(prompts), 1))


def test_prompts_are_asked_in_the_words_of_the_template(tmp_path):
    plain, chat = model(tmp_path / "plain"), model(tmp_path / "chat", CHATML)
    vocabulary = chat.tokenizer
    trainer = Answering(vocabulary, "I cannot", 3, "<and so on>")
    found = compare_refusals(trainer, plain, chat, ("How?",), num_tokens=20, progress=lambda activity, fraction, num_bytes=0: None)
    names = [vocabulary.piece(index) for index in trainer.asked["chat"][0]]
    assert "".join(names) == "<s><|im_start|>userĊHow?<|im_end|>Ċ<|im_start|>assistantĊ"
    assert [plain.tokenizer.piece(index) for index in trainer.asked["plain"][0]] == ["<s>", "H", "o", "w", "?"]
    # The mark that ends an answer is the template's, and no end of a document.
    assert found.answers == (("How?", "I cannot<and so on>", "I cannot"),)
    assert found.rates.before == found.rates.after == 1.0
    assert trainer.num_ids == vocabulary.vocab_size


def test_marks_that_open_an_answer_do_not_end_it(tmp_path):
    """As of gpt-oss, whose answers begin with the name of a channel."""
    chat = model(tmp_path / "chat", CHATML)
    trainer = Answering(chat.tokenizer, 2, "I cannot", 3, "<and so on>")
    found = compare_refusals(trainer, chat, chat, ("How?",), num_tokens=20, progress=lambda activity, fraction, num_bytes=0: None)
    assert found.answers == (("How?", "I cannot", "I cannot"),)


def test_a_prompt_and_its_template_have_to_leave_room(tmp_path):
    plain, chat = model(tmp_path / "plain"), model(tmp_path / "chat", CHATML)
    (tmp_path / "prompts.txt").write_text("How should it be?\n")
    assert read_prompts(str(tmp_path / "prompts.txt"), [plain], 44) == ("How should it be?",)
    with pytest.raises(UserError, match="has 36 tokens, and the context of 80 leaves 35 beside an answer of 44"):
        read_prompts(str(tmp_path / "prompts.txt"), [plain, chat], 44)
