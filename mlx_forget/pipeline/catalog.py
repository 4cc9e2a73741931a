"""From what the user named to an open store: built-in corpora, recipes, stores, files, the Hub; tokenised once, then found again."""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlx_forget.errors import UserError, unknown
from mlx_forget.pipeline import hub, recipes, source_files, sources
from mlx_forget.pipeline.chat_template import ChatTemplate
from mlx_forget.pipeline.conversations import Content, Conversation
from mlx_forget.pipeline.corpora import CORPORA, BuiltCorpus, build_corpus, forget_home, read_documents
from mlx_forget.pipeline.filters import Filter, HeldOut, SeenHashes
from mlx_forget.pipeline.formats import BadInput
from mlx_forget.pipeline.opened import Opened
from mlx_forget.pipeline.sources import Reading, digest_of, in_part, validation_share
from mlx_forget.pipeline.store import MANIFEST, StoreWriter, TokenStore, open_store
from mlx_forget.pipeline.tokenise import Document, Progress, tokenise
from mlx_forget.pipeline.tokenizer import SAMPLE_BYTES, train_tokenizer
from mlx_forget.pipeline.vocabularies import Vocabulary, load_vocabulary, same_pieces, tokenizer_in


def silent(activity: str, fraction: float, num_bytes: int = 0) -> None:
    """The progress that nobody watches."""


def builtin_tokenizer(vocab_size: int, *, progress: Progress = silent) -> Path:
    """The tokenizer trained on the training split of the built-in prose: the file, made once and kept."""
    corpus = build_corpus("prose", progress=progress)
    path = forget_home() / "tokenizers" / f"prose-{corpus.fingerprint[:16]}-{vocab_size}.model"
    if not path.exists():
        progress(f"training a tokenizer of {vocab_size:,} pieces", 0.0)
        train_tokenizer(read_documents(corpus, "train"), vocab_size=vocab_size).save(path)
        progress(f"training a tokenizer of {vocab_size:,} pieces", 1.0)
    return path


def new_tokenizer(
    named: "list[NamedDocuments]",
    path: Path,
    *,
    vocab_size: int,
    kind: Literal["unigram", "bpe"] = "unigram",
    sample_bytes: int | None = None,
    progress: Progress = silent,
) -> None:
    """Train a tokenizer on the training documents of some sources.

    Args:
        sample_bytes: text to train on; None is enough for the vocabulary: 2.5 MB, or 2 KB per piece where that is more.
    """
    activity = f"training a tokenizer of {vocab_size:,} pieces"
    progress(activity, 0.0)
    texts = (content if isinstance(content, str) else content.text for _, split, content in _contents(named) if split == "train")
    train_tokenizer(
        texts, vocab_size=vocab_size, kind=kind, sample_bytes=sample_bytes or max(SAMPLE_BYTES, 2_000 * vocab_size)
    ).save(path)
    progress(activity, 1.0)


def resolve_store(name: str, tokenizer_file: Path, *, progress: Progress = silent, opened: Opened | None = None) -> TokenStore:
    """The store behind a name: a store folder, or anything that `documents_of` knows.

    Text is tokenised under the cache folder, keyed by its content and the tokenizer.

    Args:
        opened: what others have opened already, and may use from here on.

    Raises:
        UserError: nothing by that name, or a store made with another tokenizer.
    """
    shared = opened or Opened()
    vocabulary = shared.vocabulary(tokenizer_file)
    template = vocabulary.chat_template
    key = ("named store", name, vocabulary.hash, None if template is None else template.hash)
    return shared.once(key, lambda: _resolve(name, tokenizer_file, vocabulary, progress, shared))


def _resolve(name: str, tokenizer_file: Path, vocabulary: Vocabulary, progress: Progress, opened: Opened) -> TokenStore:
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        store = opened.store(path)
        if store.tokenizer_hash != vocabulary.hash and not same_pieces(opened.vocabulary(tokenizer_in(path)), vocabulary):
            raise UserError(
                f"Store {path} was made with another tokenizer ({store.tokenizer_hash[:12]}) than the model's ({vocabulary.hash[:12]}): "
                f"prepare it again with --tokenizer {tokenizer_file}"
            )
        return store
    named = documents_of(name, progress=progress)
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in path.stem)
    template = vocabulary.chat_template
    written = vocabulary.hash[:16] + (f"-{template.hash[:8]}" if template is not None else "")
    folder = forget_home() / "stores" / f"{stem}-{named.key[:16]}-{written}"
    if (folder / MANIFEST).is_file():
        return opened.store(folder)
    try:
        return write_store(folder, [named], tokenizer_file, wait=True, progress=progress)
    except UserError:
        # Another process may have finished the same store while this one waited.
        if (folder / MANIFEST).is_file():
            return opened.store(folder)
        raise


@dataclass(frozen=True)
class NamedDocuments:
    """Text that a user named.

    Args:
        key: a hash of the content and of how it is read.
        whole: that hash without the part that is read.
        source: what it is, in words.
        num_bytes: UTF-8 bytes of all documents, about.
        has_splits: whether it says itself what validates.
        read: starts a new pass over (split, content); among other sources, with the share that validates of all of them, and the hashes
            of documents that came before.
        reading: how documents are read.
        bad: takes what cannot be read in a pass.
        keep: decides on documents.
    """

    key: str
    source: str
    num_bytes: int
    read: Callable[..., Iterator[tuple[str, Content]]]
    has_splits: bool = False
    whole: str = ""
    reading: Reading = field(default_factory=Reading)
    bad: BadInput = field(default_factory=BadInput)
    keep: Filter = field(default_factory=Filter)

    def skipped(self) -> Counter[str]:
        """What was left out in the last pass, by reason."""
        return self.bad.counts + self.keep.dropped


def documents_of(
    name: str,
    reading: Reading | None = None,
    *,
    folder: Path | None = None,
    skip_bad: bool = False,
    held_out: HeldOut | None = None,
    progress: Progress = silent,
) -> NamedDocuments:
    """The documents behind a built-in corpus, a recipe, a file, folder or glob, a Hub id, or `-` (standard input).

    Args:
        reading: how files and Hub data are read; a recipe brings its own.
        folder: where the files of a recipe are, instead of the Hub.
        skip_bad: count what cannot be read, instead of stopping.
        held_out: leave out near-copies of this.

    Raises:
        UserError: nothing by that name, or nothing readable.
    """
    path = Path(name).expanduser()
    if name in CORPORA:
        if folder is not None:
            raise UserError(f"{name} is a built-in corpus: leave --from out.")
        reading = reading or Reading()
        if reading.config is not None or reading.split is not None:
            raise UserError(f"{name} is a built-in corpus with splits of its own: leave --config and --split out.")
        corpus = build_corpus(name, progress=progress)
        return _named(
            corpus.fingerprint,
            f"built-in corpus {name}",
            sum(corpus.num_bytes.values()),
            lambda bad, keep, share: _corpus_documents(corpus, keep, reading.part),
            reading,
            held_out=held_out,
            skip_bad=skip_bad,
            has_splits=True,
        )
    if name in recipes.names() and not path.exists():
        recipe = recipes.load(name)
        chosen = recipe.reading(reading or Reading())
        if folder is None:
            return _of_hub(recipe.hub(), f"recipe {name} ({recipe.hub()})", chosen, recipe.num_bytes, skip_bad, held_out)
        return _of_files(str(folder), f"recipe {name} from {folder}", chosen, skip_bad, held_out, progress)
    if folder is not None:
        raise unknown("recipe", name, recipes.names())
    if name == "-":
        return _of_files(str(_spool_stdin()), "standard input", reading or Reading(), skip_bad, held_out, progress)
    if path.exists() or source_files.is_glob(path):
        return _of_files(str(path), str(path), reading or Reading(), skip_bad, held_out, progress)
    data = hub.parse_id(name)
    if data is not None:
        return _of_hub(data, f"Hub data set {data}", reading or Reading(), 0, skip_bad, held_out)
    if os.sep in name or path.suffix:
        raise UserError(f"There is no file or folder {name}.")
    raise unknown("corpus, recipe or path", name, [*CORPORA, *recipes.names()])


def write_store(
    folder: Path,
    named: list[NamedDocuments],
    tokenizer_file: Path,
    *,
    wait: bool = False,
    num_workers: int | None = None,
    progress: Progress = silent,
) -> TokenStore:
    """Tokenise sources, one after the other, into a new store.

    Args:
        folder: must not exist; it appears when the store is whole.
        wait: wait for another process that writes the same store, instead of refusing.
        num_workers: processes that tokenise; None is every core.
    """
    source = "; ".join(one.source for one in named)
    template: ChatTemplate | None = None

    def open_writer(vocabulary: Vocabulary) -> StoreWriter:
        nonlocal template
        template = vocabulary.chat_template
        return StoreWriter(
            folder=folder,
            tokenizer_file=tokenizer_file,
            tokenizer_hash=vocabulary.hash,
            vocab_size=vocabulary.vocab_size,
            bos_id=vocabulary.bos_id,
            eos_id=vocabulary.eos_id,
            source=source,
            sources=tuple(one.source for one in named) if len(named) > 1 else (),
            key=" ".join([*(one.key for one in named), *([template.hash] if template is not None else [])]),
            wait=wait,
        )

    def close(writer: StoreWriter) -> TokenStore:
        skipped = sum((one.skipped() for one in named), Counter[str]())
        part = named[0].reading.part
        return writer.close(skipped=skipped, part=part and (*part, " ".join(one.whole for one in named)))

    return tokenise(
        _documents(named, lambda: template),
        open_writer,
        tokenizer_file,
        activity=f"tokenising {source}",
        num_bytes=sum(one.num_bytes for one in named),
        progress=progress,
        num_workers=num_workers,
        close=close,
    )


def held_out_of(name: str, tokenizer_file: Path | None = None, *, progress: Progress = silent) -> HeldOut:
    """The validation documents of a store or of anything that `documents_of` knows, for training text to keep clear of.

    Raises:
        UserError: nothing by that name, or it has no validation documents.
    """
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        split = open_store(path).split("validation")
        vocabulary = load_vocabulary(tokenizer_in(path))
        return HeldOut(vocabulary.decode(split.document(index)) for index in range(split.num_documents))
    contents = (content for split, content in documents_of(name, progress=progress).read() if split == "validation")
    return HeldOut(content if isinstance(content, str) else content.text for content in contents)


def _documents(named: list[NamedDocuments], template_of: Callable[[], ChatTemplate | None]) -> Iterator[Document]:
    """All documents, without conversations that the tokenizer's chat template refuses: it is known when the first one is asked for."""
    template = template_of()
    for number, split, content in _contents(named):
        if template is not None and isinstance(content, Conversation):
            try:
                template.text(content.messages)
            except UserError as error:
                one = named[number]
                one.bad.report(one.source, str(error).rstrip("."), kind="refused by the chat template")
                continue
        yield Document(split, content, number)


def _contents(named: list[NamedDocuments]) -> Iterator[tuple[int, str, Content]]:
    """The documents of some sources, (source, split, content): those that are split by hash as one, so that equal ones are in one split."""
    if len(named) == 1:
        yield from ((0, split, content) for split, content in named[0].read())
        return
    seen, share = SeenHashes(), validation_share(sum(one.num_bytes or hub.UNKNOWN_BYTES for one in named if not one.has_splits))
    for number, one in enumerate(named):
        yield from ((number, split, content) for split, content in one.read(share, seen))


def _named(
    content_key: str,
    source: str,
    num_bytes: int,
    read: "Callable[[BadInput, Filter, float | None], Iterable[tuple[str, Content]]]",
    reading: Reading,
    *,
    held_out: HeldOut | None,
    skip_bad: bool,
    has_splits: bool = False,
) -> NamedDocuments:
    bad = BadInput(skip=skip_bad)
    keep = Filter(min_chars=reading.min_chars, max_chars=reading.max_chars, once=reading.once, held_out=held_out)
    suffix = f" without copies of {held_out.key}" if held_out is not None else ""

    def start(share: float | None = None, seen: SeenHashes | None = None) -> Iterator[tuple[str, Content]]:
        bad.restart()
        keep.restart(seen)
        return iter(read(bad, keep, share))

    key, whole = (reading.key(content_key, whole=whole) + suffix for whole in (False, True))
    return NamedDocuments(key, source, num_bytes, start, has_splits, whole, reading, bad, keep)


def _of_files(
    name: str, source: str, reading: Reading, skip_bad: bool, held_out: HeldOut | None, progress: Progress
) -> NamedDocuments:
    progress(f"reading {source}", 0.0)
    which = {"config": reading.config, "split": reading.split}
    found = source_files.find_splits(name, **which)
    return _named(
        source_files.content_hash(name, **which),
        source,
        sum(file.stat().st_size for file, _ in found),
        lambda bad, keep, share: sources.read_documents(name, reading, bad=bad, keep=keep, share=share),
        reading,
        held_out=held_out,
        skip_bad=skip_bad,
        has_splits=any(split == "validation" for _, split in found),
    )


def _of_hub(
    data: hub.HubData, source: str, reading: Reading, num_bytes: int, skip_bad: bool, held_out: HeldOut | None
) -> NamedDocuments:
    return _named(
        hashlib.sha256(f"{data} {data.files}".encode()).hexdigest(),
        source,
        num_bytes,
        lambda bad, keep, share: hub.read_hub(data, reading, bad=bad, keep=keep, share=share),
        reading,
        held_out=held_out,
        skip_bad=skip_bad,
    )


def _spool_stdin() -> Path:
    """Standard input in a temporary file: it is read more than once."""
    import atexit
    import shutil
    import sys

    handle, name = tempfile.mkstemp(prefix="forget-stdin-")
    path = Path(name)
    atexit.register(lambda: path.unlink(missing_ok=True))
    with os.fdopen(handle, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    with path.open("rb") as file:
        suffix = ".jsonl" if file.read(4096).lstrip()[:1] == b"{" else ".txt"
    named = path.with_suffix(suffix)
    path.rename(named)
    atexit.register(lambda: named.unlink(missing_ok=True))
    return named


def _corpus_documents(corpus: BuiltCorpus, keep: Filter, part: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    plain = keep == Filter() and part is None
    for split in source_files.SPLITS:
        for text in read_documents(corpus, split):
            if plain or (in_part(digest := digest_of(text), part) and keep.keeps(text, digest)):
                yield split, text
