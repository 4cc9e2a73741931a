"""From what the user named to an open store: built-in corpora, stores, files; tokenised once, then found again."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mlx_forget.errors import UserError, unknown
from mlx_forget.pipeline import sources
from mlx_forget.pipeline.corpora import CORPORA, BuiltCorpus, build_corpus, forget_home, read_documents
from mlx_forget.pipeline.store import MANIFEST, TOKENIZER_FILE, StoreWriter, TokenStore, open_store
from mlx_forget.pipeline.tokenizer import BOS, EOS, Tokenizer, train_tokenizer

# What is going on, and how far it is (0 to 1).
Progress = Callable[[str, float], None]

_DOCUMENTS_PER_CALL = 2048


def silent(activity: str, fraction: float) -> None:
    """The progress that nobody watches."""


def builtin_tokenizer(vocab_size: int, *, progress: Progress = silent) -> Path:
    """The tokenizer trained on the training split of the built-in prose: the file, made once and kept."""
    corpus = build_corpus("prose", progress=progress)
    path = forget_home() / "tokenizers" / f"prose-{corpus.fingerprint[:16]}-{vocab_size}.model"
    if not path.exists():
        progress(f"training a tokenizer of {vocab_size:,} pieces", 0.0)
        texts = read_documents(corpus, "train")
        path.parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts, vocab_size=vocab_size).save(path)
        progress(f"training a tokenizer of {vocab_size:,} pieces", 1.0)
    return path


def resolve_store(name: str, tokenizer_file: Path, *, progress: Progress = silent) -> TokenStore:
    """The store behind a name: a built-in corpus, a store folder, or a file or folder of text.

    Corpora and files are tokenised under the cache folder, keyed by their content and the tokenizer.

    Raises:
        UserError: nothing by that name, or a store made with another tokenizer.
    """
    tokenizer = Tokenizer.load(tokenizer_file)
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        store = open_store(path)
        if store.tokenizer_hash != tokenizer.hash:
            raise UserError(
                f"Store {path} was made with another tokenizer ({store.tokenizer_hash[:12]}) than the model's ({tokenizer.hash[:12]}): "
                f"prepare it again with --tokenizer {tokenizer_file}"
            )
        return store
    named = documents_of(name, progress=progress)
    folder = forget_home() / "stores" / f"{path.stem}-{named.key[:16]}-{tokenizer.hash[:16]}"
    if (folder / MANIFEST).is_file():
        return open_store(folder)
    return write_store(
        folder,
        named.read(),
        tokenizer_file,
        source=named.source,
        num_bytes=named.num_bytes,
        progress=progress,
    )


@dataclass(frozen=True)
class NamedDocuments:
    """Text that a user named.

    Args:
        key: a hash of the content.
        source: what it is, in words.
        num_bytes: UTF-8 bytes of all documents, about.
        read: starts a new pass over (split, text).
    """

    key: str
    source: str
    num_bytes: int
    read: Callable[[], Iterator[tuple[str, str]]]


def documents_of(name: str, *, progress: Progress = silent) -> NamedDocuments:
    """The documents behind a built-in corpus, a file or a folder.

    Raises:
        UserError: nothing by that name, or nothing readable.
    """
    path = Path(name).expanduser()
    if name in CORPORA:
        corpus = build_corpus(name, progress=progress)
        num_bytes = sum(corpus.num_bytes.values())
        return NamedDocuments(corpus.fingerprint, f"built-in corpus {name}", num_bytes, lambda: _corpus_documents(corpus))
    if path.exists():
        progress(f"reading {name}", 0.0)
        num_bytes = sum(file.stat().st_size for file in sources.find_files(path))
        return NamedDocuments(sources.content_hash(path), str(path), num_bytes, lambda: iter(sources.read_documents(path)))
    if os.sep in name or path.suffix:
        raise UserError(f"There is no file or folder {name}.")
    raise unknown("corpus or path", name, CORPORA)


def write_store(
    folder: Path,
    documents: Iterable[tuple[str, str]],
    tokenizer_file: Path,
    *,
    source: str,
    num_bytes: int,
    progress: Progress = silent,
) -> TokenStore:
    """Tokenise (split, text) documents into a new store.

    Args:
        folder: must not exist; it appears when the store is whole.
        num_bytes: expected UTF-8 bytes of all documents, for progress.
    """
    tokenizer = Tokenizer.load(tokenizer_file)
    writer = StoreWriter(
        folder=folder,
        tokenizer_file=tokenizer_file,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        bos_id=BOS,
        eos_id=EOS,
        source=source,
    )
    activity, done = f"tokenising {source}", 0
    try:
        for part in _batched(documents):
            progress(activity, min(0.99, done / max(1, num_bytes)))
            for (split, text), ids in zip(part, tokenizer.encode_batch([text for _, text in part]), strict=True):
                size = len(text.encode())
                writer.add(split, ids, size)
                done += size
        try:
            store = writer.close()
        except OSError:
            if not (folder / MANIFEST).is_file():
                raise
            # Another process finished the same store first.
            store = open_store(folder)
        progress(activity, 1.0)
        return store
    finally:
        writer.discard()


def tokenizer_of(store: Path) -> Path:
    """The tokenizer file inside a store."""
    return store / TOKENIZER_FILE


def _corpus_documents(corpus: BuiltCorpus) -> Iterator[tuple[str, str]]:
    for split in ("train", "validation"):
        for text in read_documents(corpus, split):
            yield split, text


def _batched(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    iterator = iter(documents)
    while part := list(islice(iterator, _DOCUMENTS_PER_CALL)):
        yield part
