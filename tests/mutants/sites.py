"""Every place of a source file where one small mistake can be made, and the file with that mistake.

The mistakes are the usual ones: an operator or a comparison exchanged, a condition turned round, a constant off by one, a statement left
out, nothing returned. Left alone is what only tells people (annotations, docstrings, decorators, assertions, the words of messages), and
what cannot but fail at once (paths joined by another operator, an encoding of no name).
"""

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
_SIGNED = {ast.USub: ast.UAdd, ast.UAdd: ast.USub}
_SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
_NOT_MUTATED = ("annotation", "returns", "decorator_list", "type_comment", "type_params", "exc")


@dataclass(frozen=True)
class Site:
    """One mistake: where, in words, and which node of the file (in the order of `_nodes`) it changes in which of its ways.

    Args:
        path: of the file, relative to the root of the repository.
        line: from 1.
        function: the innermost function or class, or the module.
        what: the code before and after; of several that read alike in one function, which one.
        outermost: the function of the file, or method of a class, whose body it is in: name, first and last line; None outside of all.
        lines: first and last line of the innermost statement, without the block that it may head.
    """

    path: str
    line: int
    function: str
    what: str
    outermost: tuple[str, int, int] | None
    lines: tuple[int, int]
    node: int
    way: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.function}: {self.what}"

    @property
    def name(self) -> str:
        """What it is called when lines may have been added above it."""
        return f"{self.path} {self.function}: {self.what}"


def sites(root: Path, path: str) -> list[Site]:
    """All mistakes that can be made in a file, in the order of its text."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    found = []
    alike: Counter[tuple[str, str]] = Counter()
    for number, (node, function, outermost, lines) in enumerate(_nodes(tree)):
        ways = range(len(_ways(node)))
        before = _shown(node) if ways else ""
        for way in ways:
            after = copy.deepcopy(node)
            _ways(after)[way]()
            shown = "left out" if isinstance(after, ast.stmt) and hasattr(after, "left_out") else _shown(after)
            what = f"{before}  ->  {shown}"
            alike[function, what] += 1
            if alike[function, what] > 1:
                what += f"  (no. {alike[function, what]})"
            found.append(Site(path, node.lineno, function, what, outermost, lines, number, way))
    return found


def mutated(root: Path, site: Site) -> ast.Module:
    """The file with one mistake in it; lines are those of the file."""
    tree = ast.parse((root / site.path).read_text(encoding="utf-8"))
    node = next(node for number, (node, *_) in enumerate(_nodes(tree)) if number == site.node)
    _ways(node)[site.way]()
    tree = _LeaveOut().visit(tree)
    return ast.fix_missing_locations(tree)


class _LeaveOut(ast.NodeTransformer):
    def generic_visit(self, node: ast.AST) -> ast.AST:
        if hasattr(node, "left_out"):
            return ast.copy_location(ast.Pass(), node)
        return super().generic_visit(node)


def _shown(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node.test if isinstance(node, ast.If | ast.While | ast.IfExp) else node).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


_Found = tuple[ast.expr | ast.stmt, str, tuple[str, int, int] | None, tuple[int, int]]


def _nodes(tree: ast.Module) -> Iterator[_Found]:
    """Every node that may be changed, with its `function`, `outermost` and `lines`, in the order of the text."""

    def walk(node: ast.AST, function: str, outermost: tuple[str, int, int] | None, lines: tuple[int, int]) -> Iterator[_Found]:
        if _is_left_alone(node):
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = node.name if function == "module" else f"{function}.{node.name}"
        if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            lines = _own_lines(node)
        if isinstance(node, ast.expr | ast.stmt):
            yield node, function, outermost, lines
        for name, field in ast.iter_fields(node):
            if name not in _NOT_MUTATED:
                inside = outermost
                if isinstance(node, ast.FunctionDef) and name == "body" and outermost is None:
                    first = min(one.lineno for one in [node, *node.decorator_list])
                    inside = (function, first, node.end_lineno or first)
                for child in field if isinstance(field, list) else [field]:
                    if isinstance(child, ast.AST):
                        yield from walk(child, function, inside, lines)

    return walk(tree, "module", None, (1, 1))


def _own_lines(node: ast.stmt | ast.excepthandler | ast.match_case) -> tuple[int, int]:
    """First and last line of a statement, without the block that it heads."""
    first: int = node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno
    body = getattr(node, "body", None)
    if body is None or isinstance(body, ast.AST):
        return first, getattr(node, "end_lineno", None) or first
    return first, max(first, body[0].lineno - 1)


def _is_left_alone(node: ast.AST) -> bool:
    match node:
        case ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.keyword(arg="encoding"):
            return True
        case (
            ast.Expr(value=ast.Constant())
            | ast.Subscript(value=ast.Name(id="Literal"))
            | ast.Assign(targets=[ast.Name(id="__all__")])
        ):
            return True
    return False


def _ways(node: ast.AST) -> list[Callable[[], None]]:
    """The mistakes that can be made at a node, each a call that makes it there."""

    def put(**fields: object) -> Callable[[], None]:
        return lambda: [setattr(node, name, value) for name, value in fields.items()] and None

    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARED:
            return [put(ops=[_COMPARED[type(operator)]()])]
        case ast.BinOp(left=left, op=ast.Div()) if _is_path(left):
            return []
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in _COMPUTED:
            return [put(op=_COMPUTED[type(operator)]())]
        case ast.BoolOp(op=operator):
            return [put(op=ast.And() if isinstance(operator, ast.Or) else ast.Or())]
        case ast.UnaryOp(op=operator) if type(operator) in _SIGNED:
            return [put(op=_SIGNED[type(operator)]())]
        case ast.Constant(value=bool(value)):
            return [put(value=not value)]
        case ast.Constant(value=int(value)):
            return [put(value=value + 1)]
        case ast.Constant(value=float(value)):
            return [put(value=value * 1.5 + (value == 0))]
        case ast.Constant(value=str(value)) if value and " " not in value:
            return [put(value=f"X{value}")]
        case ast.Name(id=name) if name in _SWAPPED:
            return [put(id=_SWAPPED[name])]
        case ast.Attribute(attr=name) if name in _SWAPPED:
            return [put(attr=_SWAPPED[name])]
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not _has_own_ways(test):
            return [put(test=ast.UnaryOp(ast.Not(), test))]
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            return [put(value=ast.Constant(None))]
        case ast.Expr(value=ast.Call()) | ast.Raise():
            return [put(left_out=True)]
        case ast.Break():
            return [put(left_out=True)]
        case ast.Continue():
            return [put(left_out=True)]
    return []


def _has_own_ways(test: ast.expr) -> bool:
    return isinstance(test, ast.Compare | ast.BoolOp)


def _is_path(left: ast.expr) -> bool:
    while isinstance(left, ast.BinOp):
        left = left.left
    return any(word in ast.unparse(left) for word in ("folder", "path", "root", "aside", "source", "Path"))
