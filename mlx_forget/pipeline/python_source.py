"""One Python source file, taken apart into its English (docstrings, long comments) and its bare code.

The syntax tree says where the docstrings are; a regular expression that steps over strings finds comments,
several times as fast as `tokenize` does. The code that is left parses: `strip` tries.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

MIN_DOCSTRING_CHARS = 40
MIN_COMMENT_CHARS = 80
MIN_ATTACHED_CHARS = 200

# A comment that fills its line, a comment behind code, or a string to step over. Prefixes such as rb"" do not
# matter: a backslash hides the next quote in every kind of string.
_COMMENT_OR_STRING = re.compile(
    r"""
      (?P<whole>^[ \t\f]*\#[^\n]*(?:\n|\Z))
    | (?P<behind>[ \t]*\#[^\n]*)
    | \"\"\"[^"\\]*+(?:(?:\\.|"(?!""))[^"\\]*+)*+\"\"\"
    | \'\'\'[^'\\]*+(?:(?:\\.|'(?!''))[^'\\]*+)*+\'\'\'
    | "[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"
    | '[^'\\\n]*+(?:\\.[^'\\\n]*+)*+'
    """,
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_LICENCE = re.compile(r"copyright|licen[sc]ed? |all rights reserved|automatically generated", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+|[^\sA-Za-z]")
# Words that make up a third of English, and nearly nothing of commented-out code.
_FUNCTION_WORDS = frozenset(
    (
        *("a", "an", "are", "as", "at", "be", "by", "can", "has", "have", "in", "is", "it", "not"),
        *("of", "on", "that", "the", "these", "this", "to", "was", "we", "were", "when", "which", "will"),
    )
)
_MIN_FUNCTION_WORD_SHARE = 0.12


@dataclass(frozen=True)
class ParsedSource:
    """A file that parsed: its text with newlines as `\\n`, and where docstrings and comments are.

    Args:
        text: the source.
        tree: its syntax tree.
        docstrings: (start, end, needs a `pass` in its place) of every statement that is only a string.
        comments: (start, end, fills its lines) of every comment, in order.
    """

    text: str
    tree: ast.Module
    docstrings: tuple[tuple[int, int, bool], ...]
    comments: tuple[tuple[int, int, bool], ...]


def parse(source: bytes) -> ParsedSource | None:
    """A UTF-8 Python file taken apart, or None where it does not decode or parse."""
    try:
        text = source.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        tree = _tree(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    comments = tuple(
        (found.start(), found.end(), found.lastgroup == "whole") for found in _COMMENT_OR_STRING.finditer(text) if found.lastgroup
    )
    return ParsedSource(text, tree, tuple(_string_statements(tree, text)), comments)


def english(source: ParsedSource) -> list[str]:
    """Docstrings, documentation passed to calls, and long comments, cleaned, in the order of the file."""
    found = [(node.lineno, text) for node, text in _docstrings(source.tree)]
    found += _attached(source.tree)
    found += _comment_blocks(source)
    return [text for _, text in sorted(found, key=lambda entry: entry[0])]


def strip(source: ParsedSource) -> str | None:
    """The code without docstrings, comments and runs of blank lines, or None where that does not parse."""
    text = source.text
    cuts = [(start, end, "pass" if needed else "") for start, end, needed in source.docstrings]
    cuts += [(start, end, "") for start, end, _ in source.comments]
    parts = []
    last = 0
    for start, end, instead in sorted(cuts):
        if start < last:
            continue
        parts += [text[last:start], instead]
        last = end
    code = "".join([*parts, text[last:]])
    code = re.sub(r"[ \t\f]+$", "", code, flags=re.MULTILINE)
    code = re.sub(r":\n\n+(?=[ \t])", ":\n", code)
    code = re.sub(r"\n{3,}", "\n\n", code).strip("\n")
    try:
        _tree(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return code + "\n" if code else None


_CYTHON_DOCSTRING = re.compile(r"""^[ \t]*[rR]?(\"{3}|\'{3})(.+?)\1""", re.MULTILINE | re.DOTALL)


def cython_english(source: bytes) -> list[str]:
    """Strings in three quotes that begin a line of Cython, which Python cannot parse: its docstrings."""
    try:
        text = source.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return []
    found = (inspect.cleandoc(match[2]) for match in _CYTHON_DOCSTRING.finditer(text))
    return [docstring for docstring in found if len(docstring) >= MIN_DOCSTRING_CHARS]


def _tree(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _bodies(body: list[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """Every list of statements: five times as fast as `ast.walk`, which visits expressions too."""
    yield body
    for statement in body:
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(statement, name, None)
            if inner:
                yield from _bodies(inner)
        for name in ("handlers", "cases"):
            for branch in getattr(statement, name, ()):
                yield from _bodies(branch.body)


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    owners: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    owners += [
        statement
        for body in _bodies(tree.body)
        for statement in body
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for owner in owners:
        text = ast.get_docstring(owner, clean=True)
        if text and len(text) >= MIN_DOCSTRING_CHARS:
            yield owner.body[0], text


def _attached(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Strings passed to a call at the top of a module: how C extensions get docstrings (`add_docstr`)."""
    for statement in tree.body:
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
            continue
        for argument in statement.value.args:
            inner: ast.expr = argument
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr == "format":
                inner = inner.func.value
            if isinstance(inner, ast.BinOp):
                inner = inner.left
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and len(inner.value) >= MIN_ATTACHED_CHARS:
                yield inner.lineno, inspect.cleandoc(inner.value)


def _comment_blocks(source: ParsedSource) -> Iterator[tuple[int, str]]:
    blocks: list[list[int]] = []
    for start, end, whole in source.comments:
        if whole and blocks and blocks[-1][1] == start:
            blocks[-1][1] = end
        elif whole:
            blocks.append([start, end])
    for start, end in blocks:
        if end - start < MIN_COMMENT_CHARS:
            continue
        lines = [line.strip().lstrip("#:").removeprefix(" ") for line in source.text[start:end].splitlines()]
        text = "\n".join(lines).strip()
        if len(text) >= MIN_COMMENT_CHARS and is_english(text) and not _LICENCE.search(text[:400]):
            yield source.text.count("\n", 0, start) + 1, text


def is_english(text: str) -> bool:
    """Whether a share of the words and signs that only running English has are function words."""
    words = _WORD.findall(text)
    return sum(word.lower() in _FUNCTION_WORDS for word in words) >= _MIN_FUNCTION_WORD_SHARE * max(1, len(words))


def _string_statements(tree: ast.Module, text: str) -> Iterator[tuple[int, int, bool]]:
    """Spans of the statements that are only a string: whole lines where nothing else is on them."""
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)

    def offset(line: int, column: int) -> int:
        """The character at a 1-based line and a column in UTF-8 bytes."""
        content = lines[line - 1]
        return starts[line - 1] + (column if content.isascii() else len(content.encode()[:column].decode()))

    for body in _bodies(tree.body):
        strings = [
            statement
            for statement in body
            if isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str)
        ]
        for index, statement in enumerate(strings):
            assert statement.end_lineno is not None
            assert statement.end_col_offset is not None
            start = offset(statement.lineno, statement.col_offset)
            end = offset(statement.end_lineno, statement.end_col_offset)
            line_start, line_end = starts[statement.lineno - 1], starts[statement.end_lineno]
            behind = text[end : line_end - 1].strip()
            alone = not text[line_start:start].strip() and (not behind or behind.startswith("#"))
            if alone and not (index == 0 and len(strings) == len(body)):
                yield line_start, min(line_end, len(text)), False
            else:
                yield start, end, True
