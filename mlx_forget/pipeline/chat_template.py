"""Chat templates of Hugging Face tokenizers: a conversation as its model was trained to read it, and which of its tokens are answers.

A template is a Jinja program that came with a tokenizer. It runs in Jinja's sandbox and sees the messages and the names of special tokens,
and no clock: a conversation always becomes the same tokens. A message cannot write special tokens: theirs become ordinary text.

Answers are what a template marks by `{% generation %}`. Where it marks nothing, an answer is what it writes after the prompt that asks for
one, up to the special token that ends it, found by rendering parts of the conversation and stand-ins for its answers.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from mlx_forget.durable_files import read_bytes, read_object
from mlx_forget.errors import UserError

TEMPLATE_FILE = "chat_template.jinja"

Message = tuple[str, str]
_Span = tuple[int, int]

# Noncharacters, which are for internal use and in no text: around what a template marks, inside special tokens that a message writes, and
# instead of an answer.
_BEGIN, _END, _CUT, _STAND_IN = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_INTERNAL = {ord(mark): None for mark in (_BEGIN, _END, _CUT, _STAND_IN)}
_MARKS = re.compile(f"[{_BEGIN}{_END}{_CUT}]")


@final
class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        source: the Jinja program.
        tokenizer: the content of the tokenizer.json.
        special_tokens: what the template may call by name, such as `bos_token`.
        where: what it is called in messages.
    """

    def __init__(self, source: str, tokenizer: bytes, special_tokens: Mapping[str, str], where: str) -> None:
        self.source = source
        self.hash = hashlib.sha256(source.encode()).hexdigest()
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._where = where
        self._repeated: dict[int, bool] = {}

    @classmethod
    def find(cls, tokenizer: bytes, folder: Path) -> "ChatTemplate | None":
        """The template in the files beside a tokenizer.json: `chat_template.jinja`, or what `tokenizer_config.json` holds.

        Raises:
            UserError: several templates, and none of them the default one.
        """
        config = _read_json(folder / "tokenizer_config.json")
        source: Any = config.get("chat_template")
        if (folder / TEMPLATE_FILE).is_file():
            try:
                source = read_bytes(folder / TEMPLATE_FILE).decode("utf-8")
            except (OSError, UnicodeDecodeError):
                raise UserError(f"{folder / TEMPLATE_FILE} cannot be read, or is not UTF-8.") from None
        if isinstance(source, list):
            named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
            if "default" not in named:
                raise UserError(f"It has the chat templates {', '.join(map(str, named))}, and none is the default.")
            source = named["default"]
        if not isinstance(source, str) or not source.strip():
            return None
        tokens = {}
        for key, value in {**_read_json(folder / "special_tokens_map.json"), **config}.items():
            name = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(name, str):
                tokens[key] = name
        return cls(source, tokenizer, tokens, str(folder))

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """What the template may call by name."""
        return self._special_tokens

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """A conversation of (role, content) as the template writes it.

        Args:
            add_generation_prompt: end with what asks for an answer.

        Raises:
            UserError: the template cannot be compiled, or refuses the conversation (why).
        """
        return _MARKS.sub("", self._render(messages, add_generation_prompt))

    def render(self, messages: Sequence[Message]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Tokens int32[T] of a conversation of (role, content), special ones included, and uint8[T], 1 where a token is of an answer.

        Raises:
            UserError: as `text`; or what the template writes does not show which part of it is an answer.
        """
        tokens, mask, _, _ = self._tokens(messages)
        return tokens, mask

    def question(self, messages: Sequence[Message], *, bos_id: int) -> NDArray[np.int32]:
        """What asks for the next answer of a conversation, int32[T] without the BOS that begins it.

        Raises:
            UserError: as `text`.
        """
        text, cuts, _ = _unmarked(self._render(messages, add_generation_prompt=True))
        tokens = np.array(self._encoded(text, cuts)[0], np.int32)
        return tokens[1:] if len(tokens) and tokens[0] == bos_id else tokens

    def document(self, messages: Sequence[Message], *, bos_id: int, eos_id: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """A conversation as a document of a store: (tokens int32[T] without the last EOS, loss mask uint8[T + 1] with it).

        A BOS that begins the conversation is left out, because rows begin with one; one that begins every message stays. The EOS is learnt where the template ends the last answer with it, or ends it with nothing.

        Raises:
            UserError: as `render`.
        """
        tokens, mask, text, spans = self._tokens(messages)
        if len(tokens) and tokens[0] == bos_id and (bos_id == eos_id or not self._is_repeated(bos_id)):
            tokens, mask = tokens[1:], mask[1:]
        learn_end = 0
        if spans and not text[spans[-1][1] :].strip() and mask.any():
            last = int(mask.nonzero()[0][-1])
            if tokens[last] == eos_id:
                tokens, mask, learn_end = tokens[:last], mask[:last], 1
            elif int(tokens[last]) not in self._special_ids:
                learn_end = 1
        return tokens, np.append(mask, np.uint8(learn_end))

    def _is_repeated(self, bos_id: int) -> bool:
        """Whether messages begin with BOS, and not conversations alone: as with SmolLM2, whose BOS is the mark before a role."""
        if bos_id not in self._repeated:
            written = self._part([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], False)
            self._repeated[bos_id] = (written or "").count(self._encoder.id_to_token(bos_id)) > 1
        return self._repeated[bos_id]

    @cached_property
    def _encoder(self) -> Any:
        from tokenizers import Tokenizer

        # Post-processors add special tokens, which the template writes itself, and trim spaces off the places of tokens.
        encoder = Tokenizer.from_str(json.dumps(json.loads(self._tokenizer) | {"post_processor": None}))
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """The special tokens, longest first."""
        added = self._encoder.get_added_tokens_decoder().values()
        return tuple(sorted((token.content for token in added if token.special and token.content), key=len, reverse=True))

    @cached_property
    def answer_end(self) -> int | None:
        """The special token that the template writes after an answer; None where it writes none."""
        written = self._part([("user", "a"), ("assistant", _STAND_IN)], False) or ""
        found = re.compile(rf"\s*({self._any_special.pattern})").match(written.rpartition(_STAND_IN)[2])
        return None if found is None else int(self._encoder.token_to_id(found[1]))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._encoder.token_to_id(token) for token in self._special)

    @cached_property
    def _any_special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._special)) or "(?!)")

    @cached_property
    def _program(self) -> Any:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox

        class Generation(jinja2.ext.Extension):
            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

            def _mark(self, caller: Any) -> str:
                return f"{_BEGIN}{caller()}{_END}"

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        def to_json(value: Any, **options: Any) -> str:
            return json.dumps(value, **{"ensure_ascii": False, **options})

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        for name in ("lipsum", "cycler", "joiner"):
            environment.globals.pop(name, None)
        environment.filters["tojson"] = to_json
        # Today's date would make other tokens tomorrow: it is the one that Llama 3 takes where there is no clock.
        environment.globals |= {"raise_exception": refuse, "strftime_now": _fixed_date}
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"The chat template of {self._where} is not valid: line {error.lineno}: {error.message}.") from None
        except (RecursionError, ValueError, OverflowError) as error:
            raise UserError(f"The chat template of {self._where} is not valid ({type(error).__name__}).") from None

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        plain = [{"role": role, "content": self._harmless(text)} for role, text in messages]
        program = self._program
        try:
            # What else a template may do wrong is any Python error; halves of a character are no text.
            written = str(
                program.render(messages=plain, tools=None, add_generation_prompt=add_generation_prompt, **self._special_tokens)
            )
            written.encode()
            return written
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            begins = next((text for _, text in messages), "")[:80]
            raise UserError(
                f"The chat template of {self._where} refuses the conversation that begins {begins!r}: {reason.rstrip('.')}."
            ) from None

    def _harmless(self, text: str) -> str:
        text = text if text == _STAND_IN else text.translate(_INTERNAL)
        return self._any_special.sub(lambda found: found[0][:1] + _CUT + found[0][1:], text)

    def _tokens(self, messages: Sequence[Message]) -> tuple[NDArray[np.int32], NDArray[np.uint8], str, list[_Span]]:
        text, cuts, spans = _unmarked(self._render(messages))
        if not spans:
            spans = self._answers(messages, text, frozenset(cuts))
        ids, places = self._encoded(text, cuts)
        where = np.array(places, np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), np.uint8)
        for start, stop in spans:
            mask[(where[:, 0] < stop) & (where[:, 1] > start)] = 1
        return np.array(ids, np.int32), mask, text, spans

    def _encoded(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[_Span]]:
        """The ids of a text, which are not made across cuts, and the characters of each."""
        ids: list[int] = []
        places: list[_Span] = []
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            found = self._encoder.encode(text[start:stop], add_special_tokens=False)
            ids += found.ids
            places += [(start + first, start + last) for first, last in found.offsets]
        return ids, places

    def _answers(self, messages: Sequence[Message], text: str, cuts: frozenset[int]) -> list[_Span]:
        """Where the answers are in a conversation's text."""
        spans: list[_Span] = []
        for number, (role, _) in enumerate(messages):
            if role != "assistant":
                continue
            asked, unasked = self._part(messages[:number], True), self._part(messages[:number], False)
            answered = text if number == len(messages) - 1 else self._part(messages[: number + 1], False)
            # A template may ask by nothing, and may write earlier turns in another way than the last one.
            start = len(asked) if asked is not None and asked != unasked and text.startswith(asked) else None
            stop = len(answered) if answered is not None and text.startswith(answered) else None
            if start is None or stop is None:
                instead = self._part([*messages[:number], ("assistant", _STAND_IN), *messages[number + 1 :]], False)
                before, found, after = (instead or "").partition(_STAND_IN)
                if start is None and found and text.startswith(before):
                    start = len(before)
                if stop is None and found and text.endswith(after):
                    stop = len(text) - len(after)
                    end = re.compile(f" *(?:{self._any_special.pattern})").match(text, stop)
                    stop = end.end() if end else stop
            if start is None or stop is None or stop < start or (spans and start < spans[-1][1]):
                raise UserError(
                    f"The chat template of {self._where} does not show which part of a conversation is the answer "
                    f"(message {number + 1} of the one that begins {messages[0][1][:80]!r}): mark it in the template by "
                    "{% generation %} and {% endgeneration %}."
                )
            # A special token that is cut is what a message says.
            ends = [found.end() for found in self._any_special.finditer(text, start, stop) if found.start() + 1 not in cuts]
            spans.append((start, ends[-1] if ends else start + len(text[start:stop].rstrip())))
        return spans

    def _part(self, messages: Sequence[Message], add_generation_prompt: bool) -> str | None:
        """A part of a conversation as the template writes it; None where it refuses that."""
        try:
            return self.text(messages, add_generation_prompt=add_generation_prompt)
        except UserError:
            return None


def _unmarked(marked: str) -> tuple[str, list[int], list[_Span]]:
    """A text without marks; where it is cut, and where marked parts are in it."""
    parts: list[str] = []
    cuts: list[int] = []
    spans: list[_Span] = []
    size = begun = position = 0
    for mark in _MARKS.finditer(marked):
        parts.append(marked[position : mark.start()])
        size += len(parts[-1])
        position = mark.end()
        if mark[0] == _CUT:
            cuts.append(size)
        elif mark[0] == _BEGIN:
            begun = size
        else:
            spans.append((begun, size))
    parts.append(marked[position:])
    return "".join(parts), cuts, spans


def _fixed_date(form: str) -> str:
    from datetime import date

    return date(2024, 7, 26).strftime(form)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}
