"""How a command answers: on stdout, in words or as one JSON object; remarks go to stderr. And how it reads NAME=VALUE options."""

import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_forget.errors import Interrupted, UserError

Json = Annotated[bool | None, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def say(text: str) -> None:
    """A remark: what is done, left out or written."""
    print(text, file=sys.stderr)


def tell(text: str) -> None:
    """A line of the answer in words: on stdout, which --json keeps for its object."""
    print(text, file=sys.stderr if _call.as_json else sys.stdout)


def propose(*words: object) -> None:
    """The command that usually comes next, as a remark to people."""
    if not _call.as_json:
        say("Next: " + shlex.join(["forget", *map(str, words)]))


@dataclass
class _Call:
    """What is known of the command that runs: where its work is, whether it has answered, and whether it is to answer with JSON."""

    folder: Path | None = None
    facts: Callable[[], Mapping[str, Any]] = dict
    has_answered: bool = False
    as_json: bool = False


_call = _Call()


def begin(arguments: Sequence[str]) -> None:
    """A new command: nothing is known of it but what was typed."""
    global _call
    _call = _Call(as_json="--json" in arguments)


def works_in(folder: Path, facts: Callable[[], Mapping[str, Any]] = dict) -> None:
    """Where the command's work is: what --json says of it, with what is known by then, when a signal stops it."""
    _call.folder, _call.facts = folder, facts


def emit(content: Mapping[str, Any]) -> None:
    """The one JSON object of --json."""
    emit_text(json.dumps(clean(content), allow_nan=False))


def emit_text(text: str) -> None:
    """The one JSON object of --json, as text."""
    print(text, flush=True)
    _call.has_answered = True


def emit_interrupted(error: Interrupted) -> None:
    """The object of --json, where that was asked for, of a command that a signal stopped before it answered."""
    if _call.as_json and not _call.has_answered:
        folder = None if _call.folder is None else str(_call.folder)
        emit({"status": "interrupted", "signal": error.signal, "reason": str(error), "folder": folder, **_call.facts()})


def clean(value: Any) -> Any:
    """A value for JSON: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def pairs(items: list[str] | None, option: str) -> dict[str, str]:
    """`NAME=VALUE` options as a dictionary."""
    made = {}
    for item in items or []:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name or not value:
            raise UserError(f"{option} takes NAME=VALUE, not {item!r}.")
        made[name] = value
    return made


def numbers(items: list[str] | None, option: str) -> dict[str, float]:
    """`NAME=NUMBER` options as a dictionary."""
    made = {}
    for name, value in pairs(items, option).items():
        try:
            made[name] = float(value)
        except ValueError:
            raise UserError(f"{option} {name}={value}: {value!r} is not a number.") from None
    return made
