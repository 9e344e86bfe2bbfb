"""sparseflash: block-sparse flash attention.

A pattern says which query may see which key; compiling it gives a block mask; the block mask becomes lookup tables;
kernels walk the tables and touch nothing else. Dense attention is the table that lists every block.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from sparseflash import patterns
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import Pattern

if TYPE_CHECKING:
    from sparseflash import pathfinder, reference, routing
    from sparseflash.functional.attention import attention
    from sparseflash.functional.decode import decode
    from sparseflash.functional.kv_cache import KVCache
    from sparseflash.nn.attention import SparseAttention
    from sparseflash.nn.block import SparseTransformerBlock
    from sparseflash.tables.lookup import lookup
    from sparseflash.tables.table import LookupTable

__version__ = "0.1.0.dev0"

__all__ = [
    "BlockMask",
    "KVCache",
    "LookupTable",
    "Pattern",
    "SparseAttention",
    "SparseTransformerBlock",
    "attention",
    "decode",
    "lookup",
    "parse",
    "pathfinder",
    "patterns",
    "reference",
    "routing",
]

# Names whose modules import torch, which takes seconds: the command line's help and the worker processes of the image
# generator do without.
_LATER = {
    "KVCache": "functional.kv_cache",
    "LookupTable": "tables.table",
    "SparseAttention": "nn.attention",
    "SparseTransformerBlock": "nn.block",
    "attention": "functional.attention",
    "decode": "functional.decode",
    "lookup": "tables.lookup",
    "pathfinder": "",
    "reference": "",
    "routing": "",
}

# A program that torch.export saved names its operators; they have to be registered before torch.export.load reads it.
_WITH_OPERATORS = ("functional.operators", "functional.decode", "integrations.transformers.operators")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'sparseflash' has no attribute {name!r}")
    module = _LATER[name]
    found = getattr(import_module(f"sparseflash.{module}"), name) if module else import_module(f"sparseflash.{name}")
    globals()[name] = found
    return found


if "torch" in sys.modules:
    for _name in _WITH_OPERATORS:
        import_module(f"sparseflash.{_name}")
