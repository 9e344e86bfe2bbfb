"""The acceptance bands: about 4.5 standard errors of the original generator, for 300 images of the hard level."""

import math

import numpy as np
import pytest

from sparseflash.pathfinder import contour_strokes, generate_with_truth
from sparseflash.pathfinder.render import target_contrast

# images drawn here, then the bands for 300
BANDS = {
    32: (
        300,
        {
            "grey": (19.6, 20.8),
            "bright": (0.122, 0.130),
            "distractors": (0.90, 1.42),
            "distance": (11.8, 14.5),
            "attempts": (240, 420),
            "ones": (0.37, 0.63),
        },
    ),
    64: (
        40,
        {
            "grey": (13.1, 13.9),
            "bright": (0.0867, 0.0920),
            "distractors": (2.35, 2.97),
            "distance": (29.1, 34.4),
            "attempts": (2900, 5000),
            "ones": (0.37, 0.63),
        },
    ),
    128: (
        60,
        {
            "grey": (7.79, 7.99),
            "bright": (0.0399, 0.0411),
            "distractors": (7.52, 7.85),
            "distance": (71, 81),
            "attempts": (210, 490),
            "ones": (0.37, 0.63),
        },
    ),
    256: (
        150,
        {
            "grey": (2.935, 2.967),
            "bright": (0.01405, 0.01421),
            "distractors": (6.95, 7),
            "distance": (119, 131),
            "attempts": (5.9, 10.2),
            "ones": (0.37, 0.63),
            "touching": (0.005, 0.12),
        },
    ),
}


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_acceptance_bands(size: int) -> None:
    count, bands = BANDS[size]
    images, labels, truths = generate_with_truth(size, count, seed=0)
    seen = {
        "grey": images.mean(),
        "bright": (images > 64).mean(),
        "distractors": np.mean([len(truth.distractors) for truth in truths]),
        "distance": np.mean([truth.marker_distance for truth in truths]),
        "attempts": np.mean([truth.attempts for truth in truths]),
        "ones": labels.mean(),
    }
    if "touching" in bands:
        level = 0.3 * 255 / target_contrast(truths[0].geometry)
        seen["touching"] = np.mean([(contour_strokes(truth)[:2] > level).all(0).any() for truth in truths])
    widen = math.sqrt(300 / count)
    for name, (low, high) in bands.items():
        centre, reach = (low + high) / 2, (high - low) / 2 * widen
        assert abs(seen[name] - centre) <= reach, f"{name}: {seen[name]}, expected {centre} +- {reach}"
