"""Writes images in the folder layout of the Long Range Arena release.

``pathfinder{H}/{level}/imgs/{batch}/sample_{i}.png`` (8-bit grey, i from 0 in each batch) and
``pathfinder{H}/{level}/metadata/{batch}.npy`` (see ``metadata``).

Files are written under a temporary name and renamed, images before the metadata of their batch, so a file under its
final name is complete. ``generator.json`` records the arguments, so that another run can only continue the same set.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sparseflash.folder_lock import folder_lock
from sparseflash.foreign import parse_json, read_bytes, read_text
from sparseflash.pathfinder.distance import resolve, seed_word
from sparseflash.pathfinder.geometry import Geometry, whole_number
from sparseflash.pathfinder.images import index_range, prepare
from sparseflash.pathfinder.metadata import metadata_row
from sparseflash.pathfinder.render import render
from sparseflash.pathfinder.scene import DistanceMatch, label_and_margin, make, stream
from sparseflash.pathfinder.workers import run_tasks
from sparseflash.patterns.atomic_write import atomic_write, make_folder, remove_leftovers, write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Task

BATCH = 1000
"""Images per batch folder."""
_TASK = 25  # images
_IDENTITY = "generator.json"


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What ``write`` did.

    Attributes:
        folder: the level folder.
        written: images that this call wrote.
        kept: images of incomplete batches that existed already.
        skipped: numbers of the batches that were complete already.
    """

    folder: Path
    written: int
    kept: int
    skipped: tuple[int, ...]


def write(
    out: str | os.PathLike[str],
    size: int = 256,
    count: int = 1000,
    seed: int = 0,
    level: str = "hard",
    workers: int = 1,
    *,
    start: int = 0,
    geometry: Geometry | None = None,
    match_distance: bool = False,
    progress: bool = True,
) -> WriteReport:
    """Write images ``start`` .. ``start + count - 1`` of a seed below ``out`` in the LRA layout.

    Complete batches of 1,000 are skipped and reported, incomplete ones are completed. An interrupted run, or one with a
    larger ``count``, therefore continues where the last one stopped.

    Args:
        out: folder that contains ``pathfinder{H}``, or will.
        size: as for ``generate``.
        count: number of images, at least one.
        seed: as for ``generate``.
        level: as for ``generate``.
        workers: as for ``generate``; the processes write the images too.
        start: as for ``generate``.
        geometry: as for ``generate``; the level folder is named after the contour length.
        match_distance: as for ``generate``.
        progress: show a progress bar with images per second on stderr.

    Returns:
        A :class:`WriteReport`.

    Raises:
        TypeError, ValueError: a bad argument, or a folder that holds other images (another seed, start or geometry,
            or not written by this function). Nothing is written in this case.
        RuntimeError: a worker died, or the geometry yields no pairs of contours.
        OSError: writing failed.

    Example:
        >>> import tempfile
        >>> from sparseflash import pathfinder
        >>> with tempfile.TemporaryDirectory() as out:
        ...     report = pathfinder.write(out, 32, 3, progress=False)
        ...     len(pathfinder.read(out))
        3
    """
    chosen = resolve(size, level, geometry)
    indices, seed, workers = index_range(start, count, 1), seed_word("seed", seed), whole_number("workers", workers, 1)
    root = Path(out)
    if root.exists() and not root.is_dir():
        raise ValueError(f"out must be a folder, but {str(out)!r} is a file")
    folder = root / f"pathfinder{chosen.size}" / chosen.folder
    identity = json.dumps(
        {"seed": seed, "start": start, "match_distance": bool(match_distance), "geometry": asdict(chosen)}, indent=1
    )
    match = prepare(chosen, match_distance)

    with folder_lock(make_folder(folder, root)):
        _refuse_foreign(folder, identity)
        return _write(root, folder, identity, chosen, seed, match, indices, workers, progress)


def _write(
    root: Path,
    folder: Path,
    identity: str,
    chosen: Geometry,
    seed: int,
    match: DistanceMatch | None,
    indices: range,
    workers: int,
    progress: bool,
) -> WriteReport:
    remove_leftovers(make_folder(folder / "metadata", root))
    write_text(folder / _IDENTITY, identity, root)
    batches = [(b, indices[b * BATCH : (b + 1) * BATCH]) for b in range(-(-len(indices) // BATCH))]
    missing = {b: _missing(folder, b, len(part)) for b, part in batches}
    skipped = tuple(b for b, _ in batches if not missing[b] and _metadata_rows(folder, b) >= len(dict(batches)[b]))
    todo = [(b, part) for b, part in batches if b not in skipped]
    written = sum(len(missing[b]) for b, _ in todo)
    kept = sum(len(part) for _, part in todo) - written

    parts = dict(todo)
    tasks = [
        (b, parts[b].start, missing[b][at : at + _TASK]) for b, _ in todo for at in range(0, len(missing[b]), _TASK)
    ]
    remaining = Counter(b for b, _, _ in tasks)
    for b, part in todo:
        remove_leftovers(make_folder(folder / "imgs" / str(b), root))
        if not remaining[b]:
            _write_metadata(folder, chosen, seed, b, part)
    with _progress_bar(progress, written) as advance:
        work = partial(_draw, chosen, seed, match, folder)
        for (b, _, names), _ in zip(tasks, run_tasks(work, tasks, workers), strict=True):
            advance(len(names))
            remaining[b] -= 1
            if not remaining[b]:
                _write_metadata(folder, chosen, seed, b, parts[b])
    return WriteReport(folder, written, kept, skipped)


def _draw(
    geometry: Geometry, seed: int, match: DistanceMatch | None, folder: Path, task: tuple[int, int, list[int]]
) -> None:
    from PIL import Image

    batch, first, numbers = task
    for i in numbers:
        image = render(make(geometry, seed, first + i, match))
        with atomic_write(folder / "imgs" / str(batch) / f"sample_{i}.png", inside=folder) as file:
            Image.fromarray(image).save(file, format="PNG")


def _write_metadata(folder: Path, geometry: Geometry, seed: int, batch: int, indices: range) -> None:
    rows = []
    for i, index in enumerate(indices):
        # Label and margin are the first draws of an image's stream, so existing images need not be drawn again.
        label, which = label_and_margin(geometry, stream(geometry, seed, index))
        rows.append(metadata_row(geometry, batch, i, label, geometry.paddle_margins[which]) + "\n")
    write_text(folder / "metadata" / f"{batch}.npy", "".join(rows), inside=folder)


def _refuse_foreign(folder: Path, identity: str) -> None:
    if not any((folder / name).exists() for name in ("imgs", "metadata", _IDENTITY)):
        return
    try:
        existing = parse_json(read_text(folder / _IDENTITY, inside=folder))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds images that this generator did not make; choose another folder") from None
    except ValueError:
        raise ValueError(f"{folder / _IDENTITY} is not readable; choose another folder") from None
    expected = json.loads(identity)
    if not isinstance(existing, dict) or existing != expected:
        differing = [key for key in expected if not isinstance(existing, dict) or existing.get(key) != expected[key]]
        raise ValueError(f"{folder} holds images of another {' and '.join(differing)}; choose another folder")


def _missing(folder: Path, batch: int, count: int) -> list[int]:
    try:
        with os.scandir(folder / "imgs" / str(batch)) as entries:
            present = {entry.name for entry in entries if entry.stat().st_size}
    except FileNotFoundError:
        present = set()
    return [i for i in range(count) if f"sample_{i}.png" not in present]


def _metadata_rows(folder: Path, batch: int) -> int:
    try:
        return read_bytes(folder / "metadata" / f"{batch}.npy", inside=folder).count(b"\n")
    except FileNotFoundError:
        return 0


@contextmanager
def _progress_bar(show: bool, total: int) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} img/s")

    columns = (TextColumn("pathfinder"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)
