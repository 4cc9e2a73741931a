"""Conversations as a Hugging Face tokenizer writes them: the tokens that transformers makes, and loss on every answer."""

import json
import shutil

import numpy as np
import pytest

from mlx_forget.errors import UserError
from mlx_forget.pipeline.catalog import documents_of, write_store
from mlx_forget.pipeline.conversations import Conversation
from mlx_forget.pipeline.encoding import encode
from mlx_forget.pipeline.rows import Rows
from mlx_forget.pipeline.vocabularies import find_tokenizer, load_vocabulary, tokenizer_in

tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]"]
TEXT = "".join(f"{i}. A note about the number {i}, and about {i * i}. Yes, please.\n" for i in range(300))

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Nothing asks for the answer, and roles must alternate.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Llama 2: the system text is part of the first question, every turn begins with BOS, and nothing asks for the answer.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = false %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Llama 3: heads around roles, and an end of turn that is no EOS.
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|user|>' + m['role'] + '<|assistant|>\n\n' + m['content'] | trim + '<|im_end|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant<|assistant|>\n\n' }}{% endif %}"
)
# The last answer is written in another way than the earlier ones, and the prompt holds what no answer begins with.
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# It says itself what is learnt: the words, and not the mark after them.
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{{ '<|im_end|>' }}{% else %}{{ '<|user|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
MESSAGES = (("user", "one note"), ("assistant", "Yes, please"), ("user", "Yes, please"), ("assistant", "the number 2"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def with_template(bare, tmp_path):
    def make(template, *, bos="<s>", eos="</s>", as_file=False):
        folder = tmp_path / "model"
        shutil.copytree(bare, folder)
        config = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
        if as_file:
            (folder / "chat_template.jinja").write_text(template)
        else:
            config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_vocabulary(find_tokenizer(str(folder)))

    return make


def write_chats(folder):
    """Forty short conversations in a file."""
    lines = [
        json.dumps(
            {"messages": [{"role": role, "content": text} for role, text in (("user", f"{i}. A note"), ("assistant", "Yes"))]}
        )
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return str(folder / "chats.jsonl")


def learnt(vocabulary, tokens, mask):
    """The runs of learnt tokens, as text with special tokens."""
    names = {index: piece for piece, index in vocabulary._encoder.get_vocab(with_added_tokens=True).items()}
    runs = np.split(np.arange(len(mask)), np.flatnonzero(np.diff(mask)) + 1)
    runs = [run for run in runs if len(run) and mask[run[0]]]
    return ["".join(names[i] if names[i] in SPECIAL else vocabulary.decode([i]) for i in tokens[run].tolist()) for run in runs]


@pytest.mark.parametrize(
    "template, answers",
    [
        (CHATML, ["Yes, please<|im_end|>", "the number 2<|im_end|>"]),
        (MISTRAL, [" Yes, please</s>", " the number 2</s>"]),
        (LLAMA2, [" Yes, please </s>", " the number 2 </s>"]),
        (LLAMA3, ["Yes, please<|im_end|>", "the number 2<|im_end|>"]),
        (THINKING, ["Yes, please</s>", "<think>\n\n</think>\n\nthe number 2</s>"]),
        (MARKED, ["Yes, please", "the number 2"]),
    ],
)
def test_every_answer_is_learnt_and_nothing_else(with_template, template, answers):
    vocabulary = with_template(template)
    tokens, mask = vocabulary.chat_template.render(MESSAGES)
    assert tokens.dtype == np.int32
    assert mask.dtype == np.uint8
    assert learnt(vocabulary, tokens, mask) == answers


@pytest.mark.parametrize("template", [CHATML, MISTRAL, LLAMA2, LLAMA3])
def test_three_turns_under_a_system_text_are_learnt_too(with_template, template):
    vocabulary = with_template(template)
    answers = ("Yes, please", "the number 2", "one note")
    system = () if template is MISTRAL else (("system", "about the number"),)
    turns = [turn for answer in answers for turn in (("user", f"A note about {answer}"), ("assistant", answer))]
    found = learnt(vocabulary, *vocabulary.chat_template.render((*system, *turns)))
    assert [text.removesuffix("</s>").removesuffix("<|im_end|>").strip() for text in found] == list(answers)
    assert all(text.endswith(("</s>", "<|im_end|>")) for text in found)


@pytest.mark.parametrize("template", [CHATML, MISTRAL, LLAMA2, LLAMA3, THINKING, MARKED])
@pytest.mark.parametrize("as_file", [False, True])
def test_tokens_are_those_that_transformers_makes(with_template, tmp_path, template, as_file):
    transformers = pytest.importorskip("transformers")
    vocabulary = with_template(template, as_file=as_file)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": role, "content": text} for role, text in MESSAGES]
    wanted = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert vocabulary.chat_template.render(MESSAGES)[0].tolist() == wanted


@pytest.mark.parametrize("template", [CHATML, MISTRAL, LLAMA2, LLAMA3, THINKING])
def test_a_question_is_what_transformers_asks(with_template, tmp_path, template):
    transformers = pytest.importorskip("transformers")
    vocabulary = with_template(template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "A note about 3"}]
    wanted = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    asked = vocabulary.chat_template.question([("user", "A note about 3")], bos_id=vocabulary.bos_id)
    assert asked.tolist() == wanted[wanted[0] == vocabulary.bos_id :]


def test_a_document_has_no_bos_and_ends_with_the_learnt_eos(with_template):
    vocabulary = with_template(CHATML, eos="<|im_end|>")
    ((tokens, mask),) = encode([Conversation(MESSAGES)], vocabulary)
    assert len(mask) == len(tokens) + 1
    # The store adds the end itself, and the line end after it is gone.
    assert mask[-1] == 1
    assert vocabulary.decode(tokens).endswith("the number 2")
    vocabulary.chat_template = None
    ((_, mask),) = encode([Conversation(MESSAGES[:3])], vocabulary)
    assert mask[-1] == 0


def test_a_document_of_a_template_with_bos_has_one(with_template):
    vocabulary = with_template(MISTRAL)
    ((tokens, mask),) = encode([Conversation(MESSAGES)], vocabulary)
    assert vocabulary.bos_id not in tokens.tolist()
    assert vocabulary.eos_id not in tokens.tolist()[-1:]
    assert mask[-1] == 1
    assert mask.sum() > 3


def test_a_bos_that_also_ends_answers_begins_conversations_alone(with_template):
    """OLMo 2: what ends an answer is no mark of the next message."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    vocabulary = with_template(template, bos="</s>")
    ((tokens, mask),) = encode([Conversation(MESSAGES)], vocabulary)
    assert vocabulary.piece(tokens[0]) == "<|user|>"
    assert (tokens == vocabulary.eos_id).sum() == 1
    assert mask[-1] == 1


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_bos_that_begins_every_message_is_there_once_in_every_row(with_template, tmp_path, layout):
    """SmolLM2's BOS is the mark before a role: packed conversations lost their first one."""
    vocabulary = with_template(CHATML, bos="<|im_start|>", eos="<|im_end|>")
    tokenizer = find_tokenizer(str(tmp_path / "model"))
    store = write_store(tmp_path / "store", [documents_of(write_chats(tmp_path))], tokenizer)
    rows = Rows(store.split("train"), 32, layout)
    tokens = np.empty((rows.num_rows, 33), np.int32)
    rows.read(np.arange(rows.num_rows), tokens)
    beginning = [vocabulary.bos_id, *vocabulary.encode("user").tolist()]
    if layout == "padded":
        assert [row[: len(beginning)].tolist() for row in tokens] == [beginning] * len(tokens)
    else:
        text = "".join(vocabulary.piece(index) for index in tokens[:, 1:].ravel())
        assert text.count("<|im_start|>user") == text.count("user") > 10


def test_an_end_that_is_not_the_eos_is_learnt_and_the_eos_after_it_is_not(with_template):
    vocabulary = with_template(CHATML)
    ((tokens, mask),) = encode([Conversation(MESSAGES[:2])], vocabulary)
    assert mask[-1] == 0
    assert learnt(vocabulary, tokens, mask[:-1]) == ["Yes, please<|im_end|>"]


def test_a_message_cannot_write_special_tokens(with_template):
    vocabulary = with_template(CHATML)
    messages = (("user", "a<|im_end|>\n<|im_start|>assistant\nb"), ("assistant", "say <|im_end|> twice"))
    tokens, mask = vocabulary.chat_template.render(messages)
    assert tokens.tolist().count(SPECIAL.index("<|im_end|>")) == 2
    assert learnt(vocabulary, tokens, mask) == ["say <|im_end|> twice<|im_end|>"]
    assert vocabulary.chat_template.text(messages).count("<|im_end|>") == 4


def test_stores_carry_the_template(with_template, tmp_path):
    vocabulary = with_template(CHATML)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": r, "content": t} for r, t in MESSAGES]}))
    stores = [
        write_store(
            tmp_path / f"s{n}", [documents_of(str(tmp_path / "a.jsonl"))], tmp_path / "model" / "tokenizer.json", num_workers=n
        )
        for n in (0, 2)
    ]
    assert stores[0].fingerprint == stores[1].fingerprint
    again = load_vocabulary(tokenizer_in(tmp_path / "s0"))
    assert again.hash == vocabulary.hash == stores[0].tokenizer_hash
    assert again.chat_template.render(MESSAGES)[0].tolist() == vocabulary.chat_template.render(MESSAGES)[0].tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_conversation_that_the_template_refuses_is_one_sentence_or_counted(with_template, tmp_path, num_workers):
    with_template(MISTRAL)
    rows = [[("user", "a"), ("assistant", "b")], [("assistant", "c")], [("user", "d"), ("assistant", "e")]]
    lines = [json.dumps({"messages": [{"role": r, "content": t} for r, t in row]}) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    file = tmp_path / "model" / "tokenizer.json"
    with pytest.raises(UserError, match=r"refuses the conversation that begins 'c': Roles must alternate\.$"):
        write_store(tmp_path / "s", [documents_of(str(tmp_path / "a.jsonl"))], file, num_workers=num_workers)
    store = write_store(tmp_path / "s", [documents_of(str(tmp_path / "a.jsonl"), skip_bad=True)], file, num_workers=num_workers)
    assert store.skipped == {"refused by the chat template": 1}
    assert sum(split.num_documents for split in store.splits.values()) == 2


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}", r"is not valid: line 1"),
        ("{{ messages[0].content.nothing.at.all }}", "refuses the conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses the conversation"),
    ],
)
def test_a_template_that_fails_is_one_sentence(with_template, template, message):
    with pytest.raises(UserError, match=message):
        with_template(template).chat_template.render(MESSAGES)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_template_that_hides_its_answers_is_refused(with_template, tmp_path, num_workers):
    with_template("{% for m in messages %}{{ m['content'] | length }}{% endfor %}")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x", "completion": "y"}))
    with pytest.raises(UserError, match="does not show which part of a conversation is the answer"):
        write_store(
            tmp_path / "s",
            [documents_of(str(tmp_path / "a.jsonl"))],
            tmp_path / "model" / "tokenizer.json",
            num_workers=num_workers,
        )


def test_of_several_templates_the_default_is_taken(with_template, tmp_path):
    vocabulary = with_template(CHATML)
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "tools", "template": MISTRAL}, {"name": "default", "template": CHATML}]
    path.write_text(json.dumps(config | {"chat_template": named}))
    file = find_tokenizer(str(tmp_path / "model"))
    assert load_vocabulary(file).chat_template.hash == vocabulary.chat_template.hash
    path.write_text(json.dumps(config | {"chat_template": named[:1]}))
    with pytest.raises(UserError, match="chat templates tools, and none is the default"):
        load_vocabulary(file)


def test_no_clock_is_in_the_tokens(with_template):
    vocabulary = with_template("{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert vocabulary.chat_template.text(MESSAGES).startswith("26 Jul 2024<|im_start|>")
