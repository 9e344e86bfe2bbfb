"""Patterns from text. Parsed through ``ast``, never evaluated."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from difflib import get_close_matches
from keyword import iskeyword
from typing import TypeVar, overload
from unicodedata import normalize

from sparseflash.patterns.axial import axial
from sparseflash.patterns.beside import beside
from sparseflash.patterns.butterfly import butterfly
from sparseflash.patterns.causal import causal
from sparseflash.patterns.composed import star, streaming
from sparseflash.patterns.dilated import dilated
from sparseflash.patterns.documents import documents
from sparseflash.patterns.fixed import fixed
from sparseflash.patterns.frames import radial, spatial, temporal
from sparseflash.patterns.full import full
from sparseflash.patterns.global_tokens import global_tokens
from sparseflash.patterns.lines import columns, diagonals
from sparseflash.patterns.local import local
from sparseflash.patterns.log_sparse import log_sparse
from sparseflash.patterns.misuse import required
from sparseflash.patterns.neighborhood import neighborhood
from sparseflash.patterns.packed import packed
from sparseflash.patterns.pattern import Pattern
from sparseflash.patterns.predicate import Predicate
from sparseflash.patterns.prefix import prefix
from sparseflash.patterns.presets import (
    bigbird,
    longformer,
    sparse_transformer_fixed,
    sparse_transformer_strided,
    star_transformer,
)
from sparseflash.patterns.random_blocks import random_blocks
from sparseflash.patterns.shown import shown
from sparseflash.patterns.sliding_tile import sliding_tile
from sparseflash.patterns.stacked import per_head, per_sample
from sparseflash.patterns.strided import strided
from sparseflash.patterns.where import Where

_constructors: dict[str, Callable[..., Pattern]] = {
    "axial": axial,
    "beside": beside,
    "bigbird": bigbird,
    "butterfly": butterfly,
    "causal": causal,
    "columns": columns,
    "diagonals": diagonals,
    "dilated": dilated,
    "documents": documents,
    "fixed": fixed,
    "full": full,
    "global_tokens": global_tokens,
    "local": local,
    "log_sparse": log_sparse,
    "longformer": longformer,
    "neighborhood": neighborhood,
    "packed": packed,
    "per_head": per_head,
    "per_sample": per_sample,
    "prefix": prefix,
    "radial": radial,
    "random_blocks": random_blocks,
    "sliding_tile": sliding_tile,
    "sparse_transformer_fixed": sparse_transformer_fixed,
    "sparse_transformer_strided": sparse_transformer_strided,
    "spatial": spatial,
    "star": star,
    "star_transformer": star_transformer,
    "streaming": streaming,
    "strided": strided,
    "temporal": temporal,
}
Own = TypeVar("Own", bound=Pattern)
_OWN = frozenset(_constructors)
_NOT_TEXT = {
    "where": "a predicate has a textual form only once it is named: patterns.register(name, fn)",
    "from_blocks": "a mask that is data has no textual form",
}
_OF_PATTERNS = ("packed", "per_head", "per_sample")  # all of their arguments are patterns
_OPERATORS = {ast.BitOr: "__or__", ast.BitAnd: "__and__", ast.Sub: "__sub__"}
MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 250  # parentheses, calls and operators; a chain of n operators is n deep when it is compiled
MAX_OPERATORS = 200


def parse(text: str) -> Pattern:
    """Read a pattern from its textual form, the inverse of ``str(pattern)``.

    Args:
        text: calls of named patterns with literal arguments, joined by ``|``, ``&``, ``-``, ``~`` and parentheses.

    Raises:
        TypeError: text is not a string.
        ValueError: text that cannot be read; the message marks the position under the expression.

    Example:
        >>> import sparseflash as sf
        >>> sf.parse("causal() & (local(1024) | butterfly(unit=64))")
        causal() & (local(1024) | butterfly(unit=64))
    """
    if not isinstance(text, str):
        raise TypeError(f"parse takes text such as 'causal() & local(1024)', got {text!r}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"expression of {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    source = text.strip()
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        raise _pointing(source, error.lineno or 1, (error.offset or 1) - 1, error.msg or "cannot be read") from None
    except (RecursionError, MemoryError):
        raise ValueError("expression is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"expression {source!r} cannot be read: {error}") from None
    return _pattern(tree.body, source, MAX_DEPTH)


@overload
def register(name: str, fn: type[Own], *, replace: bool = False) -> type[Own]: ...
@overload
def register(name: str, fn: Predicate, *, replace: bool = False) -> Pattern: ...


def register(name: str, fn: Predicate | type[Pattern], *, replace: bool = False) -> Pattern | type[Pattern]:
    """Give your own predicate or class a name, for configs and the command line.

    Args:
        name: the name in text: ``name()`` for a predicate, ``name(arguments)`` for a class.
        fn: a predicate, as :func:`where` takes it, or a subclass of Pattern, whose ``name`` is set to this one.
        replace: replace an earlier registration of the name. Names of the library cannot be replaced.

    Returns:
        The named pattern, or the class.

    Raises:
        TypeError: fn is neither callable nor a subclass of Pattern.
        ValueError: :func:`parse` could not read the name, or it is taken.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.register("checkerboard", lambda q, k: (q + k) % 2 == 0)
        checkerboard()
        >>> P.parse("checkerboard() & causal()")
        checkerboard() & causal()
    """
    if not callable(fn):
        raise TypeError(f"register: fn must be callable as fn(q, k), got {fn!r}")
    if not isinstance(name, str) or not name.isidentifier() or iskeyword(name) or normalize("NFKC", name) != name:
        raise ValueError(f"register: name must be an identifier that Python reads back as it is, got {name!r}")
    if name in _OWN or name in _NOT_TEXT:
        raise ValueError(f"register: a pattern of the library is already called {name!r}")
    if name in _constructors and not replace:
        raise ValueError(f"register: a pattern is already called {name!r}; replace=True lets it mean this one")
    if isinstance(fn, type):
        if not issubclass(fn, Pattern) or not is_dataclass(fn):
            raise TypeError(
                f"register: a class must be a frozen dataclass and a subclass of Pattern, got {fn.__name__}"
            )
        fn.name = name
        _constructors[name] = fn
        return fn
    pattern = Where(fn, registered=name)
    _constructors[name] = lambda: pattern
    return pattern


def _pattern(node: ast.expr, source: str, depth: int) -> Pattern:
    if depth <= 0:
        raise ValueError(f"expression is nested more than {MAX_DEPTH} deep")
    if isinstance(node, ast.BinOp):
        return _chain(node, source, depth)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_pattern(node.operand, source, depth - 1)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node, node.func.id, source, depth)
    if isinstance(node, ast.Name) and node.id in _constructors:
        raise _error(
            source, node, f"a pattern is written as a call: {node.id}({', '.join(required(_constructors[node.id]))})"
        )
    if isinstance(node, ast.Name):
        raise _error(source, node, _unknown(node.id))
    if isinstance(node, ast.BoolOp) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
        raise _error(source, node, "patterns are joined by & and | and complemented by ~, not by `and`, `or`, `not`")
    raise _error(source, node, "expected a pattern such as local(1024), joined by | & - or after ~")


def _chain(node: ast.expr, source: str, depth: int) -> Pattern:
    """Left-associative operators, as in ``a | b | c``, are read in a loop."""
    rest: list[ast.BinOp] = []
    while isinstance(node, ast.BinOp):
        if type(node.op) not in _OPERATORS:
            raise _error(source, node, "patterns are joined by | & or -")
        rest.append(node)
        node = node.left
    if len(rest) > MAX_OPERATORS:
        raise ValueError(f"a chain of {len(rest):,} operators; at most {MAX_OPERATORS} are read: use parentheses")
    result = _pattern(node, source, depth - len(rest))
    for above, operator in reversed(list(enumerate(rest, 1))):
        result = getattr(result, _OPERATORS[type(operator.op)])(_pattern(operator.right, source, depth - above))
    return result


def _call(node: ast.Call, name: str, source: str, depth: int) -> Pattern:
    if name not in _constructors:
        raise _error(source, node, _unknown(name))
    if node.keywords and name in _OF_PATTERNS:
        raise _error(source, node, f"{name} takes patterns")
    if any(k.arg is None for k in node.keywords):
        raise _error(source, node, "** is not read here")

    def read(argument: ast.expr, is_pattern: bool) -> object:
        return _pattern(argument, source, depth - 1) if is_pattern else _literal(argument, source)

    # The number of first arguments that are patterns.
    patterns = len(node.args) if name in _OF_PATTERNS else int(name == "beside")
    arguments = [read(argument, place < patterns) for place, argument in enumerate(node.args)]
    keywords = {str(k.arg): read(k.value, patterns > 0 and k.arg == "pattern") for k in node.keywords}
    constructor = _constructors[name]
    try:
        return constructor(*arguments, **keywords)
    except (TypeError, ValueError) as error:
        signature = inspect.signature(constructor)
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as mismatch:
            near = [_near(keyword, signature.parameters) for keyword in keywords]
            raise _error(source, node, f"{name}{_without_types(signature)}: {mismatch}{''.join(near)}") from None
        raise _error(source, node, str(error)) from None


def _without_types(signature: inspect.Signature) -> inspect.Signature:
    named = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return signature.replace(parameters=named, return_annotation=signature.empty)


def _unknown(name: str) -> str:
    near = _near(name, _constructors)
    reason = _NOT_TEXT.get(name, near.lstrip("; ") or f"known are {', '.join(sorted(_constructors))}")
    return f"no pattern is called {name!r} here; {reason}"


def _near(name: str, known: Iterable[str]) -> str:
    """A suggestion for a name that is almost a known one."""
    names = list(known)
    found = [] if name in names else get_close_matches(name, names, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _literal(node: ast.expr, source: str) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        words = "arguments are literals such as 1024, (0, 5) or None"
        if isinstance(node, ast.Set):
            name = ast.unparse(node)
            words += f"; a model fills in names in braces, elsewhere write the numbers, as (14, 14) for {name}"
        raise _error(source, node, words) from None


def _lines(source: str) -> list[str]:
    """Lines as Python's parser counts them."""
    return source.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _error(source: str, node: ast.expr, message: str) -> ValueError:
    line = _lines(source)[node.lineno - 1]
    # ast counts UTF-8 bytes, the pointer counts characters.
    return _pointing(source, node.lineno, len(line.encode()[: node.col_offset].decode(errors="ignore")), message)


def _pointing(source: str, line: int, column: int, message: str) -> ValueError:
    lines = _lines(source)
    # For something missing at the end, the parser names a line past the last one.
    text = lines[line - 1] if line <= len(lines) else ""
    return ValueError(f"{message}\n  {shown(text)}\n  {' ' * len(shown(text[:column]))}^")
