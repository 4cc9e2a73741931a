"""Configurations from layers of keys and values: strict keys, aliases, declared types; and back to YAML."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from mlx_forget.config_keys import ConfigKeys
from mlx_forget.errors import UserError, unknown
from mlx_forget.token_counts import parse_tokens

Config = TypeVar("Config")
# What stands for the default of a key that may be left out.
_NOTHING = ("none", "null")
_EVERYTHING = {"target_tokens": ("all",), "lora_num_layers": ("all",)}


def from_layers(kind: type[Config], *layers: Mapping[str, Any], where: str = "configuration") -> Config:
    """A configuration from mappings, later ones laid over earlier ones; keys may be aliases, values take the declared types.

    A field that is itself a mapping is merged key by key.

    Raises:
        UserError: an unknown key (with the nearest one), a key given twice in one layer, or a value of the wrong type.
    """
    names = {alias: f.name for f in dataclasses.fields(kind) for alias in (f.name, *f.metadata["aliases"])}  # type: ignore[arg-type]
    types_of = typing.get_type_hints(kind)
    merged: dict[str, Any] = {}
    for layer in layers:
        given: dict[str, Any] = {}
        for key, value in layer.items():
            name = names.get(str(key).replace("-", "_"))
            if name is None:
                raise unknown(f"{where} key", key, names)
            if name in given:
                raise UserError(f"{where}: {name!r} is given twice, once under another name.")
            given[name] = _convert(name, value, types_of[name])
            if isinstance(given[name], dict):
                given[name] = merged.get(name, {}) | given[name]
        merged |= given
    return kind(**merged)


def to_yaml(config: ConfigKeys) -> str:
    """The resolved configuration as YAML that reads back to the same values."""
    import yaml

    text: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    return text


def _convert(name: str, value: Any, wanted: Any) -> Any:
    origin, choices = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in (*_NOTHING, *_EVERYTHING.get(name, ()))):
            return None
        return _convert(name, value, next(choice for choice in choices if choice is not type(None)))
    if origin is Literal:
        if value not in choices:
            raise unknown(name, value, [str(choice) for choice in choices])
        return value
    if origin is not None:
        if not isinstance(value, Mapping):
            raise UserError(f"{name} must be a mapping of keys to values, not {value!r}.")
        return dict(value)
    if wanted is int and name.endswith("_tokens") and str(value).strip()[-1:].upper() in ("K", "M", "B"):
        return parse_tokens(str(value))
    if wanted is str and isinstance(value, list):
        return ",".join(map(str, value))
    try:
        if wanted is bool:
            if isinstance(value, str):
                return {"true": True, "false": False}[value.lower()]
            if not isinstance(value, bool):
                raise ValueError
            return value
        if wanted is int:
            number = float(value) if isinstance(value, str) else value
            if isinstance(value, bool) or number != int(number):
                raise ValueError
            return int(number)
        if wanted is float and isinstance(value, bool):
            raise ValueError
        return wanted(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(f"{name} must be of type {wanted.__name__}, not {value!r}.") from None
