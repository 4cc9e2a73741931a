"""The texts of an audit: named, tokenised, and cut into frozen windows that no seed changes.

Every document is read by itself, its end-of-document token included, in windows of at most T labels that each start with BOS and
do not overlap. Documents are thus independent of each other, which standard errors over documents rely on.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_forget.audit.models import Model
from mlx_forget.errors import UserError
from mlx_forget.pipeline.catalog import resolve_store, silent
from mlx_forget.pipeline.corpora import CORPORA
from mlx_forget.pipeline.source_files import holds_out_by_name, is_glob
from mlx_forget.pipeline.store import MANIFEST, TokenStore
from mlx_forget.pipeline.tokenise import Progress

Tokens = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.uint8]

# Orders the documents of a text that is larger than the audit: smaller readings are prefixes of larger ones.
_ORDER_KEY = 8


@dataclass(frozen=True)
class Windows:
    """Rows of a text.

    Args:
        tokens: int32[W, T+1]: BOS, then labels, then padding.
        mask: uint8[W, T], 1 where there is a label that counts.
        num_labels: int64[W], labels of each row.
        document: int64[W], the document of each row, ascending.
    """

    tokens: Tokens
    mask: Mask
    num_labels: Ids
    document: Ids


@dataclass(frozen=True)
class Text:
    """A text that is read before and after.

    Args:
        name: what the user called it.
        source: what it is, in words.
        fingerprint: of its token store.
        part: which part is read, in words.
        bos_id: stands before every window.
        documents: int32 tokens of each document that is read, its end-of-document token included.
        num_bytes: int64, UTF-8 bytes of what counts of each.
        num_left_out: documents beyond the token limit.
        loss_masks: uint8 for each token of each document, 1 where it counts; None where all do.
    """

    name: str
    source: str
    fingerprint: str
    part: str
    bos_id: int
    documents: tuple[Tokens, ...]
    num_bytes: Ids
    num_left_out: int
    loss_masks: tuple[Mask, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Labels of all documents that count."""
        return self.num_read if self.loss_masks is None else sum(int(mask.sum()) for mask in self.loss_masks)

    @property
    def num_read(self) -> int:
        """Labels of all documents, those that do not count included."""
        return sum(len(document) for document in self.documents)

    def num_windows(self, row_length: int) -> int:
        """Rows that `windows` makes."""
        return sum(-(-len(document) // row_length) for document in self.documents)

    def windows(self, row_length: int) -> Windows:
        """Every document in rows of at most `row_length` labels."""
        counts = np.array([-(-len(document) // row_length) for document in self.documents], np.int64)
        # Padding is masked: any id will do.
        tokens = np.zeros((int(counts.sum()), row_length + 1), np.int32)
        tokens[:, 0] = self.bos_id
        mask = np.zeros((len(tokens), row_length), np.uint8)
        num_labels = np.full(len(tokens), row_length, np.int64)
        row = 0
        for number, (document, count) in enumerate(zip(self.documents, counts.tolist(), strict=True)):
            labels, counting = np.zeros(count * row_length, np.int32), np.zeros(count * row_length, np.uint8)
            labels[: len(document)] = document
            counting[: len(document)] = 1 if self.loss_masks is None else self.loss_masks[number]
            tokens[row : row + count, 1:] = labels.reshape(count, row_length)
            mask[row : row + count] = counting.reshape(count, row_length)
            num_labels[row + count - 1] = len(document) - (count - 1) * row_length
            row += count
        return Windows(tokens, mask, num_labels, np.repeat(np.arange(len(counts)), counts))


def parse_texts(items: Sequence[str]) -> dict[str, str]:
    """Names and sources from `NAME=SOURCE`, or a bare SOURCE that is named after itself.

    Raises:
        UserError: an empty name or source, or a name given twice.
    """
    named: dict[str, str] = {}
    for item in items:
        name, equals, source = item.partition("=")
        if not equals:
            name, source = (item if item in CORPORA else Path(item).stem), item
        if not name.strip() or not source.strip():
            raise UserError(f"--data takes NAME=SOURCE, not {item!r}.")
        if name in named:
            raise UserError(f"--data names {name!r} twice: give each text a name of its own, --data NAME=SOURCE.")
        named[name] = source
    return named


def default_texts(tuned: Model) -> dict[str, str]:
    """The built-in prose, and the built-in corpus that was finetuned on (else code)."""
    target = None if tuned.record is None else tuned.record["config"].get("target")
    names = ["prose", str(target) if target in CORPORA else "code"]
    return {name: name for name in dict.fromkeys(names)}


def read_text(
    name: str, source: str, models: Iterable[Model], *, max_tokens: int, say: Callable[[str], None], progress: Progress = silent
) -> Text:
    """The documents of a built-in corpus, a store, a file or a folder.

    Of corpora, stores, folders with a validation file, and data that one of the models has learnt from, only what was held out is
    read; of other files, everything. What a store marks as not to be learnt, such as questions, is read but does not count, unless the
    last model was finetuned with `mask_prompt` off.

    Raises:
        UserError: nothing there, no text, no held-out documents where they are needed, or a store of another tokenizer.
    """
    models = tuple(models)
    store = resolve_store(source, models[-1].tokenizer_file, progress=progress)
    learnt = any(store.fingerprint == entry.get("fingerprint") for model in models for entry in _data(model.record))
    path = Path(source).expanduser()
    # What is no path here is standard input, a corpus recipe or a data set of the Hub.
    named = (path.exists() or is_glob(path)) and holds_out_by_name(path)
    whole_file = source not in CORPORA and not (path / MANIFEST).is_file() and not named
    if learnt and whole_file:
        say(f"{name}: {source} was trained on; only the documents that were held out of it are read.")
    names = tuple(sorted(store.splits)) if whole_file and not learnt else ("validation",)
    record = models[-1].record
    mask_prompt = record is None or bool(record["config"].get("mask_prompt", True))
    documents, num_bytes, masks = _documents(store, names)
    if not documents:
        raise UserError(f"{source} holds no text.")
    masked = mask_prompt and any(not mask.all() for mask in masks)
    if masked:
        counting = [i for i, mask in enumerate(masks) if mask.any()]
        if not counting:
            raise UserError(f"{source} marks no token as to be learnt in its {' and '.join(names)} documents.")
        documents, masks = [documents[i] for i in counting], [masks[i] for i in counting]
        # Of what counts only: a store knows the bytes of whole documents.
        sizes = np.array([len(piece) for piece in models[-1].tokenizer.piece_bytes], np.int64)
        num_bytes = np.array([sizes[one[mask == 1]].sum() for one, mask in zip(documents, masks, strict=True)], np.int64)
    order = np.random.Generator(np.random.Philox(key=[_ORDER_KEY, len(documents)])).permutation(len(documents))
    sizes = np.array([len(documents[i]) for i in order])
    kept = np.sort(order[: max(1, int(np.searchsorted(np.cumsum(sizes), max_tokens, side="right")))])
    left_out = len(documents) - len(kept)
    if left_out:
        say(
            f"{name}: reading {len(kept):,} of {len(documents):,} documents, about {max_tokens:,} tokens, the same ones every time; "
            "--max-tokens reads more."
        )
    text = Text(
        name=name,
        source=store.source,
        fingerprint=store.fingerprint,
        part=("held-out documents" if names == ("validation",) else "documents, all there are")
        + (", of which only what is to be learnt (answers) counts" if masked else ""),
        bos_id=store.split(names[0]).bos_id,
        documents=tuple(documents[i] for i in kept),
        num_bytes=num_bytes[kept],
        num_left_out=left_out,
        loss_masks=tuple(masks[i] for i in kept) if masked else None,
    )
    if masked:
        say(
            f"{name}: only what the data marks as to be learnt, such as answers, counts: {text.num_tokens:,} of {text.num_read:,} tokens."
        )
    return text


def _data(record: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if record is None else list(record["data"].values())


def _documents(store: TokenStore, names: Iterable[str]) -> tuple[list[Tokens], Ids, list[Mask]]:
    documents: list[Tokens] = []
    masks: list[Mask] = []
    sizes: list[Ids] = []
    for name in names:
        split = store.split(name)
        for number, tokens in enumerate(split.tokens):
            start, size = split.texts(number)
            places = [slice(a, a + n) for a, n in zip(start.tolist(), size.tolist(), strict=True)]
            documents += [tokens[place].astype(np.int32) for place in places]
            mask = split.loss_mask(number)
            masks += [mask[place] for place in places]
            sizes.append(split.documents(number)[1])
    return documents, np.concatenate(sizes) if sizes else np.zeros(0, np.int64), masks
