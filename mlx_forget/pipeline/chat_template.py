"""Chat templates: a conversation as the text that a checkpoint was trained on, and which of its characters an answer is made of.

A template is a Jinja program that comes with a tokenizer; it runs in Jinja's sandbox, on a clock that stands still, so that a store has the
same content on every day. What is learnt of it: all that the model would write, from the end of the generation prompt to the token that
ends the turn, in every turn. A template that marks answers itself (`{% generation %}`) is believed.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_forget.errors import UserError

Message = Mapping[str, str]
Span = tuple[int, int]

# What templates print where they ask for the date; also the fallback in Llama 3's own.
_TODAY = "26 Jul 2024"
# From Unicode's private use: they stand where a marked answer begins and ends, and are taken out again.
_BEGIN, _END = "\ue0f0", "\ue0f1"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Args:
        text: what the template makes of it.
        spans: (start, stop) in characters of what is to be learnt.
    """

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """A template with the tokens that it may print.

    Args:
        source: the Jinja program.
        special_tokens: `bos_token` and the like.
        special_pieces: every text that the tokenizer reads as one special id: the first one after an answer ends its turn.
        name: where it comes from, for errors.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], special_pieces: Sequence[str], name: str) -> None:
        self._name, self._tokens = name, dict(special_tokens)
        self._pieces = [piece for piece in special_pieces if piece]
        self.source = source
        self._marks_answers = re.search(r"{%-?\s*generation\s*-?%}", source) is not None
        try:
            self._template = _environment().from_string(source)
        except Exception as error:
            raise UserError(f"The chat template of {name} cannot be read: {error}") from None

    @property
    def hash(self) -> str:
        """sha256 of the program."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def ends_turn(self, text: str) -> bool:
        """Whether a text ends with a special token."""
        return text.rstrip().endswith(tuple(self._pieces))

    def render(self, messages: Sequence[Message]) -> Rendered:
        """A conversation as text with what is to be learnt of it.

        Raises:
            UserError: the template fails on it, or changes what was said so that answers cannot be found.
        """
        if self._marks_answers:
            return _without_marks(self._run(messages, answers_marked=True))
        text = self._run(messages)
        for candidate in (messages, [{**message, "content": message["content"].strip()} for message in messages]):
            spans = self._spans(text, candidate)
            if spans is not None:
                return Rendered(text, spans)
        raise UserError(
            f"The chat template of {self._name} changes what is said in a conversation, so that answers cannot be told from the rest: "
            "give text rows, or a template with {% generation %} marks."
        )

    def _spans(self, text: str, messages: Sequence[Message]) -> tuple[Span, ...] | None:
        """Where answers are in a rendered text; None where the contents are not found as they are given."""
        pieces = self._pieces_between(messages)
        if pieces is None or text != pieces[0] + "".join(m["content"] + p for m, p in zip(messages, pieces[1:], strict=True)):
            return None
        spans: list[Span] = []
        place = len(pieces[0])
        for number, message in enumerate(messages):
            before, after = pieces[number], pieces[number + 1]
            start, place = place, place + len(message["content"])
            if message["role"] == "assistant":
                opening = self._generation_prompt(messages[:number])
                if opening and opening in before:
                    # What stands between the generation prompt and the answer is the model's to write.
                    start -= len(before) - (before.rindex(opening) + len(opening))
                spans.append((start, place + self._length_of_end(after)))
            place += len(after)
        return tuple(spans)

    def _pieces_between(self, messages: Sequence[Message]) -> list[str] | None:
        """What the template prints before, between and after the contents, found with a stand-in for each."""
        stand_ins = [f"\ue0f2{number}\ue0f3" for number in range(len(messages))]
        rest = self._run([{**m, "content": s} for m, s in zip(messages, stand_ins, strict=True)])
        pieces = []
        for stand_in in stand_ins:
            before, found, rest = rest.partition(stand_in)
            if not found:
                return None
            pieces.append(before)
        return [*pieces, rest]

    def _generation_prompt(self, messages: Sequence[Message]) -> str:
        """What the template adds to ask for the next answer; empty where it adds nothing."""
        if not messages:
            return ""
        try:
            asked, plain = self._run(messages, add_generation_prompt=True), self._run(messages)
        except UserError:
            return ""
        return asked[len(plain) :] if asked.startswith(plain) else ""

    def _length_of_end(self, after: str) -> int:
        """How much of what follows an answer ends it: through the first special token; nothing where there is none."""
        ends = [(place, place + len(piece)) for piece in self._pieces if (place := after.find(piece)) >= 0]
        if not ends:
            return 0
        start, stop = min(ends, key=lambda end: (end[0], -end[1]))
        return stop if not after[:start].strip() else 0

    def _run(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, answers_marked: bool = False) -> str:
        # A template that asks for the date and gets none prints that of the day.
        names = {"date_string": _TODAY, "tools": None, "documents": None, **self._tokens}
        marks = (_BEGIN, _END) if answers_marked else ("", "")
        try:
            text: str = self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, answer_marks=marks, **names
            )
            return text
        except UserError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"The chat template of {self._name} fails on a conversation of {roles}: {said}") from None


def _without_marks(marked: str) -> Rendered:
    text, spans, start = "", [], 0
    for part in marked.replace(_END, _BEGIN).split(_BEGIN):
        text += part
        spans.append((start, len(text)))
        start = len(text)
    return Rendered(text, tuple(spans[1::2]))


def _environment() -> Any:
    """Jinja as transformers sets it up for templates."""
    import json

    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` ... `{% endgeneration %}` around what an assistant writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            marks = nodes.Name("answer_marks", "load")
            call = self.call_method("_mark", [marks])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, marks: tuple[str, str], caller: Any) -> str:
            return f"{marks[0]}{caller()}{marks[1]}"

    def fail(sentence: str) -> None:
        raise ValueError(sentence)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: _TODAY
    return environment
