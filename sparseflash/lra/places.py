"""Finds the files of a task, and says what to do if they are missing."""

import os
from pathlib import Path
from typing import Final

from sparseflash.foreign import archive_in, folders_below
from sparseflash.lra import cifar
from sparseflash.patterns.shown import shown

FOLDER: Final = {
    "listops": "listops-1000",
    "text": "aclImdb",
    "retrieval": "tsv_data",
    "image": "cifar-10-batches-bin",
}
_LAYOUT: Final = {
    "listops": "basic_train.tsv, basic_val.tsv and basic_test.tsv",
    "text": "train/neg, train/pos, test/neg and test/pos, each with its reviews",
    "retrieval": "new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv",
    "image": "data_batch_1.bin to data_batch_5.bin and test_batch.bin",
}
# Paths whose size and time change if the files change. Reviews are read on every access: their folders are enough.
_STAMPED: Final = {
    "listops": [f"basic_{split}.tsv" for split in ("train", "val", "test")],
    "text": [f"{split}/{answer}" for split in ("train", "test") for answer in ("neg", "pos")],
    "retrieval": [f"new_aan_pairs.{split}.tsv" for split in ("train", "eval", "test")],
    "image": [*cifar.TRAIN, *cifar.TEST],
}


def inner(task: str, folder: Path) -> Path:
    """The folder with the files: inside ``folder``, or ``folder`` itself."""
    # The archive of the release holds one folder lra_release inside another; the inner one is complete.
    nested = folder / "lra_release" / "lra_release", folder / "lra_release", folder
    return next((place / FOLDER[task] for place in nested if (place / FOLDER[task]).is_dir()), folder)


def stamp(task: str, folder: Path) -> tuple[tuple[int, int] | None, ...]:
    """Sizes and times of the files, which change if the files change; None for a missing file."""
    stamps: list[tuple[int, int] | None] = []
    for name in _STAMPED[task]:
        try:
            status = os.stat(folder / name)
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def hint(task: str, folder: Path) -> str:
    """What to do about a folder that lacks the files of a task: the end of an error message."""
    first = _STAMPED[task][0]
    deeper = next(folders_below(folder, lambda place: (place / first).exists()), None)
    if deeper is not None:
        return f"; there is {shown(deeper)}: name that folder"
    if archive := archive_in(folder):
        return f"; an archive lies there, unpack it: `{archive}`"
    return f"; {task} is read from a folder {FOLDER[task]} with {_LAYOUT[task]}: docs/lra.md says where it is published"
