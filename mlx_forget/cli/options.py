"""Command-line options made from a configuration dataclass: names, aliases and help live there, and every option defaults to None."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mlx_forget.cli.completion import OF_KEYS

ColumnMap = Annotated[list[str] | None, typer.Option("--map", help="LAW_COLUMN=TABLE_COLUMN, or =NUMBER for a constant.")]


def options_of(kind: type) -> list[inspect.Parameter]:
    """One keyword parameter for each field of the dataclass that the command line offers."""
    hints = typing.get_type_hints(kind)
    parameters = []
    for f in dataclasses.fields(kind):
        if not f.metadata.get("cli", True):
            continue
        plain = _plain_type(hints[f.name])
        names = [f"--{name.replace('_', '-')}" for name in (f.name, *f.metadata["aliases"])]
        if plain is bool:
            names[0] += f"/--no-{f.name.replace('_', '-')}"
        default = "" if f.default is None or plain is bool else f" \\[default: {f.default}]"
        offer = OF_KEYS.get(f.name) or _offer(plain)
        option = typer.Option(None, *names, help=f.metadata["help"] + default, show_default=False, autocompletion=offer)
        annotation = bool | None if plain is bool else str | None
        parameters.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation))
    return parameters


def with_options(kind: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command that ends in `**values` one option for each field of a configuration dataclass."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + options_of(kind)
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def _offer(plain: Any) -> Callable[[], list[str]] | None:
    """What a shell offers for a type: the values of a literal."""
    if typing.get_origin(plain) is not typing.Literal:
        return None
    values = [str(value) for value in typing.get_args(plain)]
    return lambda: values


def _plain_type(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(choice for choice in typing.get_args(hint) if choice is not type(None))
    return hint
