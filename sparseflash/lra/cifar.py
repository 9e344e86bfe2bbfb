"""Image: CIFAR-10 in grey, pixel by pixel (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

The *binary* version, folder ``cifar-10-batches-bin``: ``data_batch_1.bin`` to ``data_batch_5.bin`` and
``test_batch.bin``. Each has 10,000 records of 3,073 bytes: the label, then the red, green and blue planes of 32 x 32
pixels. The Python version consists of pickles. Loading a pickle runs the code in it, so that version is refused.

Grey is the luma of ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B, rounded half up. As in the Arena, the first nine tenths
of the training images are for training and the rest for validation; here in the order of the files, there in that of
TensorFlow Datasets.
"""

import hashlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.untrusted import read_untrusted

SIDE: Final = 32
PIXELS: Final = SIDE * SIDE
RECORD: Final = 1 + 3 * PIXELS
CLASSES: Final = 10
MOST_RECORDS: Final = 1 << 14
"""Per file; the published files have 10,000."""
TRAIN: Final = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST: Final = ("test_batch.bin",)


class Images:
    """The images of several files, in order: ``images[i] -> (uint8 [1024], row-major, label)``.

    Args:
        folder: contains the files.
        names: file names.
        inside: a folder that links may not lead out of.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not consist of whole records, has more than `MOST_RECORDS` of them, holds a label above
            9, is not a regular file, or is outside ``inside``.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], inside: Path | None = None) -> None:
        parts = []
        for name in names:
            path = folder / name
            if not path.exists():
                pickled = path.with_suffix("")
                hint = (
                    f"; {pickled.name} is a pickle and is not read: get the binary version" if pickled.exists() else ""
                )
                raise FileNotFoundError(f"no file {path}{hint}")
            content = read_untrusted(path, MOST_RECORDS * RECORD, inside)
            if not content or len(content) % RECORD:
                raise ValueError(f"{path} must be whole records of {RECORD:,} bytes; it has {len(content):,} bytes")
            part = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
            if (most := int(part[:, 0].max())) >= CLASSES:
                raise ValueError(f"{path} holds the label {most}; there are {CLASSES} classes")
            parts.append(part)
        self._records = np.concatenate(parts)

    def __len__(self) -> int:
        return len(self._records)

    def digest(self) -> str:
        """SHA-256 of the records, which were checked when the files were opened."""
        return hashlib.sha256(self._records.data).hexdigest()

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        record = self._records[index]
        return grey(record[1:].reshape(3, PIXELS)), int(record[0])


def grey(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma of red, green and blue [3, ...].

    Example:
        >>> grey(np.array([[255, 255, 0], [255, 0, 0], [255, 0, 255]], np.uint8)).tolist()
        [255, 76, 29]
    """
    red, green, blue = planes.astype(np.uint32)
    luma: NDArray[np.uint8] = ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)
    return luma
