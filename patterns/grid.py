"""The grid of blocks on which a pattern is compiled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.intervals import Ints as Ints
from sparseflash.patterns.intervals import positions, split, union
from sparseflash.patterns.memory import reserve

BLOCK_SIZES = (16, 32, 64, 128, 256)

# The largest length, position or pattern argument, so that sums fit int64.
LARGEST = 1 << 40


@dataclass(frozen=True)
class Grid:
    """``rows x cols`` blocks of ``bq x bk`` tokens that cover a token mask of shape [q_len, kv_len].

    Query i stands at position ``i + q_offset``; key j at position ``j``. The last row and column may be ragged.
    """

    q_len: int
    kv_len: int
    bq: int
    bk: int
    q_offset: int

    def __str__(self) -> str:
        offset = f", first query at {self.q_offset}" if self.q_offset != self.kv_len - self.q_len else ""
        return f"{self.q_len:,} x {self.kv_len:,} tokens in blocks of {self.bq} x {self.bk}{offset}"

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.bq)

    @property
    def cols(self) -> int:
        return -(-self.kv_len // self.bk)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def ragged(self) -> bool:
        """Whether the last row or column has fewer tokens than a block."""
        return self.q_len % self.bq != 0 or self.kv_len % self.bk != 0

    def all_rows(self) -> Ints:
        reserve(self.rows, 160)
        return np.arange(self.rows, dtype=np.int64)

    def q_start(self, rows: Ints) -> Ints:
        """Position of the first query of each block row."""
        return rows * self.bq + self.q_offset

    def q_last(self, rows: Ints) -> Ints:
        """Position of the last existing query of each block row."""
        return np.minimum(rows * self.bq + self.bq, self.q_len) - 1 + self.q_offset

    def k_start(self, cols: Ints) -> Ints:
        """Position of the first key of each block column."""
        return cols * self.bk

    def expand(self, rows: Ints, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """Blocks (rows, cols) of the half-open column intervals ``[starts, stops)``, cut to the grid.

        Intervals may overlap, be empty or leave the grid. The result is sorted, without duplicates.
        """
        return split(positions(*union(self.shape, rows, starts, stops)), self.cols)

    def expand_positions(self, rows: Ints, first: Ints, last: Ints) -> tuple[Ints, Ints]:
        """Blocks that hold a key of the closed position intervals ``[first, last]`` of each row."""
        return self.expand(rows, first // self.bk, last // self.bk + 1)

    def unique(self, rows: Ints, cols: Ints) -> tuple[Ints, Ints]:
        """The blocks sorted by row and column, without duplicates."""
        linear = rows * self.cols + cols
        if (linear[1:] <= linear[:-1]).any():
            linear.sort(kind="stable")  # merges sorted stretches
            return split(linear[np.append(True, linear[1:] != linear[:-1])], self.cols)
        return rows, cols


def make_grid(seq_len: int | tuple[int, int], block: int | tuple[int, int], q_offset: int | None) -> Grid:
    """Check lengths and block size. By default the last query has the position of the last key.

    Raises:
        TypeError: a length, block or offset is not an int (or a pair of ints).
        ValueError: a length below 1, or an unsupported block size.
    """
    q_len, kv_len = _pair(seq_len, "seq_len")
    bq, bk = _pair(block, "block")
    for length in (q_len, kv_len):
        if not 1 <= length <= LARGEST:
            raise ValueError(f"seq_len must be at least 1 and at most 2**40, got seq_len={seq_len!r}")
    for size in (bq, bk):
        if size not in BLOCK_SIZES:
            raise ValueError(f"block sizes are {', '.join(map(str, BLOCK_SIZES))}; got block={block!r}")
    if q_offset is None:
        q_offset = kv_len - q_len
    elif not is_int(q_offset):
        raise TypeError(f"q_offset must be an int, got {q_offset!r}")
    elif abs(q_offset) > LARGEST:
        raise ValueError(f"q_offset must be at most 2**40 either way, got {q_offset!r}")
    return Grid(q_len, kv_len, bq, bk, int(q_offset))


def is_int(value: object) -> bool:
    """True for Python and numpy integers, not for bools."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(is_int(v) for v in pair):
        raise TypeError(f"{name} must be an int or a pair of ints (queries, keys), got {value!r}")
    return int(pair[0]), int(pair[1])
