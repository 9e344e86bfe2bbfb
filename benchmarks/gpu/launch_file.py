"""Write launches as `kernels/launches.toml` has them."""

from __future__ import annotations

from sparseflash.kernels.launch import FILE, SHARED_MEMORY, Configuration, Launch, Launches

SECTIONS = Launches._fields[1:]


def head(text: str) -> str:
    """The comments and blank lines before the first row of a file."""
    return text[: text.index("\n[") + 1]


def written(launches: Launches, notes: str = "") -> str:
    """The text of a file that reads back as these launches: the committed one's comments, some notes, all rows."""
    order = sorted(launches.usual, key=lambda key: (list(SHARED_MEMORY).index(key[0]), key[2], key[1]))
    lines = [f"{head(FILE.read_text('utf-8')).rstrip()}\n{notes}"]
    for key in order:
        architecture, head_dim, dtype = key
        where = f"{architecture}.{dtype}.{head_dim}"
        lines += [f"[{where}]", *(_row(*one) for one in launches.usual[key]._asdict().items())]
        for name in SECTIONS:
            if rows := getattr(launches, name).get(key):
                lines += [f"[{where}.{name}]", *(_row(x, rows[x]) for x in Configuration._fields if x in rows)]
        lines.append("")
    return "\n".join(lines)


def _row(kernel: str, value: Launch | int) -> str:
    if isinstance(value, int):
        return f"{kernel} = {value}"
    tma = ", tma = true" * value.tma
    return f"{kernel} = {{step = [{value.BM}, {value.BN}], warps = {value.warps}, stages = {value.stages}{tma}}}"
