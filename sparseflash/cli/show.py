"""``sparseflash show``: the figures and the picture of a pattern."""

import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sparseflash.cli.errors import block_size
from sparseflash.patterns import BlockMask, parse
from sparseflash.schedule import balance

BINS = 8
HEAVIEST = 5


def run(
    expression: str,
    seq_len: int,
    kv_len: int | None,
    block: str,
    out: Path | None,
    html: Path | None,
    window: str | None,
    as_json: bool,
) -> None:
    """Parse, compile, measure, draw, print."""
    from sparseflash.patterns.waste import WastefulPattern, advice

    pattern = parse(expression)
    lengths = seq_len if kv_len is None else (seq_len, kv_len)
    part = None if window is None else token_window(window)
    if part is not None and out is None:
        raise ValueError("--window says what --out draws; give both")
    if out is not None:
        check_file("--out", out, (".png", ".svg", ".pdf"))
    if html is not None:
        check_file("--html", html, (".html", ".htm"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WastefulPattern)  # its words are printed among the figures
        started = time.perf_counter()
        mask = pattern.compile(lengths, block=block_size(block))
        seconds = time.perf_counter() - started
        hint = advice(pattern, mask)
    measured = {"pattern": str(pattern), "compile_seconds": round(seconds, 6), **figures(mask), "advice": hint}
    if out is not None:
        mask.plot(out, title=str(pattern), window=part)
        measured["picture"] = str(out)
    if html is not None:
        mask.write_html(html, title=str(pattern))
        measured["page"] = str(html)
    if as_json:
        print(json.dumps(measured, indent=2))
    else:
        show(measured, Console())


def check_file(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Whether a file can be written there, before any work.

    Raises:
        ValueError: another kind of file.
        FileNotFoundError: the folder is not there.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}; got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")


def token_window(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """``"0:512,256:768"`` as queries 0 to 511 and keys 256 to 767.

    Raises:
        ValueError: another form.
    """
    found = re.fullmatch(r"(\d+):(\d+),(\d+):(\d+)", text.replace(" ", ""))
    if found is None:
        raise ValueError(f"--window must be two ranges of tokens, queries and keys, such as 0:512,0:512; got {text!r}")
    q0, q1, k0, k1 = map(int, found.groups())
    return (q0, q1), (k0, k1)


def figures(mask: BlockMask) -> dict[str, Any]:
    """What a mask holds, as plain data; rows are those of the distinct masks, one after another."""
    counts = mask.row_counts.ravel()
    rows = mask.grid_shape[0]
    # At most one bin for each count there is.
    bins = min(BINS, int(counts.max() - counts.min()) + 1)
    histogram, edges = np.histogram(counts, bins=bins, range=(counts.min() - 0.5, counts.max() + 0.5))
    heaviest = np.argsort(-counts, kind="stable")[:HEAVIEST]
    heaviest_mask = mask.row_counts[mask.row_counts.max(axis=1).argmax()]
    shared = balance(heaviest_mask)
    return {
        "shape": list(mask.shape),
        "block": list(mask.block),
        "grid": list(mask.grid_shape),
        "masks": mask.patterns,
        "blocks": mask.nnz,
        "full_blocks": mask.full_blocks,
        "partial_blocks": mask.nnz - mask.full_blocks,
        "distinct_tiles": len(mask.tiles),
        "density": mask.density,
        "token_density": mask.token_density,
        "ideal_speedup": 1 / mask.density if mask.nnz else None,
        "row_blocks": {
            "smallest": int(counts.min()),
            "mean": float(counts.mean()),
            "largest": int(counts.max()),
            "histogram": [
                {"from": int(np.ceil(low)), "to": int(np.floor(high)), "rows": int(number)}
                for low, high, number in zip(edges[:-1], edges[1:], histogram, strict=True)
            ],
            "heaviest": [
                {"mask": int(row // rows), "row": int(row % rows), "blocks": int(counts[row])} for row in heaviest
            ],
            "cut": None if shared is None else shared._asdict(),
        },
    }


def in_words(cut: dict[str, int]) -> str:
    """What cutting heavy rows does, as a sentence."""
    return (
        f"longest row of {cut['longest']:,} blocks in {cut['pieces']:,} pieces, none over {cut['longest_piece']:,}; "
        f"of {cut['workers']} programs on one head the busiest walks {cut['busiest']:,} blocks, not "
        f"{cut['busiest_before']:,}"
    )


def show(measured: dict[str, Any], console: Console) -> None:
    """Print figures as a table and a histogram."""
    (q_len, kv_len), (bq, bk), (nq, nk) = measured["shape"], measured["block"], measured["grid"]
    rows = measured["row_blocks"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_row("pattern", measured["pattern"])
    table.add_row("tokens", f"{q_len:,} queries x {kv_len:,} keys")
    heads = f", {measured['masks']} distinct masks" if measured["masks"] > 1 else ""
    table.add_row("block", f"{bq} x {bk}: a grid of {nq:,} x {nk:,} blocks{heads}")
    tiles = f"{measured['partial_blocks']:,} partial with {measured['distinct_tiles']:,} distinct tiles"
    table.add_row("blocks stored", f"{measured['blocks']:,}: {measured['full_blocks']:,} full, {tiles}")
    table.add_row("density", f"{measured['density']:.3%} of blocks, {measured['token_density']:.3%} of tokens")
    speedup = measured["ideal_speedup"]
    ideal = f"{speedup:,.1f} times dense attention, if time went with the blocks" if speedup else "nothing to compute"
    table.add_row("ideal speed-up", ideal)
    table.add_row("blocks a row", f"{rows['smallest']:,} to {rows['largest']:,}, mean {rows['mean']:,.1f}")
    most = max(bin_["rows"] for bin_ in rows["histogram"])
    for bin_ in rows["histogram"]:
        low, high = bin_["from"], bin_["to"]
        name = f"{low:,}" if low == high else f"{low:,}-{high:,}"
        length = -(-30 * bin_["rows"] // most)
        table.add_row(f"  {name:>11}", f"{'█' * length} {bin_['rows']:,} rows")
    heaviest = ", ".join(
        f"row {row['row']:,}{' of mask ' + str(row['mask']) if measured['masks'] > 1 else ''}: {row['blocks']:,}"
        for row in rows["heaviest"]
    )
    table.add_row("heaviest rows", heaviest)
    if rows["cut"] is not None:
        table.add_row("heavy rows cut", in_words(rows["cut"]))
    table.add_row("compiled in", f"{measured['compile_seconds'] * 1000:.1f} ms")
    if measured["advice"] is not None:
        table.add_row("hint", measured["advice"])
    for made in ("picture", "page"):
        if made in measured:
            table.add_row(made, measured[made])
    console.print(table, highlight=False)
