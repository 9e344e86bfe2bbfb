"""``sparseflash show``: the figures and the picture of a pattern."""

import json
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sparseflash.cli.errors import block_size
from sparseflash.cli.importing import import_modules, told
from sparseflash.cli.mask_summary import MaskSummary
from sparseflash.patterns import Pattern, WastefulPattern, parse
from sparseflash.patterns.grid import LARGEST


def run(
    expression: str,
    seq_len: int | None,
    kv_len: int | None,
    block: str,
    out: Path | None,
    html: Path | None,
    window: str | None,
    token: int | None,
    imports: Sequence[str],
    as_json: bool,
) -> None:
    """Parse, compile, measure, draw, print."""
    pattern = own_pattern(expression, imports)
    q_len = tokens_of(pattern, seq_len)
    lengths = q_len, q_len if kv_len is None else kv_len
    for option, length in (("--seq-len", q_len), ("--kv-len", lengths[1])):
        if not 1 <= length <= LARGEST:
            raise ValueError(f"{option} must be 1 to {LARGEST:,} tokens; got {length}")
    part = None if window is None else token_window(window, lengths)
    if part is not None and out is None:
        raise ValueError("--window says what --out draws; give both")
    if token is not None and (out is None or part is not None):
        raise ValueError("--token says what --out draws: give both, and no --window")
    if out is not None:
        check_file("--out", out, (".png", ".svg", ".pdf"))
    if html is not None:
        check_file("--html", html, (".html", ".htm"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WastefulPattern)  # its words are printed among the figures
        started = time.perf_counter()
        mask = pattern.compile(lengths, block=block_size(block))
        summary = MaskSummary.of(pattern, mask, time.perf_counter() - started)
    files: dict[str, Path] = {}
    if out is not None:
        mask.plot(out, title=str(pattern), window=part, token=token)
        files["picture"] = out
    if html is not None:
        mask.write_html(html, title=str(pattern))
        files["page"] = html
    if as_json:
        print(json.dumps(summary.to_dict() | {what: str(path) for what, path in files.items()}, indent=2))
    else:
        summary.print(Console(), **files)


def own_pattern(expression: str, imports: Sequence[str]) -> Pattern:
    """The pattern of a text that may name patterns of the user's own.

    Raises:
        ValueError: a module or a text that cannot be read.
    """
    import_modules(imports)
    try:
        return parse(expression)
    except ValueError as error:
        raise told(error, imports) from None


def tokens_of(pattern: Pattern, seq_len: int | None) -> int:
    """The tokens that were asked for; else those that the pattern is for.

    Raises:
        ValueError: neither is known.
    """
    tokens = pattern.known_size if seq_len is None else seq_len
    if tokens is None:
        raise ValueError(f"--seq-len is missing: {pattern} is for any number of tokens; write --seq-len 4096 for 4,096")
    return tokens


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


def token_window(text: str, lengths: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """``"0:512,256:768"`` as queries 0 to 511 and keys 256 to 767, of so many queries and keys.

    Raises:
        ValueError: another form, or tokens that are not there.
    """
    found = re.fullmatch(r"(\d+):(\d+),(\d+):(\d+)", text.replace(" ", ""))
    if found is None:
        raise ValueError(f"--window must be two ranges of tokens, queries and keys, such as 0:512,0:512; got {text!r}")
    q0, q1, k0, k1 = map(int, found.groups())
    for what, first, stop, length in (("queries", q0, q1, lengths[0]), ("keys", k0, k1, lengths[1])):
        if not first < stop <= length:
            raise ValueError(f"--window must be of {what} within 0:{length}; got {first}:{stop}")
    return (q0, q1), (k0, k1)
