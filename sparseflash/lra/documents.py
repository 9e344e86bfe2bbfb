"""Text and Retrieval: documents as bytes.

**Text** is IMDb (Maas et al. 2011): is a review favourable? It is not in the release. The Arena takes it from
TensorFlow Datasets, which holds the folder ``aclImdb`` of https://ai.stanford.edu/~amaas/data/sentiment/:
``{train,test}/{neg,pos}/*.txt``, 12,500 files in each. There is no validation set; the Arena used the test set as one.

**Retrieval** is AAN (Radev et al. 2013): does one paper cite the other? The release has it in ``tsv_data``, as
``new_aan_pairs.{train,eval,test}.tsv`` without a header. A line holds the label (``0.0`` or ``1.0``), two paper numbers
and two texts. The texts are in the file as Python printed them (``b'...'`` and backslash escapes). They are used as
they are, and quotes have no meaning, as in the Arena's own reader and in that of S4.
"""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sparseflash.lra.lines import Lines
from sparseflash.patterns.progress import track
from sparseflash.patterns.shown import shown
from sparseflash.patterns.untrusted import check_inside, open_untrusted
from sparseflash.utils.untrusted import read_bytes

Bytes = NDArray[np.uint8]
ANSWERS: Final = ("neg", "pos")
MOST_REVIEWS: Final = 1 << 20


class Reviews:
    """The reviews of one part of IMDb: ``reviews[i] -> (uint8 [N], 0 or 1)``, the unfavourable ones first.

    Args:
        folder: such as ``aclImdb/train``.
        inside: a folder that links may not lead out of.

    Raises:
        FileNotFoundError: it has no ``neg`` or ``pos``.
        ValueError: one of them holds no review, or more than a million. When a review is read or all are checked: its
            file is empty, not a regular file, larger than 16 MB, or outside ``inside``.
    """

    def __init__(self, folder: Path, inside: Path | None = None) -> None:
        self._inside = inside
        self._files: list[tuple[Path, int]] = []
        for answer, name in enumerate(ANSWERS):
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"{folder} is not part of aclImdb: it has no folder {name}")
            if inside is not None:
                check_inside(folder / name, inside)
            files = list(islice((folder / name).glob("*.txt"), MOST_REVIEWS + 1))
            if not files:
                raise ValueError(f"{folder / name} holds no review: *.txt")
            if len(files) > MOST_REVIEWS:
                raise ValueError(f"{folder / name} holds more than {MOST_REVIEWS:,} reviews")
            # Names are NUMBER_RATING.txt. Sort by number: file systems list files in any order.
            files.sort(key=lambda path: (len(path.stem.split("_")[0]), path.name))
            self._files += [(path, answer) for path in files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Bytes, int]:
        path, answer = self._files[index]
        text = read_bytes(path, inside=self._inside)
        if not text:
            raise ValueError(f"{shown(path)} is empty")
        return np.frombuffer(text, np.uint8), answer

    def digest(self) -> str:
        """SHA-256 of names, answers and sizes; checks that no file is empty."""
        digest = hashlib.sha256()
        for index in track(range(len(self)), f"checking {self._files[0][0].parent.parent.name}"):
            path, answer = self._files[index]
            with open_untrusted(path, self._inside) as (_, size):
                pass
            if not size:
                raise ValueError(f"{shown(path)} is empty")
            digest.update(f"{path.name} {answer} {size}\n".encode())
        return digest.hexdigest()


class Papers:
    """The pairs of one file of AAN: ``papers[i] -> ((uint8 [N], uint8 [M]), 0 or 1)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `Lines`. When a line is read or all are checked: it is not a pair.
    """

    def __init__(self, path: Path, inside: Path | None = None) -> None:
        self._lines = Lines(path, inside=inside)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[tuple[Bytes, Bytes], int]:
        label, first, second = self._fields(index, self._lines[index])
        return (np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)), int(label[:1])

    def digest(self) -> str:
        """SHA-256 of the file; checks that every line is a pair."""
        return self._lines.digest(self._fields)

    def _fields(self, index: int, line: bytes) -> tuple[bytes, bytes, bytes]:
        """The label and the texts of a line."""
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
