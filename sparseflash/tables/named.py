"""Patterns by name: a compiled graph holds a name in place of a table, so that it serves every length.

A graph that holds a table is bound to its lengths and must be compiled again for others. A graph that holds the name of
a pattern looks up the table when it runs, for the lengths of its inputs.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import Pattern
from sparseflash.tables.lookup import lookup
from sparseflash.tables.padded import padded_table
from sparseflash.tables.table import LookupTable

# A graph may run as long as the process, so names are never removed.
_names: dict[Pattern, str] = {}
_patterns: dict[str, Pattern] = {}


def name_of(pattern: Pattern) -> str:
    """The pattern's text, with a unique mark if the text is incomplete (a predicate, data).

    Raises:
        ValueError: an incomplete text in torch.export, because other processes run the program.
    """
    name = _names.get(pattern)
    if name is None:
        name = _names[pattern] = _new_name(pattern)
        _patterns[name] = pattern
    if torch.compiler.is_exporting() and name != str(pattern):
        raise ValueError(
            f"an exported program holds a pattern as text, and {pattern} is not told by its text: export a compiled "
            "mask, pattern.compile((q_len, kv_len)), whose table becomes part of the program; or give a predicate a "
            "name, patterns.register(name, fn), also where the program is loaded"
        )
    return name


def _new_name(pattern: Pattern) -> str:
    text = str(pattern)
    try:
        whole = parse(text) == pattern
    except ValueError:
        whole = False
    return text if whole else f"{text} #{secrets.token_hex(8)}"


def named_table(
    name: str, lengths: tuple[int, int], block: Sequence[int], device: torch.device, ends: torch.Tensor | None = None
) -> LookupTable:
    """The table of a named pattern, cached like that of any other.

    Args:
        name: the name from :func:`name_of`.
        lengths: queries and keys.
        block: (BQ, BK).
        device: device of the table.
        ends: int64 [B], tokens of each sample of a padded batch, which gets a new table.

    Raises:
        ValueError: no pattern of that name: a graph from another process whose pattern has no text.
    """
    pattern = _patterns.get(name)
    if pattern is None:
        try:
            pattern = _patterns[name] = parse(name)
        except ValueError as error:
            raise ValueError(
                f"a compiled or exported program asks for the pattern {name}, which this process does not know: "
                f"patterns.register() its predicates before the program runs ({error})"
            ) from error
    bq, bk = block
    if ends is not None:
        return padded_table(pattern, (bq, bk), ends, lengths[0])
    return lookup(pattern.compile(lengths, block=(bq, bk)), device)
