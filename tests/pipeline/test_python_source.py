"""Python files without their comments and docstrings: the same code, and nothing else."""

import ast
import io
import random
import sysconfig
import tokenize
from pathlib import Path

import pytest

from mlx_forget.pipeline import python_source
from mlx_forget.pipeline.passages import pieces

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


def test_long_texts_are_cut_between_functions_and_nothing_is_lost() -> None:
    text = "".join(f"def function_{i}():\n    return {i}\n\n    # tail\n\n" for i in range(2000))
    cut = pieces(text)
    assert "".join(cut) == text
    assert all(len(piece) <= 20_000 and piece.startswith("def ") for piece in cut)
    assert "".join(pieces("x" * 50_000)) == "x" * 50_000
