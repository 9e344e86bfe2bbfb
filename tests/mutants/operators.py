"""Small changes of a module's text, one at a time: what a slip of the hand could have written.

Types, docstrings, strings (what errors say), decorators and assertions (``strict`` of zip, too) are left alone: no test
should notice those.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}

Change = Callable[[Any], ast.AST]


def count(source: str) -> int:
    """How many mutants a module has."""
    return len(list(_places(ast.parse(source))))


def mutant(source: str, number: int) -> tuple[int, str, str]:
    """(line, what is changed, the whole text with the change) of one of them."""
    tree = ast.parse(source)
    node, change = list(_places(tree))[number]
    line, before = node.lineno, ast.unparse(node)
    after = ast.unparse(change(node))
    return line, f"{_short(before)}  ->  {_short(after)}", ast.unparse(tree)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) < 90 else line[:87] + "..."


def _places(node: ast.AST) -> Iterator[tuple[Any, Change]]:
    """Nodes that can be changed, each with how; a node may come several times."""
    for child in _looked_into(node):
        yield from ((child, change) for change in _changes(child))
        yield from _places(child)


def _looked_into(node: ast.AST) -> Iterator[ast.AST]:
    skipped = {"annotation", "returns", "decorator_list"}
    for name, value in ast.iter_fields(node):
        if name in skipped or (isinstance(node, ast.Raise) and name == "exc"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.keyword) and child.arg == "strict":
                continue
            if isinstance(child, ast.AST) and not isinstance(child, ast.Assert | ast.JoinedStr):
                yield child


def _changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare):
        yield from (_compared(i) for i in range(len(node.ops)))
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in COMPUTED:
        yield lambda n: _set(n, op=COMPUTED[type(n.op)]())
    if isinstance(node, ast.BoolOp):
        yield lambda n: _set(n, op=ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.UnaryOp):
        yield lambda n: _become(n, n.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        yield lambda n: _set(n, value=not n.value if type(n.value) is bool else n.value + 1)
    # Other conditions are changed by what is changed in them.
    if isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield lambda n: _set(n, test=ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.AugAssign | ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield lambda n: _become(n, ast.Pass())
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield lambda n: _set(n, id=NAMES[n.id])
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield lambda n: _set(n, attr=NAMES[n.attr])
    if isinstance(node, ast.Break):
        yield lambda n: _become(n, ast.Continue())


def _compared(i: int) -> Change:
    return lambda n: _set(n, ops=[COMPARED[type(op)]() if j == i else op for j, op in enumerate(n.ops)])


def _set(node: ast.AST, **fields: Any) -> ast.AST:
    for name, value in fields.items():
        setattr(node, name, value)
    return ast.fix_missing_locations(node)


def _become(node: ast.AST, other: ast.AST) -> ast.AST:
    """Make a node another one where it stands."""
    where = {name: getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")}
    node.__class__ = other.__class__
    node.__dict__.clear()
    node.__dict__.update(other.__dict__ | where)
    return ast.fix_missing_locations(node)
