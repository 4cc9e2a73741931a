"""Conversations: what a record says, and which of its tokens a model is to learn.

A conversation becomes `[INST] question [/INST] answer </s> [INST] ...`; the marks are the vocabulary's own ids where it has them. The
answers and the `</s>` that ends each of them are learnt, in every turn; questions and marks are not. A system text stands before the
first question. A tokenizer with a chat template writes the messages in its own way instead (`chat_template.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Message = tuple[Role, str]

_ROLES: Mapping[str, Role] = {
    "user": "user",
    "human": "user",
    "tool": "tool",
    "function": "tool",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, (role, text) each."""

    messages: tuple[Message, ...]

    @property
    def turns(self) -> tuple[tuple[Literal["user", "assistant"], str], ...]:
        """Questions and answers: the system text and what stands between two answers are part of a question."""
        system = "\n\n".join(text for role, text in self.messages if role == "system" and text)
        turns: list[tuple[Literal["user", "assistant"], str]] = []
        for role, text in self.messages:
            if role == "system":
                continue
            if role == "assistant":
                turns.append((role, text))
            elif turns and turns[-1][0] == "user":
                turns[-1] = ("user", f"{turns[-1][1]}\n\n{text}")
            else:
                turns.append(("user", text))
        if system and turns and turns[0][0] == "user":
            turns[0] = ("user", f"{system}\n\n{turns[0][1]}")
        elif system:
            turns.insert(0, ("user", system))
        return tuple(turns)

    @property
    def text(self) -> str:
        """All turns as one text, which stands for the conversation where texts are compared."""
        return "\n".join(text for _, text in self.turns)


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
        asked: Message = ("user", _string(prompt, fields.prompt))
        answered: Message = ("assistant", _string(completion, fields.completion))
        return _checked(("system", _string(system, "system")), asked, answered) if system else _checked(asked, answered)
    found = ", ".join(str(key) for key in list(record)[:8]) or "nothing"
    raise ValueError(
        f'expected one JSON object with a "{fields.text}" key, or "{fields.prompt}" and "{fields.completion}", '
        f'or "{fields.messages}"; it has {found} (--text-column and its like name other columns)'
    )


def _conversation(messages: Any, name: str) -> Conversation:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f'"{name}" must be a list of messages')
    said: list[Message] = []
    for message in messages:
        found = isinstance(message, Mapping) and (
            message.get("role", message.get("from")),
            message.get("content", message.get("value")),
        )
        if not found or found[0] is None:
            raise ValueError(f'each of "{name}" must have "role" and "content" (or "from" and "value")')
        if message.get("tool_calls") or message.get("function_call"):
            raise ValueError(
                f'"{name}" has a message that calls a tool, which is not read: leave it out, or write the call as its content'
            )
        role = _ROLES.get(str(found[0]))
        if role is None:
            raise ValueError(f'"{name}" has the unknown role {str(found[0])!r}; known: {", ".join(_ROLES)}')
        if role == "assistant" and (message.get("weight") == 0 or message.get("train") is False):
            raise ValueError(
                f'"{name}" has an answer that is not to be learnt, which is not known here: all answers are; leave it out'
            )
        said.append((role, _string(found[1], "content")))
    return _checked(*said)


def _checked(*messages: Message) -> Conversation:
    if all(role != "assistant" or not text for role, text in messages):
        raise ValueError("it has no answer to learn")
    return Conversation(messages)


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
