"""No module imports itself by way of others, not even inside of functions: modules can be read one after the other."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("sparseflash", "patterns", "kernels", "benchmarks", "docs", "examples", "tests")


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = ("sparseflash",) if parts[0] in ("patterns", "kernels") else ()
    return ".".join([*inside, *parts]).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    """Every file by its module; those behind the links in ``sparseflash/`` once."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    links = [ROOT / "sparseflash" / name for name in ("patterns", "kernels")]
    return {module_of(path): path for path in files if not any(path.is_relative_to(link) for link in links)}


def statements(nodes: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports at any depth, but for those that only type checkers run."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
        else:
            yield from statements(ast.iter_child_nodes(node))


def imports(source: str) -> set[str]:
    """The modules that a file imports, whole or names of them; a package only where a name is its own."""
    found = set()
    for statement in statements([ast.parse(source)]):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        else:
            names = (f"{statement.module}.{alias.name}" for alias in statement.names)
            found |= {name if name in modules() else str(statement.module) for name in names}
    return found


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules each of which leads to all others.

    Example:
        >>> circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == {frozenset("bc")}
        True
    """
    reached = {}
    for start in graph:
        seen: set[str] = set()
        found = [start]
        while found:
            new = graph.get(found.pop(), set()) - seen
            seen |= new
            found += new
        reached[start] = seen
    together = (frozenset(other for other in reached[a] if a in reached.get(other, ())) for a in graph)
    return {circle for circle in together if len(circle) > 1}


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "x"}, "d": {"a"}, "e": {"f"}, "f": {"g"}, "g": {"e"}}
    assert circles(graph) == {frozenset("bc"), frozenset("efg")}
    source = "def f():\n    from sparseflash.patterns import grid, parse\n"
    source += "if TYPE_CHECKING:\n    import a\nelse:\n    import b\n"
    assert imports(source) == {"sparseflash.patterns.grid", "sparseflash.patterns", "b"}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imports(path.read_text()) & modules().keys() - {name} for name, path in modules().items()}
    assert len(graph["sparseflash.patterns.pattern"]) > 5, "imports are found"
    assert not circles(graph)
