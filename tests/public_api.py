"""What users and scripts build on, as text: the names of the package with their arguments, and every command with its options.

    python -m tests.public_api > tests/public_api.txt

Arguments are listed with their defaults, without types (mypy holds those); methods and attributes of classes with them.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import mlx_forget
from mlx_forget.cli import COMMANDS, load_command

_PLAIN = (bool, int, float, str, type(None))


def lines() -> Iterator[str]:
    """The listing, one line each."""
    for name in mlx_forget.__all__:
        yield from _named(name, getattr(mlx_forget, name))
    for name in COMMANDS:
        yield from _command(f"forget {name}", load_command(name))


def _named(name: str, thing: object) -> Iterator[str]:
    if not inspect.isclass(thing):
        yield from _call(name, thing)
        return
    if issubclass(thing, BaseException):
        yield f"{name}({', '.join(base.__name__ for base in thing.__bases__)})"
        return
    if inspect.isabstract(thing):
        yield name
    else:
        yield from _call(name, thing)
    for member, value in sorted(inspect.getmembers_static(thing)):
        bare = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if member.startswith("_"):
            continue
        if inspect.isfunction(bare):
            yield from _call(f"{name}.{member}", bare)
        elif isinstance(value, property):
            yield f"{name}.{member}"


def _call(name: str, thing: object) -> Iterator[str]:
    """A line for the name and one for each argument: one that is added changes no other line."""
    yield f"{name}()"
    for parameter in inspect.signature(thing).parameters.values():  # type: ignore[arg-type]
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        by_name = " by name" if parameter.kind is parameter.KEYWORD_ONLY else ""
        if parameter.name not in ("self", "cls"):
            yield f"    {name}({star}{parameter.name}{default}){by_name}"


def _default(value: object) -> str:
    return repr(value) if isinstance(value, _PLAIN) or value in ((), [], {}) else "..."


def _command(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        yield name
        for inner, one in sorted(command.commands.items()):
            yield from _command(f"{name} {inner}", one)
        return
    own = [one for one in command.params if one.name not in ("install_completion", "show_completion")]
    yield " ".join([name, *((one.name or "").upper() for one in own if one.param_type_name == "argument")])
    for option in (one for one in own if one.param_type_name == "option"):
        yield f"    {name} {', '.join([*option.opts, *option.secondary_opts])}"


if __name__ == "__main__":
    print("\n".join(lines()))
