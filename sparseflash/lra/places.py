"""Where the files of a task lie, and what to do where they do not."""

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
# What changes when files do: of reviews, which are read anew each time, the folders that list them.
_LOOKED_AT: Final = {
    "listops": [f"basic_{split}.tsv" for split in ("train", "val", "test")],
    "text": [f"{split}/{answer}" for split in ("train", "test") for answer in ("neg", "pos")],
    "retrieval": [f"new_aan_pairs.{split}.tsv" for split in ("train", "eval", "test")],
    "image": [*cifar.TRAIN, *cifar.TEST],
}


def inner(task: str, folder: Path) -> Path:
    """The folder with the files, where the one above was named."""
    # The release's archive holds a folder lra_release in another; the inner one is the complete one.
    nested = folder / "lra_release" / "lra_release", folder / "lra_release", folder
    return next((place / FOLDER[task] for place in nested if (place / FOLDER[task]).is_dir()), folder)


def stamp(task: str, folder: Path) -> tuple[tuple[int, int] | None, ...]:
    """What is different once the files were changed: their sizes and times."""
    found: list[tuple[int, int] | None] = []
    for name in _LOOKED_AT[task]:
        try:
            status = os.stat(folder / name)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_size, status.st_mtime_ns))
    return tuple(found)


def hint(task: str, folder: Path) -> str:
    """What to do about a folder without the files of a task: the end of a message."""
    first = _LOOKED_AT[task][0]
    deeper = next(folders_below(folder, lambda place: (place / first).exists()), None)
    if deeper is not None:
        return f"; there is {shown(deeper)}: name that folder"
    if archive := archive_in(folder):
        return f"; an archive lies there, unpack it: `{archive}`"
    return f"; {task} is read from a folder {FOLDER[task]} with {_LAYOUT[task]}: docs/lra.md says where it is published"
