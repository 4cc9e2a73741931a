"""The built-in corpora: clean text, no copies across splits, the same bytes for everyone, safe caching, honest differences."""

import ast
import fcntl
import io
import json
import os
import pickle
import random
import subprocess
import sys
import sysconfig
import time
import tokenize
from dataclasses import replace
from inspect import cleandoc
from pathlib import Path

import numpy as np
import pytest

from mlx_forget.errors import RunFailed, UserError
from mlx_forget.pipeline import corpora, documents, installation, passages, python_source
from mlx_forget.pipeline import harvest as harvest_module
from mlx_forget.pipeline.corpora import CORPORA, SPLITS, BuiltCorpus, build_corpus, forget_home, read_documents
from mlx_forget.pipeline.harvest import harvest
from mlx_forget.pipeline.near_copies import SeenText, fingerprints
from mlx_forget.pipeline.passages import english_passages, paragraphs, pieces

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

STRIPPING = [
    ('"""Module."""\nx = 1\n', "x = 1\n"),
    ("# comment\nx = 1  # why\n", "x = 1\n"),
    ("x = '# no comment'  # comment\n", "x = '# no comment'\n"),
    ('x = """a\n# no comment\n"""\n', 'x = """a\n# no comment\n"""\n'),
    ("x = r'\\'  # comment ' quote\n", None),
    ("x = 'it\\'s # not'  # is\n", "x = 'it\\'s # not'\n"),
    ("x = f'{y}#{z}'  # is\n", "x = f'{y}#{z}'\n"),
    ('def f():\n    """Only this."""\n', "def f():\n    pass\n"),
    ('def f(): "Only this."\n', "def f(): pass\n"),
    ('def f():\n    """This."""  # and this\n    return 1\n', "def f():\n    return 1\n"),
    ('def f():\n    """This."""; return 1\n', "def f():\n    pass; return 1\n"),
    ('class A:\n    "First."\n    x = 1\n    "About x."\n', "class A:\n    x = 1\n"),
    ('class A:\n    "First."\n    "Second."\n', "class A:\n    pass\n"),
    ('def f():\n    """Größe → ü."""\n    return "é"  # ö\n', 'def f():\n    return "é"\n'),
    ('é = "ü"; """stray""" ; y = 2\n', 'é = "ü"; pass ; y = 2\n'),
    ("if x:\n    # only\n    pass\n", "if x:\n    pass\n"),
    ("x = 1\n\n\n\n\ny = 2\n", "x = 1\n\ny = 2\n"),
    ('match x:\n    case 1:\n        "doc"\n', "match x:\n    case 1:\n        pass\n"),
    ("x = (1,  # one\n     # two\n     2)\n", "x = (1,\n     2)\n"),
    ("x = 1\r\n# gone\r\ny = 2\r\n", "x = 1\ny = 2\n"),
    ('"""Only a docstring."""', "pass\n"),
    ("# only a comment", None),
    ("", None),
]


@pytest.mark.parametrize(("source", "wanted"), STRIPPING)
def test_stripping_keeps_code_and_nothing_else(source: str, wanted: str | None) -> None:
    parsed = python_source.parse(source.encode())
    if parsed is None:
        assert wanted is None
    else:
        assert python_source.strip(parsed) == wanted


def library_sample() -> list[Path]:
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return random.Random(0).sample(paths, 12)


class WithoutText(ast.NodeTransformer):
    """A tree without statements that are only a string, and with every other string blank (their whitespace may change)."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str | bytes) else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                kept = [line for line in body if not (is_string(line) or isinstance(line, ast.Pass))]
                setattr(node, name, kept)
        return super().generic_visit(node)


def is_string(statement: ast.stmt) -> bool:
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)


def test_stripped_library_files_mean_the_same_and_hold_no_comment() -> None:
    for path in library_sample():
        parsed = python_source.parse(path.read_bytes())
        assert parsed is not None
        code = python_source.strip(parsed)
        assert code is not None, path
        before, after = (ast.dump(WithoutText().visit(ast.parse(text))) for text in (parsed.text, code))
        assert before == after, path
        kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(code).readline)}
        assert tokenize.COMMENT not in kinds, path
        assert "\n\n\n" not in code


@pytest.mark.parametrize("source", [b"def f(:\n", b"\xff\xfe", b"x = '\\ud800'\n\0", b"(" * 5000])
def test_files_that_do_not_decode_or_parse_are_left_out(source: bytes) -> None:
    assert python_source.parse(source) is None


def test_english_of_a_file_comes_in_its_order_and_without_licences() -> None:
    source = '''# Copyright 2026 Somebody. Licensed under terms that are long enough to pass for English, and this is it.
"""The first docstring of this file, which is long enough to be kept."""

# A comment that runs over several lines and tells the reader of this file why it is
# that the function below has to be as it is, and not otherwise.
def f():
    """The second docstring of this file, which is long enough to be kept."""
    # x = [compute(i) for i in range(10)]; y = {k: v for k, v in zip(a, b)}; z = sorted(y.items())[0]
    return 1  # short


add_docstr(f, """
    The third one is passed to a call, as those of C extensions are. It has to be rather longer than the others are,
    because strings are passed to calls for other reasons too, and most of those are shorter than this one is. And so on.
    """)
'''
    parsed = python_source.parse(source.encode())
    assert parsed is not None
    found = python_source.english(parsed)
    assert [text[:9] for text in found] == ["The first", "A comment", "The secon", "The third"]
    assert "as it is, and not otherwise." in found[1]


def test_docstrings_of_cython_are_found_without_parsing_it() -> None:
    source = b'cdef class A:\n    """What this class is for, in one sentence that is long enough."""\n    cdef int x\n'
    assert python_source.cython_english(source) == ["What this class is for, in one sentence that is long enough."]
    assert python_source.cython_english(b"\xff") == []


def test_paragraphs_drop_examples_code_and_the_headings_left_alone() -> None:
    docstring = """Add two numbers.

    Parameters
    ----------
    a : int
        The first.

    For instance::

        c = add(1, 2)

        d = c

    More about it.

    <Tip>

    ```python
    add(1, 2)

    add(3, 4)
    ```

    .. plot::

        import matplotlib

    Examples
    --------

    >>> add(1, 2)
    3

    Notes
    -----
    """
    kept = "\n".join(paragraphs(cleandoc(docstring)))
    assert kept == ("Add two numbers.\nParameters\n----------\na : int\n    The first.\nFor instance::\nMore about it.")


def test_long_texts_are_cut_between_functions_and_nothing_is_lost() -> None:
    text = "".join(f"def function_{i}():\n    return {i}\n\n    # tail\n\n" for i in range(2000))
    cut = pieces(text)
    assert "".join(cut) == text
    assert all(len(piece) <= 20_000 and piece.startswith("def ") for piece in cut)
    assert "".join(pieces("x" * 50_000)) == "x" * 50_000


# Near-copies

STORY = (
    "The lamp on the harbour wall had not been lit for eleven years when the keeper's daughter came back with a box "
    "of matches, two candles and the firm belief that somebody out there was still waiting for a light."
)


def test_a_copy_is_known_by_its_words_not_by_its_layout() -> None:
    seen = SeenText()
    seen.add(fingerprints([STORY]))
    changed = STORY.upper().replace(" ", "\n  ").replace(",", ";")
    other_word = STORY.replace("eleven", "twelve")
    unrelated = " ".join(sorted(STORY.split()))
    shares = [seen.share(marks) for marks in fingerprints([changed, other_word, unrelated, "too short"])]
    assert shares[0] == 1.0
    assert 0.5 <= shares[1] < 1.0
    assert shares[2] < 0.2
    assert shares[3] == 0.0


def test_marks_do_not_depend_on_the_neighbours() -> None:
    alone = [fingerprints([text])[0].tolist() for text in (STORY, STORY[40:], "one two")]
    together = [marks.tolist() for marks in fingerprints([STORY, STORY[40:], "one two"])]
    assert alone == together


def sources(*texts: str) -> list[documents.English]:
    return [(english_passages(text),) for text in texts]


def test_prose_keeps_one_of_two_copies_and_all_that_is_new() -> None:
    new = "This paragraph is found in one of the two files only, so it stays. " + "And so on. " * 19 + "The end."
    texts = [STORY + "\n\n" + STORY.replace("eleven", "twelve") + "\n\n" + new, STORY + "\n\n" + new[::-1]]
    kept = "".join(text for found in documents.prose(sources(*texts), seen=SeenText()) for text in found)
    assert kept.count("The lamp on the harbour wall") == 1
    assert new in kept


def test_prose_does_not_depend_on_the_order_of_files() -> None:
    texts = [STORY * 2, STORY[::-1] * 2, "Something else altogether that nobody has written before. " * 10]
    orders = [sources(*texts), sources(*reversed(texts))]
    first, second = (list(documents.prose(order, seen=SeenText())) for order in orders)
    assert first == second


def code_passages(*texts: str) -> list[tuple[passages.Passage, ...]]:
    return [(passages.Passage(text, fingerprints([text])[0]),) for text in texts]


def test_code_that_repeats_prose_or_validation_is_left_out() -> None:
    rng = random.Random(1)
    files = [" ".join(f"name_{rng.randrange(10**6)}" for _ in range(60)) for _ in range(60)]
    prose = SeenText()
    prose.add(fingerprints([STORY]))
    clean = documents.code(code_passages(*files, STORY), prose=prose, validation_share=0.3, max_bytes=10**6)
    assert sorted(clean["train"] + clean["validation"]) == sorted(files)
    assert len(clean["validation"]) > 5
    # A training piece that swallows a validation piece, whichever of the two is the larger.
    small, noise = clean["validation"][0], [f"noise_{i}" for i in range(600)]
    for length in (2, 600):
        texts = [" ".join([small, *noise[:length], ending]) for ending in "abcdefgh"]
        results = [
            documents.code(code_passages(*files, whole), prose=prose, validation_share=0.3, max_bytes=10**6) for whole in texts
        ]
        assert not any(small in found["validation"] and set(found["train"]) & set(texts) for found in results)
        assert any(set(found["train"]) & set(texts) for found in results) == (length == 600)


def test_all_of_a_file_goes_to_one_split_and_the_cap_holds() -> None:
    rng = random.Random(2)
    files = [[f"{i} {j} {rng.random()}" for j in range(5)] for i in range(200)]
    splits = documents.split(files, validation_share=0.2, max_bytes=10**6)
    place = {text: split for split in SPLITS for text in splits[split]}
    assert all(len({place[text] for text in texts}) == 1 for texts in files)
    assert 20 < len({text.split()[0] for text in splits["validation"]}) < 60
    capped = documents.split(files, validation_share=0.2, max_bytes=1000)
    assert sum(map(len, capped["train"] + capped["validation"])) < 1100
    assert capped["train"] == splits["train"][: len(capped["train"])]


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
