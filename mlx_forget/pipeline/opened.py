"""What plans of one sweep share: a file that several of them read is opened, checked and mapped once."""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from mlx_forget.pipeline.store import TokenStore, open_store
from mlx_forget.pipeline.vocabularies import Vocabulary, load_vocabulary

Thing = TypeVar("Thing")


class Opened:
    """Stores, tokenizers and start models by where they lie, for as long as nothing of them changes: while a sweep is planned."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, ...], Any] = {}

    def once(self, key: tuple[Hashable, ...], make: Callable[[], Thing]) -> Thing:
        """What `make` returned when this key was asked for first; an error is not kept."""
        if key not in self._kept:
            self._kept[key] = make()
        thing: Thing = self._kept[key]
        return thing

    def vocabulary(self, path: Path) -> Vocabulary:
        """The tokenizer in a file; see `load_vocabulary`."""
        return self.once(("vocabulary", path), lambda: load_vocabulary(path))

    def store(self, folder: Path) -> TokenStore:
        """The store in a folder, every byte of it checked; see `open_store`."""
        return self.once(("store", folder), lambda: open_store(folder))
