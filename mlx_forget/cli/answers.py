"""How a law command answers: human text on stderr, one JSON object on stdout; and how it reads NAME=VALUE options."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from mlx_forget.errors import UserError

Json = Annotated[bool | None, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def say(text: str) -> None:
    print(text, file=sys.stderr)


def emit(content: Mapping[str, Any]) -> None:
    """The one JSON object of --json."""
    print(json.dumps(clean(content), allow_nan=False))


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
