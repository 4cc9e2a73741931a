"""Conversations: what a record says, and which of its tokens a model is to learn.

A conversation becomes `[INST] question [/INST] answer </s> [INST] ...`; the marks are the vocabulary's own ids where it has them. The
answers and the `</s>` that ends each of them are learnt, in every turn; questions and marks are not. A system text stands before the
first question. Where the tokenizer has a chat template, conversations are written by it instead (see `chat_template.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["user", "assistant"]

_ROLES: Mapping[str, str] = {
    "user": "user",
    "human": "user",
    "tool": "user",
    "function": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Conversation:
    """Turns in their order, (role, text) each; a system text is also kept apart, for templates that have a place for it."""

    turns: tuple[tuple[Role, str], ...]
    system: str = ""

    @property
    def text(self) -> str:
        """All turns as one text, which stands for the conversation where texts are compared."""
        return "\n".join(text for _, text in self.turns)

    def messages(self, *, system_apart: bool) -> list[dict[str, str]]:
        """The turns as chat templates take them; a system text is a message of its own, or stands before the first question."""
        messages = [{"role": role, "content": text} for role, text in self.turns]
        if not (system_apart and self.system):
            return messages
        first = messages[0]["content"].removeprefix(self.system).removeprefix("\n\n")
        rest = [{**messages[0], "content": first}] if first else []
        return [{"role": "system", "content": self.system}, *rest, *messages[1:]]


Content = str | Conversation


@dataclass(frozen=True)
class Fields:
    """Which columns of a record are read; a dot enters a nested record (`meta.name`).

    Args:
        text: a plain document.
        prompt, completion: a question and the answer to learn.
        messages: a list of `{"role", "content"}` or `{"from", "value"}`.
        system: a text before the prompt, or None.
        where: (column, value) pairs that a record must have, else it is left out.
        begins: a regular expression; texts are joined into one document until the next one that matches.
    """

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    system: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    begins: str | None = None

    def columns(self) -> set[str]:
        """The top-level columns that may be read."""
        named = [self.text, self.prompt, self.completion, self.messages, *([self.system] if self.system else [])]
        return {name.split(".")[0] for name in [*named, *(name for name, _ in self.where)]}


def content_of(record: Any, fields: Fields) -> Content | None:
    """The document in a record; None where `fields.where` leaves it out.

    Raises:
        ValueError: what is wrong with the record, as a clause.
    """
    if not isinstance(record, Mapping):
        raise ValueError('expected one JSON object with a "text" key')
    if any(str(_get(record, name)) != value for name, value in fields.where):
        return None
    if (text := _get(record, fields.text)) is not None:
        return _string(text, fields.text)
    if (messages := _get(record, fields.messages)) is not None:
        return _conversation(messages, fields.messages)
    prompt, completion = _get(record, fields.prompt), _get(record, fields.completion)
    if prompt is not None and completion is not None:
        system = _get(record, fields.system) if fields.system else None
        return _with_system(
            _string(system, "system") if system else "",
            (("user", _string(prompt, fields.prompt)), ("assistant", _string(completion, fields.completion))),
        )
    found = ", ".join(str(key) for key in list(record)[:8]) or "nothing"
    raise ValueError(
        f'expected one JSON object with a "{fields.text}" key, or "{fields.prompt}" and "{fields.completion}", '
        f'or "{fields.messages}"; it has {found} (--text-column and its like name other columns)'
    )


def _conversation(messages: Any, name: str) -> Conversation:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f'"{name}" must be a list of messages')
    system: list[str] = []
    turns: list[tuple[Role, str]] = []
    for message in messages:
        said = isinstance(message, Mapping) and (
            message.get("role", message.get("from")),
            message.get("content", message.get("value")),
        )
        if not said or said[0] is None:
            raise ValueError(f'each of "{name}" must have "role" and "content" (or "from" and "value")')
        role = _ROLES.get(str(said[0]))
        if role is None:
            raise ValueError(f'"{name}" has the unknown role {str(said[0])!r}; known: {", ".join(_ROLES)}')
        text = _string(said[1], "content")
        if role == "system":
            system.append(text)
        elif turns and turns[-1][0] == role == "user":
            turns[-1] = ("user", f"{turns[-1][1]}\n\n{text}")
        else:
            turns.append(("assistant" if role == "assistant" else "user", text))
    return _with_system("\n\n".join(filter(None, system)), tuple(turns))


def _with_system(system: str, turns: tuple[tuple[Role, str], ...]) -> Conversation:
    if system and turns and turns[0][0] == "user":
        turns = (("user", f"{system}\n\n{turns[0][1]}"), *turns[1:])
    elif system:
        turns = (("user", system), *turns)
    if all(role == "user" or not text for role, text in turns):
        raise ValueError("it has no answer to learn")
    return Conversation(turns, system)


def _get(record: Mapping[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    value: Any = record
    for key in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string')
    return value
