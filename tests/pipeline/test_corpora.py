"""The built-in corpora: clean text, no copies across splits, the same bytes for everyone, safe caching, honest differences."""

import fcntl
import json
import os
import pickle
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_forget.errors import RunFailed, UserError
from mlx_forget.pipeline import corpora, documents, installation, passages, python_source
from mlx_forget.pipeline import harvest as harvest_module
from mlx_forget.pipeline.corpora import CORPORA, SPLITS, BuiltCorpus, build_corpus, forget_home, read_documents
from mlx_forget.pipeline.harvest import harvest
from mlx_forget.pipeline.near_copies import SeenText, fingerprints

ROOT = Path(corpora.__file__).parents[2]


@pytest.fixture(autouse=True)
def smoke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGET_SCALE", "smoke")
    # What is installed changes between these tests.
    monkeypatch.setattr(installation, "installed_version", installation.installed_version.__wrapped__)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BuiltCorpus]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORGET_SCALE", "smoke")
        return {name: build_corpus(name, home=home) for name in CORPORA}


def texts(corpus: BuiltCorpus) -> list[str]:
    return [text for split in SPLITS for text in read_documents(corpus, split)]


# What is in them


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_is_what_its_manifest_says(built: dict[str, BuiltCorpus], name: str) -> None:
    corpus = built[name]
    for split in SPLITS:
        found = list(read_documents(corpus, split))
        assert len(found) == corpus.num_documents[split] > 0
        assert sum(len(text.encode()) for text in found) == corpus.num_bytes[split]
    assert 300_000 < sum(corpus.num_bytes.values()) < 500_000
    assert all(len(text) <= passages.MAX_DOCUMENT_CHARS + 1 for text in texts(corpus))
    assert pickle.loads(pickle.dumps(corpus)) == corpus


@pytest.mark.parametrize("name", CORPORA)
def test_no_document_comes_twice_or_in_both_splits(built: dict[str, BuiltCorpus], name: str) -> None:
    found = texts(built[name])
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", ["prose", "code", "cpp"])
def test_validation_is_no_copy_of_training(built: dict[str, BuiltCorpus], name: str) -> None:
    seen = SeenText()
    seen.add(fingerprints(list(read_documents(built[name], "train"))))
    shares = [seen.share(marks) for marks in fingerprints(list(read_documents(built[name], "validation")))]
    assert max(shares) < 0.6
    assert np.mean(shares) < 0.2


def test_code_does_not_repeat_prose(built: dict[str, BuiltCorpus]) -> None:
    prose = SeenText()
    prose.add(fingerprints(texts(built["prose"])))
    assert max(prose.share(marks) for marks in fingerprints(texts(built["code"]))) < documents.MAX_FOREIGN_SHARE


def test_prose_is_english_and_code_is_not(built: dict[str, BuiltCorpus]) -> None:
    def english(name: str) -> float:
        return float(np.mean([python_source.is_english(text) for text in texts(built[name])]))

    assert english("prose") > 0.9
    assert english("code") < 0.05
    assert not any(">>>" in text for text in texts(built["prose"]))


def test_math_documents_are_questions_and_answers(built: dict[str, BuiltCorpus]) -> None:
    asked = [line for text in texts(built["math"]) for line in text.splitlines()[::2]]
    assert all(line.startswith("Q: ") for line in asked)
    assert len(set(asked)) == len(asked)


def test_cpp_documents_begin_without_a_licence(built: dict[str, BuiltCorpus]) -> None:
    assert not any("Copyright" in text[:200] or "Licensed under" in text[:200] for text in texts(built["cpp"]))


# Taking Python apart


# Near-copies


# The same bytes for everyone


def contents(corpus: BuiltCorpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.folder.iterdir()}


def test_workers_change_nothing(built: dict[str, BuiltCorpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = harvest_module._start_worker

    def count() -> "subprocess.Popen[bytes]":
        started.append(start())
        return started[-1]

    monkeypatch.setattr(harvest_module, "_start_worker", count)
    monkeypatch.setattr(harvest_module, "_MIN_BYTES_FOR_WORKERS", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    shares: list[float] = []
    again = {name: build_corpus(name, home=tmp_path, progress=lambda _, share: shares.append(share)) for name in CORPORA}
    assert len(started) >= 3
    assert shares[-1] == 1.0
    assert min(shares) >= 0
    for name in CORPORA:
        assert contents(again[name]) == contents(built[name])


def install(where: Path, version: str, *, extra: str = "") -> None:
    """A distribution `lamp` as pip would leave it."""
    rng = random.Random(3)
    package = where / "lamp"
    package.mkdir(parents=True)
    names = []
    for i in range(40):
        body = "\n".join(f"    name_{rng.randrange(10**6)} = call_{rng.randrange(10**6)}(a, b)" for _ in range(12))
        words = " ".join(rng.choice(["the lamp", "a light", "is lit", "of the wall", "in it", f"w{j}"]) for j in range(60))
        (package / f"m{i}.py").write_text(f'"""{words}{extra}"""\n\n\ndef f{i}(a, b):\n{body}\n    return a\n')
        names.append(f"lamp/m{i}.py,,")
    (package / "tests").mkdir()
    (package / "tests" / "test_lamp.py").write_text('"""A docstring of a test, which is not to be in any corpus."""\n')
    info = where / f"lamp-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lamp\nVersion: {version}\n")
    record = [*names, "lamp/tests/test_lamp.py,,", "lamp/gone.py,,", f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    (info / "RECORD").write_text("\n".join(random.Random(str(where)).sample(record, len(record))) + "\n")


@pytest.fixture
def only_lamp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGET_SCALE", "full")
    monkeypatch.setattr(installation, "PINNED_SOURCES", {"lamp": "1.0"})
    monkeypatch.setattr(documents, "topics", lambda *, smoke: [])


@pytest.mark.usefixtures("only_lamp")
def test_the_place_of_the_installation_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for place in ("one", "somewhere/else"):
        install(tmp_path / place, "1.0")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / place)
            found.append(build_corpus("prose", home=tmp_path / place / "home"))
    assert contents(found[0]) == contents(found[1])
    assert found[0].num_documents["train"] > 5
    assert not any("docstring of a test" in text for text in texts(found[0]))


@pytest.mark.usefixtures("only_lamp")
def test_published_means_the_published_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "1.0+local")
    monkeypatch.syspath_prepend(tmp_path / "site")
    first = build_corpus("prose", home=tmp_path)
    assert not first.published
    assert len(first.differences) == 1
    assert "other files" in first.differences[0]
    monkeypatch.setattr(corpora, "PUBLISHED", {"prose": first.fingerprint})
    again = build_corpus("prose", home=tmp_path)
    assert again == replace(first, published=True, differences=())


@pytest.mark.usefixtures("only_lamp")
def test_other_text_has_another_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprints = set()
    for place, extra in (("one", ""), ("two", " and more")):
        install(tmp_path / place, "1.0", extra=extra)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / place)
            fingerprints.add(build_corpus("prose", home=tmp_path / place / "home").fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.usefixtures("only_lamp")
def test_differences_name_versions_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "2.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(installation, "PINNED_SOURCES", {"lamp": "1.0", "no-such-package": "3.1"})
    corpus = build_corpus("prose", home=tmp_path)
    assert corpus.differences == (
        "lamp 2.0 instead of 1.0",
        "no-such-package is not installed (published with 3.1)",
    )
    assert not corpus.published
    (tmp_path / "site" / "lamp-2.0.dist-info" / "RECORD").unlink()
    monkeypatch.setattr(installation, "PINNED_SOURCES", {"lamp": "2.0"})
    assert "lamp has no list of its files" in installation.differences(installation.PINNED_SOURCES)[0]


def test_smoke_says_that_it_is_a_part(built: dict[str, BuiltCorpus]) -> None:
    for corpus in built.values():
        assert not corpus.published
        assert "FORGET_SCALE=smoke" in corpus.differences[0]


# The cache


def test_a_second_call_reads_nothing(built: dict[str, BuiltCorpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_build", None)
    for name, corpus in built.items():
        assert build_corpus(name, home=corpus.folder.parents[1]) == corpus


def test_the_scales_do_not_share_a_folder(built: dict[str, BuiltCorpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORGET_SCALE")
    for name, corpus in built.items():
        recipe = corpora._recipe(name)
        assert recipe.folder(corpus.folder.parent, name) != corpus.folder


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "broken manifest"])
def test_a_damaged_corpus_is_built_again(tmp_path: Path, damage: str) -> None:
    first = build_corpus("math", home=tmp_path)
    before = contents(first)
    if damage == "truncated":
        os.truncate(first.folder / "train.arrow", 1000)
    elif damage == "no manifest":
        (first.folder / "corpus.json").unlink()
    else:
        (first.folder / "corpus.json").write_text("{")
    leftover = tmp_path / "corpora" / f".building-math-{first.folder.name.partition('-')[2]}-dead"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    assert contents(build_corpus("math", home=tmp_path)) == before
    assert visible(tmp_path) == {first.folder.name}


def test_a_corpus_of_which_a_byte_has_changed_is_refused(tmp_path: Path) -> None:
    built = build_corpus("math", home=tmp_path)
    path = built.folder / "train.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged \(train.arrow\): remove that folder"):
        list(read_documents(build_corpus("math", home=tmp_path), "train"))
    assert list(read_documents(built, "validation"))


def visible(home: Path) -> set[str]:
    return {path.name for path in (home / "corpora").iterdir() if not path.name.endswith(".lock")}


def start_build(home: Path, name: str) -> "subprocess.Popen[str]":
    code = (
        "import sys; from pathlib import Path; from mlx_forget.pipeline.corpora import build_corpus\n"
        "print(build_corpus(sys.argv[1], home=Path(sys.argv[2])).fingerprint)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, name, str(home)], env=environment, stdout=subprocess.PIPE, text=True)


def test_processes_that_build_at_once_agree(built: dict[str, BuiltCorpus], tmp_path: Path) -> None:
    processes = [start_build(tmp_path, name) for name in ("prose", "code", "prose")]
    printed = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert printed == [built[name].fingerprint for name in ("prose", "code", "prose")]
    assert visible(tmp_path) == {built[name].folder.name for name in ("prose", "code")}


def test_a_killed_build_leaves_nothing_that_looks_built(built: dict[str, BuiltCorpus], tmp_path: Path) -> None:
    process = start_build(tmp_path, "prose")
    while not any((tmp_path / "corpora").glob(".building-*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.communicate()
    again = build_corpus("prose", home=tmp_path)
    assert again.fingerprint == built["prose"].fingerprint
    assert visible(tmp_path) == {built[name].folder.name for name in ("prose", "code")}


def test_without_locks_the_second_to_finish_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    recipe = corpora._recipe("math")
    first = build_corpus("math", home=tmp_path)
    inode = first.folder.stat().st_ino
    corpora._build(recipe, tmp_path / "corpora", alone=False, progress=lambda stage, share: None)
    assert first.folder.stat().st_ino == inode
    assert visible(tmp_path) == {first.folder.name}


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(harvest_module, "_start_worker", dead)
    files = installation.source_files(installation.SMOKE_SOURCES, languages={"python"}, smoke=True)
    with pytest.raises(RunFailed, match="died"):
        harvest(files, code_share=1.0, num_workers=2)


def test_workers_end_when_their_input_does() -> None:
    worker = harvest_module._start_worker()
    out, _ = worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert out == b""


# Requests that cannot be met


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, built: dict[str, BuiltCorpus]) -> None:
    with pytest.raises(UserError, match=r"Unknown corpus 'pros'. Did you mean 'prose'\?"):
        build_corpus("pros", home=tmp_path)
    with pytest.raises(UserError, match="Unknown split 'test'"):
        next(read_documents(built["math"], "test"))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_unknown_scale_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGET_SCALE", "smok")
    with pytest.raises(UserError, match=r"Unknown FORGET_SCALE 'smok'. Did you mean 'smoke'"):
        build_corpus("math", home=tmp_path)


def test_a_home_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot build the corpus 'math' in .*: Not a directory"):
        build_corpus("math", home=tmp_path / "file")


def test_the_home_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGET_HOME", str(tmp_path / "mine"))
    assert forget_home() == tmp_path / "mine"
    assert build_corpus("math").folder.is_relative_to(tmp_path / "mine" / "corpora")
    monkeypatch.delenv("FORGET_HOME")
    assert forget_home() == Path.home() / ".cache" / "mlx-forget"


def test_the_pinned_list_is_that_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    assert {name: versions[name] for name in installation.PINNED_SOURCES if name != "Python"} == {
        name: version for name, version in installation.PINNED_SOURCES.items() if name != "Python"
    }
    assert set(corpora.PUBLISHED) == set(CORPORA)


def test_importing_corpora_loads_no_scientific_package_beyond_numpy() -> None:
    code = "import sys, mlx_forget.pipeline.corpora; print([m for m in ('scipy', 'torch', 'mlx', 'pandas') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"


@pytest.mark.full
@pytest.mark.parametrize("name", CORPORA)
def test_the_full_corpora_are_the_published_ones(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORGET_SCALE")
    home = tmp_path_factory.getbasetemp() / "full"
    corpus = build_corpus(name, home=home)
    if any("instead of" in clause or "not installed" in clause for clause in corpus.differences):
        pytest.skip("; ".join(corpus.differences))
    assert corpus.published, json.dumps([corpus.fingerprint, corpus.differences])
