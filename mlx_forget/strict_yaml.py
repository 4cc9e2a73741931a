"""YAML as people write it for us: a mapping, safe to load, and strict about keys that are given twice."""

from pathlib import Path
from typing import Any

from mlx_forget.errors import UserError

_MOST_LEVELS = 50


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping.

    Raises:
        UserError: missing, unreadable, or not such a file.
    """
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Safe, and a key that is given twice is an error instead of a surprise; so is a nesting that only takes time."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > _MOST_LEVELS:
                raise UserError(f"{path} is nested more than {_MOST_LEVELS} levels deep.")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(f"{path}: {key!r} is given twice.")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of keys to values.")
    return content
