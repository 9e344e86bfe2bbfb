"""Values given in place of a pattern, and the line to write instead."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

TRUTH = "`and`, `or` and `not` ask for one, and would keep one operand and drop the other: write `&`, `|`, `~`"


def instead_of(value: Any) -> str | None:
    """Like :func:`sparseflash.patterns.pattern.instead`, for a value that is neither a class nor a mask."""
    name = getattr(value, "__name__", "the function")
    if isinstance(value, bool | np.bool_):
        return f"{value} is not a pattern: write full(), or ~full() for nothing"
    if isinstance(value, str):
        return f"text is not a pattern: write parse({_shortened(value)})"
    if hasattr(value, "__array__") and np.ndim(value):
        return (
            "an array is not a pattern: write from_blocks(array, unit) for a boolean a cell of tokens, "
            "BlockMask.from_dense(array) for one a pair of tokens"
        )
    if not callable(value):
        return None
    if makes_patterns(value):
        return f"{name} is not called: write {call_of(name, value)}"
    return f"{'a lambda' if name == '<lambda>' else name} is a function, not a pattern: write where(fn)"


def makes_patterns(value: Any) -> bool:
    """Whether a value is one of the library's own functions that make patterns."""
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__name__", "")
    return module.startswith("sparseflash.patterns.") and not name.startswith("<") and not isinstance(value, type)


def call_of(name: str, function: Any) -> str:
    """A call of a class or function, with the names of its required arguments."""
    return f"{name}({', '.join(required(function))})"


def required(function: Any) -> list[str]:
    """Names of the required arguments of a function, with ``...`` for ``*patterns``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ["..."]
    names = ["..." if p.kind is p.VAR_POSITIONAL else p.name for p in parameters if p.default is p.empty]
    if not names and function.__name__ == "documents":  # takes lengths in one of two ways
        return ["lengths"]
    return names


def too_long(size: int, tokens: int) -> str:
    """The message for a sequence that is longer than a pattern of fixed size, with the line to write for the rest.

    Example:
        >>> too_long(64, 69).split(".")[0]
        'has 64 tokens; the sequence has 69, 5 over'
    """
    return (
        f"has {size:,} tokens; the sequence has {tokens:,}, {tokens - size:,} over. For text or other tokens that see "
        "all and are seen by all, write beside(pattern, before=n) or beside(pattern, after=n); for further images, or "
        "padding that sees nothing, packed(pattern, ...) in place of documents(lengths) & pattern"
    )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
