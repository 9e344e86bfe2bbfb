"""Fixed sets of generated images: a set is a range of indices of seed 0, for every geometry.

The sizes are those of the Long Range Arena's hard level (200,000 images) under the 80-10-10 split. Image i is a
function of (seed, geometry, i), so a set needs no files and is the same on every machine.
"""

from typing import Final

SEED: Final = 0
SPLITS: Final[dict[str, range]] = {
    "train": range(0, 160_000),
    "val": range(160_000, 180_000),
    "test": range(180_000, 200_000),
}
FRESH: Final = 200_000
"""Images from this index on, of any seed, are in no set."""
END: Final = 1 << 32
