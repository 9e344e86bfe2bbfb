"""Text and Retrieval: documents as bytes.

**Text** is IMDb (Maas et al. 2011): is a review favourable? The release does not hold it; the Arena takes it from
TensorFlow Datasets, and both are the folder ``aclImdb`` of https://ai.stanford.edu/~amaas/data/sentiment/:
``{train,test}/{neg,pos}/*.txt``, 12,500 files in each. There is no validation set; the Arena used the test set as one.

**Retrieval** is AAN (Radev et al. 2013) as the release has it in ``tsv_data``: ``new_aan_pairs.{train,eval,test}.tsv``
without a header, a line being label (``0.0`` or ``1.0``), two paper numbers and two texts: does one cite the other? The
texts stand in the file as Python wrote them (``b'...'`` and backslash escapes) and are taken as they stand, without
quotes meaning anything: so the Arena's own reader and that of S4 take them.
"""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sparseflash.foreign import read_bytes
from sparseflash.lra.lines import Lines
from sparseflash.patterns.progress import track
from sparseflash.patterns.shown import shown
from sparseflash.patterns.untrusted import check_inside, open_untrusted

Bytes = NDArray[np.uint8]
ANSWERS: Final = ("neg", "pos")
MOST_REVIEWS: Final = 1 << 20


class Reviews:
    """The reviews of one part of IMDb: ``reviews[i] -> (uint8 [N], 0 or 1)``, the unfavourable ones first.

    Args:
        folder: such as ``aclImdb/train``.
        inside: a folder that links may not lead out of.

    Raises:
        FileNotFoundError: no ``neg`` or ``pos`` in it.
        ValueError: one of them holds no review, or more than a million; when one is read or all are checked, a file
            that is empty, no regular file, of more than 16 MB or outside of ``inside``.
    """

    def __init__(self, folder: Path, inside: Path | None = None) -> None:
        self._inside = inside
        self._files: list[tuple[Path, int]] = []
        for answer, name in enumerate(ANSWERS):
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"{folder} is no part of aclImdb: it has no folder {name}")
            # Names are NUMBER_RATING.txt: in the order of numbers, which no file system keeps by itself.
            if inside is not None:
                check_inside(folder / name, inside)
            found = list(islice((folder / name).glob("*.txt"), MOST_REVIEWS + 1))
            if not found:
                raise ValueError(f"{folder / name} holds no review: *.txt")
            if len(found) > MOST_REVIEWS:
                raise ValueError(f"{folder / name} holds more than {MOST_REVIEWS:,} reviews")
            found.sort(key=lambda path: (len(path.stem.split("_")[0]), path.name))
            self._files += [(path, answer) for path in found]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Bytes, int]:
        path, answer = self._files[index]
        text = read_bytes(path, inside=self._inside)
        if not text:
            raise ValueError(f"{shown(path)} is empty")
        return np.frombuffer(text, np.uint8), answer

    def digest(self) -> str:
        """SHA-256 of names, answers and sizes, none of which is 0."""
        found = hashlib.sha256()
        for index in track(range(len(self)), f"checking {self._files[0][0].parent.parent.name}"):
            path, answer = self._files[index]
            with open_untrusted(path, self._inside) as (_, size):
                pass
            if not size:
                raise ValueError(f"{shown(path)} is empty")
            found.update(f"{path.name} {answer} {size}\n".encode())
        return found.hexdigest()


class Papers:
    """The pairs of one file of AAN: ``papers[i] -> ((uint8 [N], uint8 [M]), 0 or 1)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what `Lines` refuses; when one is read or all are checked, a line that is no pair.
    """

    def __init__(self, path: Path, inside: Path | None = None) -> None:
        self._lines = Lines(path, inside=inside)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[tuple[Bytes, Bytes], int]:
        label, first, second = self._fields(index, self._lines[index])
        return (np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)), int(label[:1])

    def digest(self) -> str:
        """SHA-256 of the file, once every line was found to be a pair."""
        return self._lines.digest(self._fields)

    def _fields(self, index: int, line: bytes) -> tuple[bytes, bytes, bytes]:
        """Label and texts of a line."""
        fields, where = line.split(b"\t"), self._lines.where(index)
        if len(fields) == 3:
            raise ValueError(
                f"{where}: label and two ids, but no texts; tsv_data of the release has both, 5 fields a line"
            )
        if len(fields) != 5:
            raise ValueError(f"{where}: a pair has 5 fields (label, two numbers, two texts); got {len(fields)}")
        label, first, second = fields[0], fields[3], fields[4]
        if label not in (b"0", b"1", b"0.0", b"1.0"):
            raise ValueError(f"{where}: the label must be 0.0 or 1.0; got {label[:20]!r}")
        if not first or not second:
            raise ValueError(f"{where}: a text is empty")
        return label, first, second
