"""sparseflash: block-sparse flash attention.

A pattern says which query may see which key; compiling it gives a block mask; the block mask becomes lookup tables;
kernels walk the tables and touch nothing else. Dense attention is the table that lists every block.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sparseflash import patterns
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import Pattern

if TYPE_CHECKING:
    from sparseflash import pathfinder, reference
    from sparseflash.functional import attention
    from sparseflash.tables import LookupTable, lookup

__version__ = "0.1.0.dev0"

__all__ = [
    "BlockMask",
    "LookupTable",
    "Pattern",
    "attention",
    "lookup",
    "parse",
    "pathfinder",
    "patterns",
    "reference",
]

# Names whose modules import torch, which takes seconds: the command line's help and the worker processes of the image
# generator do without.
_LATER = {"LookupTable": "tables", "attention": "functional", "lookup": "tables", "pathfinder": "", "reference": ""}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'sparseflash' has no attribute {name!r}")
    module = _LATER[name]
    found = getattr(import_module(f"sparseflash.{module}"), name) if module else import_module(f"sparseflash.{name}")
    globals()[name] = found
    return found
