"""Untrusted files: size and depth are bounded before anything is built from them."""

import json
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from sparseflash.patterns.shown import shown
from sparseflash.patterns.untrusted import read_untrusted

MOST_BYTES = 16 << 20
MOST_TOML = 1 << 20
MOST_PARTS = 16
_LONG_KEY = re.compile(rf"(?<![\w'\"-])(?:[\w'\"-]++[ \t]*+\.[ \t]*+){{{MOST_PARTS}}}")


def read_bytes(path: Path, most: int = MOST_BYTES, inside: Path | None = None) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Args:
        path: the file.
        most: limit in bytes.
        inside: a folder that links may not lead out of.

    Raises:
        FileNotFoundError: no such file.
        ValueError: longer, or not a regular file; a device or a pipe may never end.
    """
    return read_untrusted(path, most, inside)


def read_text(path: Path, inside: Path | None = None) -> str:
    """A text file of at most `MOST_BYTES`.

    Args:
        path: the file.
        inside: a folder that links may not lead out of.

    Raises:
        FileNotFoundError: no such file.
        ValueError: longer, not a regular file, or not text.
    """
    try:
        return read_bytes(path, inside=inside).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None


def parse_json(text: str) -> Any:
    """Plain data from JSON.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Plain data from a TOML file of at most `MOST_TOML` bytes, whose keys have at most `MOST_PARTS` parts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, too long, nested too deeply, or with longer keys, for which parsers take quadratic time.
    """
    try:
        text = read_bytes(path, MOST_TOML).decode()
        if _LONG_KEY.search(text):
            raise ValueError(f"a key of more than {MOST_PARTS} parts")
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("TOML that is nested too deeply") from None


_UNPACK = {".tar.gz": "tar xzf", ".tgz": "tar xzf", ".tar": "tar xf", ".gz": "tar xzf", ".zip": "unzip"}
_MOST_FOLDERS = 500


def check_folder(path: Path) -> None:
    """Raise unless the folder exists; if there is an archive instead, the message says how to unpack it.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is there.
    """
    if path.is_dir():
        return
    if path.exists():
        command = _unpack(path)
        problem = f"is an archive: unpack it (`{command}`)" if command else "is a file"
        raise ValueError(f"{path} {problem}; name the folder that holds the files")
    archives = [path.with_name(path.name + ending) for ending in _UNPACK]
    found = next((archive for archive in archives if archive.is_file()), None)
    raise FileNotFoundError(
        f"no folder {path}" + (f"; unpack {shown(found.name)}: `{_unpack(found)}`" if found else "")
    )


def _unpack(path: Path) -> str | None:
    # A file name may contain shell commands.
    commands = (command for ending, command in _UNPACK.items() if path.name.endswith(ending))
    return next((f"{command} {shown(shlex.quote(str(path)))}" for command in commands), None)


def archive_in(folder: Path) -> str | None:
    """The command that unpacks an archive in a folder, if there is one."""
    found = sorted(path for ending in _UNPACK for path in folder.glob(f"*{ending}"))
    return _unpack(found[0]) if found else None


def folders_below(folder: Path, wanted: Callable[[Path], bool], depth: int = 3) -> Iterator[Path]:
    """Matching folders below a folder, nearest first, for hints; searches at most a few hundred."""
    level = [folder]
    for _ in range(depth):
        level = list(islice((below for place in level for below in _subfolders(place)), _MOST_FOLDERS))
        yield from filter(wanted, level)


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry) for entry in entries if entry.is_dir() and entry.name[0] != ".")
    except OSError:  # not readable
        return []


def check_field_types(cls: type, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``fields`` unchanged after checking that each value has the annotated scalar type.

    Raises:
        TypeError: a field of another type; untrusted JSON may contain anything.
    """
    hints = get_type_hints(cls)
    for name, value in fields.items():
        hint = hints.get(name)
        several = get_origin(hint) is tuple
        kinds = set(get_args(hint) or (hint,))
        kinds |= {int} if float in kinds else set()
        if not kinds <= {int, float, str, bool, type(None)} or (several and not isinstance(value, list | tuple)):
            continue  # checked at its use
        if any(type(one) not in kinds for one in (value if several else [value])):
            raise TypeError(f"{name} must be {' or '.join(sorted(k.__name__ for k in kinds))}, got {value!r}")
    return fields
