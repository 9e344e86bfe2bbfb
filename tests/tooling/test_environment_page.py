"""docs/environment.md lists every environment variable that the code reads, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.pages import ROOT

PAGE = (ROOT / "docs/environment.md").read_text()
FOLDERS = ("sparseflash", "kernels", "patterns", "tests", "benchmarks", "docs", "examples")
PYTHON = sorted({path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")} | set(ROOT.glob("*.py")))
LISTED = re.findall(r"^\| `([A-Z][A-Z0-9_]+)` \|", PAGE, re.MULTILINE)
# Of the system, which every program has.
OF_THE_SYSTEM = {"PATH", "PYTHONPATH", "TMPDIR"}
# Of made-up processes of the tests themselves.
OF_ONE_TEST = {"OUTSIDE", "WHAT"}


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def keys(tree: ast.AST) -> Iterator[ast.expr]:
    """What the environment is asked for: subscripts, calls of its methods, ``in``, and getenv."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=value, slice=key) if is_environ(value):
                yield key
            case ast.Call(func=ast.Attribute(value=value, attr="get" | "pop" | "setdefault"), args=[key, *_]) if (
                is_environ(value)
            ):
                yield key
            case ast.Call(func=ast.Attribute(attr="getenv") | ast.Name(id="getenv"), args=[key, *_]):
                yield key
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[value]) if is_environ(value):
                yield key


def texts(node: ast.AST) -> set[str]:
    """The texts in a node, if it holds nothing else."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return set().union(*map(texts, elements))
    return set()


def meanings(tree: ast.AST) -> dict[str, set[str]]:
    """Texts that a name may stand for: assigned to it, or gone through by a loop or a comprehension."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found.setdefault(name, set()).update(texts(value))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                found.setdefault(name, set()).update(texts(value))
    for node in ast.walk(tree):
        match node:
            case (
                ast.For(target=ast.Name(id=name), iter=source)
                | ast.comprehension(target=ast.Name(id=name), iter=source)
            ):
                known = found.get(source.id, set()) if isinstance(source, ast.Name) else texts(source)
                found.setdefault(name, set()).update(known)
    return found


def read_by(path: Path) -> set[str]:
    """Names of the environment variables that a module reads or sets."""
    tree = ast.parse(path.read_text())
    known, found = meanings(tree), set()
    for key in keys(tree):
        match key:
            case ast.Constant(value=str(name)):
                found.add(name)
            case ast.Name(id=name):
                assert known.get(name), f"{path}:{key.lineno}: what may {name} be? Write its values in this module"
                found |= known[name]
            case ast.Attribute(value=ast.Name(id="native"), attr="VARIABLE"):
                found.add("SPARSEFLASH_CPU")
            case _:
                raise AssertionError(f"{path}:{key.lineno}: {ast.unparse(key)} is not a name that a reader could find")
    return found


def test_the_page_lists_what_the_code_reads() -> None:
    used = set().union(*map(read_by, PYTHON))
    assert used - OF_THE_SYSTEM - OF_ONE_TEST == set(LISTED)
    assert len(LISTED) == len(set(LISTED))


def test_no_module_asks_in_a_way_that_this_test_does_not_know() -> None:
    """Every line with the word is one of the forms above, or hands the whole environment on."""
    forms = re.compile(
        r"environ(\.get\(|\.pop\(|\.setdefault\(|\[)|in os\.environ\b|os\.environ \||\*\*os\.environ|env=os\.environ"
        r"|environ\.(items|update)\("
    )
    for path in PYTHON:
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\bos\.environ\b|\bgetenv\b", line):
                assert forms.search(line), f"{path}:{number}: {line.strip()}"


def test_sources_of_the_kernel_and_the_makefile_read_no_other() -> None:
    for path in [*(ROOT / "kernels/cpu").glob("*.h"), *(ROOT / "kernels/cpu").glob("*.cpp")]:
        assert "getenv" not in path.read_text(), path.name
    set_here = set(re.findall(r"\b(SPARSEFLASH_\w+)=", (ROOT / "Makefile").read_text()))
    assert set_here <= set(LISTED)
