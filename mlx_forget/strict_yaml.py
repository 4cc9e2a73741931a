"""YAML as people write it for us: a mapping, safe to load, and strict about keys that are given twice."""

import itertools
from pathlib import Path
from typing import Any

from mlx_forget.errors import UserError

_MOST_LEVELS = 50
# An alias can stand for much, and an alias of aliases for more than any memory holds.
_MOST_VALUES = 200_000
# What a user says on the command line, and no file for them.
_TRUST = "trust_remote_code"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping.

    Raises:
        UserError: missing, unreadable, or not such a file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    return parse_yaml(text, str(path))


def read_given(path: Path) -> dict[str, Any]:
    """A configuration or recipe that a user gives, perhaps another's: it cannot let code that comes with a model run.

    Raises:
        UserError: as of `read_yaml`, or it says that code may run.
    """
    content = read_yaml(path)
    if _says_trust(content):
        raise UserError(
            f"{path} sets {_TRUST}, which lets code of others run: no file can say that for you. Remove it there, and pass "
            f"--trust-remote-code (of a sweep: --set {_TRUST}=true) if you mean it."
        )
    return content


def _says_trust(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_says_trust, value))
    if not isinstance(value, dict):
        return False
    return any(
        (str(key).replace("-", "_").rpartition(".")[2] == _TRUST and part is not False) or _says_trust(part)
        for key, part in value.items()
    )


def parse_yaml(text: str, path: str) -> dict[str, Any]:
    """A text in YAML whose top level is a mapping.

    Args:
        path: names the text in errors.

    Raises:
        UserError: not such a text.
    """
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Safe, and a key that is given twice is an error instead of a surprise; so is a nesting that only takes time or memory."""

        depth = 0
        # How many values each node stands for, by its identity; the tree of nodes keeps them alive.
        num_values: dict[int, int]

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > _MOST_LEVELS:
                raise UserError(f"{path} is nested more than {_MOST_LEVELS} levels deep.")
            if self.depth == 1:
                self.num_values = {}
            is_alias = self.check_event(yaml.AliasEvent)
            node = super().compose_node(parent, index)
            self.depth -= 1
            if not is_alias:
                self.num_values[id(node)] = self._count(node)
            elif id(node) not in self.num_values:
                raise UserError(f"{path} has an alias that stands for a part of itself.")
            return node

        def _count(self, node: Any) -> int:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            inner = itertools.chain.from_iterable(parts) if isinstance(node, yaml.MappingNode) else parts
            total = 1 + sum(self.num_values[id(part)] for part in inner)
            if total > _MOST_VALUES:
                raise UserError(f"{path} stands for more than {_MOST_VALUES:,} values, with its aliases written out.")
            return total

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise UserError(f"{path}: {key.value!r} is given twice.")
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(text, StrictLoader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of keys to values.")
    return content
