"""What a Linux library needs of the machine that loads it, read from its file.

A wheel's name promises on which systems it runs; this is how the promise is kept honest without any tool. Only the
standard library is imported: the build uses it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

_NEEDED, _STRINGS, _VERSIONS, _VERSION_COUNT = 1, 5, 0x6FFFFFFE, 0x6FFFFFFF
_LOADED, _DYNAMIC = 1, 2


@dataclass(frozen=True)
class Needs:
    """What is asked of a machine.

    Attributes:
        libraries: that are loaded with it.
        versions: of their symbols, as ``GLIBC_2.17``.
    """

    libraries: tuple[str, ...]
    versions: tuple[str, ...]

    @property
    def glibc(self) -> tuple[int, int] | None:
        """The oldest GNU C library that serves; None where another is meant."""
        found = [re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", version) for version in self.versions]
        return max(((int(each[1]), int(each[2])) for each in found if each), default=None)


def needs(library: Path) -> Needs:
    """Read a 64-bit little-endian ELF file.

    Raises:
        ValueError: if it is something else.
    """
    data = library.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{library} must be a 64-bit little-endian ELF file; it begins with {data[:6]!r}")
    (table,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    segments = [
        struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)
    ]  # kind, -, at, address, -, bytes

    def position(address: int) -> int:
        """Where in the file lies what is loaded at an address."""
        for kind, _, at, start, _, length in segments:
            if kind == _LOADED and start <= address < start + length:
                return int(at + address - start)
        raise ValueError(f"{library} names an address that is not in it: {address}")

    entries: list[tuple[int, int]] = []
    for kind, _, at, _, _, length in segments:
        if kind == _DYNAMIC:
            entries += struct.iter_unpack("<QQ", data[at : at + length - length % 16])
    known = dict(entries)

    def text(offset: int) -> str:
        start = position(known[_STRINGS]) + offset
        return data[start : data.index(0, start)].decode()

    versions = []
    at = position(known[_VERSIONS]) if _VERSIONS in known else 0
    for _ in range(known.get(_VERSION_COUNT, 0)):
        _, symbols, _, first, following = struct.unpack_from("<HHIII", data, at)
        symbol = at + first
        for _ in range(symbols):
            _, _, _, name, step = struct.unpack_from("<IHHII", data, symbol)
            versions.append(text(name))
            symbol += step
        at += following
    libraries = tuple(text(value) for key, value in entries if key == _NEEDED)
    return Needs(libraries, tuple(versions))
