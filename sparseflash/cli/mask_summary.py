"""What a mask costs, as data, as one line and as a table: shared by ``show``, ``train``, ``evaluate`` and ``demo``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparseflash.patterns import BlockMask, Pattern
from sparseflash.patterns.advice import advice
from sparseflash.tables.splitting import Balance, balance

BINS = 8
HEAVIEST = 5


@dataclass(frozen=True)
class Bin:
    """Rows that store between ``low`` and ``high`` blocks, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class HeavyRow:
    """A block row that stores many blocks, and the distinct mask it belongs to."""

    mask: int
    row: int
    blocks: int


@dataclass(frozen=True)
class RowBlocks:
    """How many blocks the rows of all distinct masks store."""

    smallest: int
    mean: float
    largest: int
    histogram: tuple[Bin, ...]
    heaviest: tuple[HeavyRow, ...]
    cut: Balance | None  # what splitting heavy rows does; None where no row is split

    @classmethod
    def of(cls, mask: BlockMask) -> RowBlocks:
        """Count the rows of a mask."""
        counts = mask.row_counts.ravel()
        rows = mask.grid_shape[0]
        heaviest = np.argsort(-counts, kind="stable")[:HEAVIEST]
        return cls(
            smallest=int(counts.min()),
            mean=float(counts.mean()),
            largest=int(counts.max()),
            histogram=histogram(counts),
            heaviest=tuple(HeavyRow(int(row // rows), int(row % rows), int(counts[row])) for row in heaviest),
            cut=balance(mask.row_counts[mask.row_counts.max(axis=1).argmax()]),
        )


@dataclass(frozen=True)
class MaskSummary:
    """What a compiled mask stores, and what it took to compile.

    Attributes:
        pattern: its text.
        compile_seconds: the time to compile it.
        shape: (queries, keys), in tokens.
        block: (BQ, BK), in tokens.
        grid: block rows and block columns.
        masks: distinct masks, where heads or samples have their own.
        blocks, full_blocks, partial_blocks: stored blocks, of all distinct masks.
        distinct_tiles: bit patterns that the partial blocks share.
        density, token_density: stored blocks of all blocks, allowed pairs of all pairs.
        ideal_speedup: over dense attention, if time went with the stored blocks; None for an empty mask.
        row_blocks: blocks stored by row.
        advice: a sentence where the blocks are poorly used, else None.
    """

    pattern: str
    compile_seconds: float
    shape: tuple[int, int]
    block: tuple[int, int]
    grid: tuple[int, int]
    masks: int
    blocks: int
    full_blocks: int
    partial_blocks: int
    distinct_tiles: int
    density: float
    token_density: float
    ideal_speedup: float | None
    row_blocks: RowBlocks
    advice: str | None

    @classmethod
    def of(cls, pattern: Pattern, mask: BlockMask, compile_seconds: float) -> MaskSummary:
        """Describe ``mask``, which was compiled from ``pattern``.

        Example:
            >>> import sparseflash as sf
            >>> pattern = sf.parse("causal() & local(512)")
            >>> summary = MaskSummary.of(pattern, pattern.compile(4096), compile_seconds=0.0)
            >>> summary.blocks, summary.row_blocks.largest
            (150, 5)
            >>> print(summary.line)
            causal() & local(512): 4,096 x 4,096 tokens in blocks of 128 x 128, density 14.648%
        """
        return cls(
            pattern=str(pattern),
            compile_seconds=compile_seconds,
            shape=mask.shape,
            block=mask.block,
            grid=mask.grid_shape,
            masks=mask.patterns,
            blocks=mask.nnz,
            full_blocks=mask.full_blocks,
            partial_blocks=mask.nnz - mask.full_blocks,
            distinct_tiles=len(mask.tiles),
            density=mask.density,
            token_density=mask.token_density,
            ideal_speedup=1 / mask.density if mask.nnz else None,
            row_blocks=RowBlocks.of(mask),
            advice=advice(pattern, mask, asked=True),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; bins are called by ``from`` and ``to``."""
        plain = asdict(self)
        plain["compile_seconds"] = round(self.compile_seconds, 6)
        rows = self.row_blocks
        plain["row_blocks"]["histogram"] = [{"from": b.low, "to": b.high, "rows": b.rows} for b in rows.histogram]
        plain["row_blocks"]["cut"] = None if rows.cut is None else rows.cut._asdict()
        return plain

    @property
    def line(self) -> str:
        """Pattern, lengths, block and density in one line."""
        (q_len, kv_len), (bq, bk) = self.shape, self.block
        return f"{self.pattern}: {q_len:,} x {kv_len:,} tokens in blocks of {bq} x {bk}, density {self.density:.3%}"

    def print(self, console: Console, **files: Path) -> None:
        """Print a table with a histogram of the rows.

        Args:
            console: where to print.
            files: what was written, by what it is: ``picture=...``.
        """
        console.print(self._table(), highlight=False)
        for what, path in files.items():  # whole, whatever the terminal's width
            console.print(Text(f"{what:<14}  ", style="bold") + Text(str(path), style="not bold"), soft_wrap=True)

    def _table(self) -> Table:
        (q_len, kv_len), (bq, bk), (nq, nk), rows = self.shape, self.block, self.grid, self.row_blocks
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        table.add_row("pattern", Text(self.pattern))
        table.add_row("tokens", f"{q_len:,} queries x {kv_len:,} keys")
        several = f", {self.masks} distinct masks" if self.masks > 1 else ""
        table.add_row("block", f"{bq} x {bk}: a grid of {nq:,} x {nk:,} blocks{several}")
        tiles = f"{self.partial_blocks:,} partial with {self.distinct_tiles:,} distinct tiles"
        table.add_row("blocks stored", f"{self.blocks:,}: {self.full_blocks:,} full, {tiles}")
        table.add_row("density", f"{self.density:.3%} of blocks, {self.token_density:.3%} of tokens")
        ideal = self.ideal_speedup
        speedup = f"{ideal:,.1f} times dense attention, if time went with the blocks" if ideal else "nothing to compute"
        table.add_row("ideal speed-up", speedup)
        table.add_row("blocks per row", f"{rows.smallest:,} to {rows.largest:,}, mean {rows.mean:,.1f}")
        most = max(each.rows for each in rows.histogram)
        for each in rows.histogram:
            name = f"{each.low:,}" if each.low == each.high else f"{each.low:,}-{each.high:,}"
            table.add_row(f"  {name:>11}", f"{'█' * -(-30 * each.rows // most)} {each.rows:,} rows")
        of_mask = "row {0.row:,} of mask {0.mask}: {0.blocks:,}" if self.masks > 1 else "row {0.row:,}: {0.blocks:,}"
        table.add_row("heaviest rows", ", ".join(of_mask.format(row) for row in rows.heaviest))
        if rows.cut is not None:
            table.add_row("heavy rows cut", in_words(rows.cut))
        table.add_row("compiled in", f"{self.compile_seconds * 1000:.1f} ms")
        if self.advice is not None:
            table.add_row("hint", Text(self.advice))
        return table


def histogram(counts: NDArray[np.integer[Any]]) -> tuple[Bin, ...]:
    """At most ``BINS`` bins of whole numbers that follow each other without a gap, and hold every count once.

    Example:
        >>> import numpy as np
        >>> [(each.low, each.high, each.rows) for each in histogram(np.array([3, 3, 4, 19]))]
        [(3, 4, 3), (5, 6, 0), (7, 8, 0), (9, 11, 0), (12, 13, 0), (14, 15, 0), (16, 17, 0), (18, 19, 1)]
    """
    low, high = int(counts.min()), int(counts.max())
    edges = np.linspace(low, high + 1, min(BINS, high - low + 1) + 1).round().astype(int)
    rows, _ = np.histogram(counts, bins=edges - 0.5)
    return tuple(Bin(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges[:-1], edges[1:], rows, strict=True))


def in_words(cut: Balance) -> str:
    """What cutting heavy rows does, as a sentence."""
    return (
        f"longest row of {cut.longest:,} blocks in {cut.pieces:,} splits, none over {cut.longest_piece:,}; "
        f"of {cut.workers} programs on one head the busiest walks {cut.busiest:,} blocks, not "
        f"{cut.busiest_before:,}"
    )
