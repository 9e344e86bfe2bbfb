"""Patterns: which query may see which key, named, combined with ``|``, ``&``, ``-``, ``~``, compiled to blocks.

Imports numpy and scipy only.
"""

from sparseflash.patterns.advice import SlowScan, WastefulPattern
from sparseflash.patterns.axial import axial
from sparseflash.patterns.beside import beside
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.butterfly import butterfly
from sparseflash.patterns.causal import causal
from sparseflash.patterns.composed import star, streaming
from sparseflash.patterns.dilated import dilated
from sparseflash.patterns.documents import documents
from sparseflash.patterns.fixed import fixed
from sparseflash.patterns.frames import radial, spatial, temporal
from sparseflash.patterns.from_blocks import from_blocks
from sparseflash.patterns.full import full
from sparseflash.patterns.global_tokens import global_tokens
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.lines import columns, diagonals
from sparseflash.patterns.local import local
from sparseflash.patterns.log_sparse import log_sparse
from sparseflash.patterns.neighborhood import neighborhood
from sparseflash.patterns.packed import packed
from sparseflash.patterns.parsing import parse, register
from sparseflash.patterns.pattern import Pattern
from sparseflash.patterns.prefix import prefix
from sparseflash.patterns.presets import (
    bigbird,
    longformer,
    sparse_transformer_fixed,
    sparse_transformer_strided,
    star_transformer,
)
from sparseflash.patterns.random_blocks import random_blocks
from sparseflash.patterns.self_check import check
from sparseflash.patterns.sliding_tile import sliding_tile
from sparseflash.patterns.stacked import per_head, per_sample
from sparseflash.patterns.strided import strided
from sparseflash.patterns.where import where

__all__ = [
    "BlockMask",
    "Grid",
    "Pattern",
    "SlowScan",
    "WastefulPattern",
    "axial",
    "beside",
    "bigbird",
    "butterfly",
    "causal",
    "check",
    "columns",
    "diagonals",
    "dilated",
    "documents",
    "fixed",
    "from_blocks",
    "full",
    "global_tokens",
    "local",
    "log_sparse",
    "longformer",
    "neighborhood",
    "packed",
    "parse",
    "per_head",
    "per_sample",
    "prefix",
    "radial",
    "random_blocks",
    "register",
    "sliding_tile",
    "sparse_transformer_fixed",
    "sparse_transformer_strided",
    "spatial",
    "star",
    "star_transformer",
    "streaming",
    "strided",
    "temporal",
    "where",
]
