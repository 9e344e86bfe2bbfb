"""Fixed sets of generated images: a set is a range of indices of seed 0, for every geometry.

The sizes are those of the hard level of the Long Range Arena (200,000 images) with the 80-10-10 split. Image i depends
on (seed, geometry, i) alone, so a set needs no files and is the same on every machine.
"""

from typing import Final

SEED: Final = 0
SPLITS: Final[dict[str, range]] = {
    "train": range(0, 160_000),
    "val": range(160_000, 180_000),
    "test": range(180_000, 200_000),
}
FRESH: Final = 200_000
"""No set contains images from this index on, of any seed."""
END: Final = 1 << 32
