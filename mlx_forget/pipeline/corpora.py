"""The built-in corpora: real text cut from what every installation has, so that nothing is downloaded.

`prose` is English documentation and `code` Python source, both from a fixed list of distributions; `cpp` is C
and C++ headers; `math` comes from our own generator. A corpus is built once and cached under
`$FORGET_HOME/corpora`. With the versions of constraints.txt it has the published fingerprint; elsewhere it
says what differs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

from mlx_forget.durable_files import is_whole, read_object, sealed, sha256_of
from mlx_forget.errors import UserError, unknown
from mlx_forget.pipeline import documents, installation, mathematics
from mlx_forget.pipeline.documents import Split
from mlx_forget.pipeline.harvest import harvest
from mlx_forget.pipeline.near_copies import SeenText

Progress = Callable[[str, float], None]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Corpus:
    """What a built-in corpus is.

    Args:
        name: the name that `--target` and `--pretrain` take.
        description: one line for people.
        role: what it is meant for; any corpus can serve as either.
        max_bytes: cap of both splits together.
        validation_share: the share of documents (in `math`, of questions) that validate.
    """

    name: str
    description: str
    role: Literal["pretraining", "target"]
    max_bytes: int
    validation_share: float


CORPORA: Mapping[str, Corpus] = MappingProxyType(
    {
        corpus.name: corpus
        for corpus in (
            Corpus("prose", "English documentation of Python and its packages", "pretraining", 40_000_000, 0.03),
            Corpus("code", "Python source without docstrings and comments", "target", 12_000_000, 0.05),
            Corpus("cpp", "C and C++ headers of installed packages", "target", 12_000_000, 0.05),
            Corpus("math", "generated questions and answers from school mathematics", "target", 18_000_000, 0.04),
        )
    }
)
MANIFEST = "corpus.json"
# Counts up whenever the same sources would give other text.
RECIPE_VERSION = 1
# The fingerprints with the pinned versions.
PUBLISHED: Mapping[str, str] = MappingProxyType(
    {
        "prose": "d47e205eb97570823dcbba41e75eb1766e9d69fb16f1edfab019780ad386c0d9",
        "code": "576dcf7fa5dbc37943fd6f84c3d59bb0e682b562f73fa1db1bf9515d47274463",
        "cpp": "072f0baf4ce9ee582ecbad88a2d8eb5496d189d85b29f05a8c4f94bdffe1cbe2",
        "math": "07a2a20cbcf0166e4d8336afc551909bae327a6b141230687e0011c37d930e4a",
    }
)

# Three Python files in ten give as much code as the cap, and stripping a file costs as much as parsing it.
_CODE_SHARE = 0.3
_SMOKE_BYTES = 400_000
_SMOKE_VALIDATION_SHARE = 0.15


@dataclass(frozen=True)
class BuiltCorpus:
    """A corpus on disk.

    Args:
        name: its name in `CORPORA`.
        folder: where its Arrow files are.
        fingerprint: sha256 of all documents of both splits, in order.
        num_bytes: UTF-8 bytes of text per split.
        num_documents: documents per split.
        published: whether it is, byte for byte, the corpus that published figures used.
        differences: what is not as published, one clause each, such as "torch 2.14.0 instead of 2.13.0".
    """

    name: str
    folder: Path
    fingerprint: str
    num_bytes: Mapping[Split, int]
    num_documents: Mapping[Split, int]
    published: bool
    differences: tuple[str, ...]


def forget_home() -> Path:
    """Where caches live: `$FORGET_HOME`, or `~/.cache/mlx-forget`."""
    chosen = os.environ.get("FORGET_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "mlx-forget"


def build_corpus(name: str, *, home: Path | None = None, progress: Progress | None = None) -> BuiltCorpus:
    """The corpus of that name, built if it is not in the cache yet (prose and code are built together).

    `FORGET_SCALE=smoke` builds from a small part of the sources. Several processes may call this at once.

    Args:
        name: a key of `CORPORA`.
        home: the cache folder; None is `forget_home()`.
        progress: called with what is being done and the share done.

    Raises:
        UserError: unknown name, unknown scale, or a cache folder that cannot be written.
        RunFailed: a process that reads source files died.
    """
    recipe = _recipe(name)
    corpora = (home or forget_home()) / "corpora"
    if built := _open(recipe, corpora, name):
        return built
    try:
        corpora.mkdir(parents=True, exist_ok=True)
        with _lock(corpora / f".{recipe.group[0]}-{recipe.key}.lock") as alone:
            if not _open(recipe, corpora, name):
                _build(recipe, corpora, alone=alone, progress=progress or _silent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"Cannot build the corpus {name!r} in {corpora}: {reason}.") from error
    built = _open(recipe, corpora, name)
    assert built is not None
    return built


def read_documents(corpus: BuiltCorpus, split: Split) -> Iterator[str]:
    """The documents of a split in their order, from a memory-mapped Arrow file.

    Raises:
        UserError: unknown split, or a damaged file.
    """
    import pyarrow as pa

    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    _check_file(corpus.folder, split)
    with pa.memory_map(str(corpus.folder / f"{split}.arrow")) as source, pa.ipc.open_file(source) as reader:
        for i in range(reader.num_record_batches):
            yield from reader.get_batch(i).column("text").to_pylist()


def _check_file(folder: Path, split: Split) -> None:
    """Refuse documents that have changed since they were written; corpora of earlier releases have no checksum."""
    try:
        wanted = read_object(folder / MANIFEST).get("file_sha256")
        if wanted is None or wanted[split] == sha256_of(folder / f"{split}.arrow"):
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"The corpus in {folder} is damaged ({split}.arrow): remove that folder, and it is built again.")


@dataclass(frozen=True)
class _Recipe:
    """What decides on the text: the corpora that are built together, the scale, and the distributions."""

    group: tuple[str, ...]
    smoke: bool
    pinned: dict[str, str]

    @property
    def key(self) -> str:
        found = {name: installation.installed_version(name) for name in self.pinned}
        parts = [RECIPE_VERSION, self.group, self.smoke, sorted(found.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def folder(self, corpora: Path, name: str) -> Path:
        return corpora / f"{name}-{self.key}"

    def max_bytes(self, name: str) -> int:
        return _SMOKE_BYTES if self.smoke else CORPORA[name].max_bytes

    def validation_share(self, name: str) -> float:
        return _SMOKE_VALIDATION_SHARE if self.smoke else CORPORA[name].validation_share

    def differences(self) -> list[str]:
        scale = ["a small part of its sources only (FORGET_SCALE=smoke)"] if self.smoke else []
        return scale + installation.differences(self.pinned)


def _recipe(name: str) -> _Recipe:
    if name not in CORPORA:
        raise unknown("corpus", name, CORPORA)
    scale = os.environ.get("FORGET_SCALE") or "full"
    if scale not in ("full", "smoke"):
        raise unknown("FORGET_SCALE", scale, ["full", "smoke"])
    smoke = scale == "smoke"
    if name == "math":
        return _Recipe(("math",), smoke, {})
    if name == "cpp":
        return _Recipe(("cpp",), smoke, installation.SMOKE_HEADERS if smoke else installation.PINNED_HEADERS)
    return _Recipe(("prose", "code"), smoke, installation.SMOKE_SOURCES if smoke else installation.PINNED_SOURCES)


def _open(recipe: _Recipe, corpora: Path, name: str) -> BuiltCorpus | None:
    """The corpus in the cache, or None where it is not, or not all of it."""
    folder = recipe.folder(corpora, name)
    try:
        manifest = read_object(folder / MANIFEST)
        fingerprint, differences = str(manifest["fingerprint"]), tuple(str(one) for one in manifest["differences"])
        num_bytes, num_documents, file_bytes = (
            {split: int(manifest[key][split]) for split in SPLITS} for key in ("num_bytes", "num_documents", "file_bytes")
        )
        whole = is_whole(manifest) and all((folder / f"{split}.arrow").stat().st_size == file_bytes[split] for split in SPLITS)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    if not whole:
        return None
    published = fingerprint == PUBLISHED.get(name)
    if not published and not differences:
        differences = ("the same versions, but other files: packages of another platform, or changed by hand",)
    return BuiltCorpus(
        name=name,
        folder=folder,
        fingerprint=fingerprint,
        num_bytes=num_bytes,
        num_documents=num_documents,
        published=published,
        differences=() if published else differences,
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Wait until no other process builds the same; the kernel frees the lock of a process that dies.

    Yields whether that is sure: some network file systems have no locks. There, work may be done twice.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        else:
            alone = True
        yield alone


def _silent(stage: str, share: float) -> None:
    """No progress."""


def _build(recipe: _Recipe, corpora: Path, *, alone: bool, progress: Progress) -> None:
    """Build the corpora of a recipe aside, and rename each into place."""
    mark = f".building-{recipe.group[0]}-{recipe.key}-"
    if alone:
        for leftover in corpora.glob(f"{mark}*"):
            shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=mark, dir=corpora) as aside:
        for name, splits in _documents(recipe, progress):
            made, folder = Path(aside, name), recipe.folder(corpora, name)
            _write(made, splits, recipe.differences())
            if _open(recipe, corpora, name):
                continue
            if folder.exists():
                folder.rename(Path(aside, f"broken-{name}"))
            try:
                made.rename(folder)
            except OSError:
                # Without a lock another process can have been first; its corpus is the same.
                if not _open(recipe, corpora, name):
                    raise
    progress("done", 1.0)


def _documents(recipe: _Recipe, progress: Progress) -> Iterator[tuple[str, dict[Split, list[str]]]]:
    """The documents of every corpus of a recipe."""
    if recipe.group == ("math",):
        yield "math", _questions(recipe, progress)
        return
    cpp = recipe.group == ("cpp",)
    files = installation.source_files(recipe.pinned, languages={"cpp"} if cpp else {"python", "stub", "cython"}, smoke=recipe.smoke)
    harvests = harvest(
        files,
        code_share=1.0 if recipe.smoke else _CODE_SHARE,
        progress=lambda share: progress("reading source files", 0.9 * share),
    )
    prose = SeenText()
    progress("removing copies", 0.9)
    if not cpp:
        texts = documents.prose([found.english for found in harvests] + documents.topics(smoke=recipe.smoke), seen=prose)
        yield (
            "prose",
            documents.split(
                texts,
                validation_share=recipe.validation_share("prose"),
                max_bytes=recipe.max_bytes("prose"),
            ),
        )
        progress("removing copies", 0.95)
    name = recipe.group[-1]
    yield (
        name,
        documents.code(
            [found.code for found in harvests if found.code],
            prose=prose,
            validation_share=recipe.validation_share(name),
            max_bytes=recipe.max_bytes(name),
        ),
    )


def _questions(recipe: _Recipe, progress: Progress) -> dict[Split, list[str]]:
    splits: dict[Split, list[str]] = {split: [] for split in SPLITS}
    wanted, made = recipe.max_bytes("math"), 0
    blocks = mathematics.documents(num_bytes=wanted, validation_share=recipe.validation_share("math"))
    for count, (split, text) in enumerate(blocks):
        splits[split].append(text)
        made += len(text)
        if count % 100 == 0:
            progress("asking questions", min(made / wanted, 1.0))
    return splits


def _write(folder: Path, splits: dict[Split, list[str]], differences: list[str]) -> None:
    """Write both splits and, last, the manifest."""
    import pyarrow as pa

    folder.mkdir()
    fingerprint = hashlib.sha256()
    num_bytes = dict.fromkeys(SPLITS, 0)
    schema = pa.schema([("text", pa.string())])
    for split in SPLITS:
        texts = splits[split]
        with pa.OSFile(str(folder / f"{split}.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for start in range(0, len(texts), 256):
                column = pa.array(texts[start : start + 256], pa.string())
                writer.write_batch(pa.record_batch([column], schema))
        fingerprint.update(f"{split} {len(texts)}\n".encode())
        for text in texts:
            content = text.encode()
            num_bytes[split] += len(content)
            fingerprint.update(len(content).to_bytes(8, "little") + content)
    manifest = {
        "recipe_version": RECIPE_VERSION,
        "fingerprint": fingerprint.hexdigest(),
        "num_bytes": num_bytes,
        "num_documents": {split: len(splits[split]) for split in SPLITS},
        "file_bytes": {split: (folder / f"{split}.arrow").stat().st_size for split in SPLITS},
        "file_sha256": {split: sha256_of(folder / f"{split}.arrow") for split in SPLITS},
        "differences": differences,
    }
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest), indent=2) + "\n")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
