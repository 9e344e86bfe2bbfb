"""sparseflash: block-sparse flash attention.

A pattern says which query may see which key; compiling it gives a block mask; the block mask becomes lookup tables;
kernels walk the tables and touch nothing else. Dense attention is the table that lists every block.
"""

from sparseflash import patterns, reference
from sparseflash.functional import attention
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import Pattern
from sparseflash.tables import LookupTable, lookup

__version__ = "0.1.0.dev0"

__all__ = [
    "BlockMask",
    "LookupTable",
    "Pattern",
    "attention",
    "lookup",
    "parse",
    "patterns",
    "reference",
]
