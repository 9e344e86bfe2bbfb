"""Renders ground truth: the image, the strokes of each contour, and dense targets for a tracing loss.

Contrast multiplies the 8-bit stroke after reduction: targets get ``snake_contrast * paddle_contrast``. Quirk:
distractors get ``snake_contrast`` alone, so at 32 they are brighter than the targets (2 against 1.5). Everything,
markers included, is combined by the pixelwise maximum in float64 and scaled to 0..255. Quirk: the maximum is 1 except
at 32, where a bright distractor exceeds 1 and dims the rest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparseflash.pathfinder.geometry import Geometry
from sparseflash.pathfinder.scene import Contour, Truth
from sparseflash.pathfinder.strokes import Bytes, Floats, marker
from sparseflash.pathfinder.tables import Tables, tables_for


def target_contrast(geometry: Geometry) -> float:
    """Brightness of the two targets, 1 = full."""
    return geometry.snake_contrast * geometry.paddle_contrast


def render(truth: Truth) -> Bytes:
    """The image, uint8 [H, H]."""
    geometry = truth.geometry
    tables = tables_for(geometry, truth.margin)
    half, size = tables.half, geometry.size
    canvas = np.zeros((size + 2 * half, size + 2 * half))
    for group, contrast in (
        (truth.targets, target_contrast(geometry)),
        (truth.distractors, geometry.snake_contrast),
    ):
        levels = np.arange(256) / 255 * contrast
        for contour in group:
            _draw(canvas, levels.take(tables.strokes.take(contour.states, 0)), contour)
    image = canvas[half : half + size, half : half + size]
    for y, x in truth.markers:
        patch, (top, left) = marker(y, x, size=size, radius=geometry.marker_radius, antialias=geometry.antialias)
        window = image[top : top + patch.shape[0], left : left + patch.shape[1]]
        np.maximum(window, patch / 255, out=window)
    low, high = image.min(), image.max()
    scaled: Bytes = np.floor((image - low) * 255 / (high - low) + 0.5).astype(np.uint8)
    return scaled


def contour_strokes(truth: Truth) -> Bytes:
    """The strokes of each contour before contrast, uint8 [contours, H, H], targets first."""
    tables = tables_for(truth.geometry, truth.margin)
    return np.stack([_plane(tables, contour) for contour in truth.contours])


def curve_targets(truth: Truth) -> NDArray[np.int8]:
    """For each lit pixel, how many markers lie on the curve it belongs to: a target for a dense training loss.

    Args:
        truth: ground truth of one image.

    Returns:
        int8 [H, H]: 0, 1 or 2 on the strokes of a curve, and -1 where the image is black or a marker covers a pixel
        that no stroke touches. Where strokes overlap, the brighter one decides, or the earlier contour if they are
        equally bright. A model trained on these targets has seen more than labels: report its results separately.

    Example:
        >>> from sparseflash import pathfinder
        >>> _, _, truths = pathfinder.generate_with_truth(32, 1)
        >>> pathfinder.curve_targets(truths[0]).shape
        (32, 32)
    """
    planes = contour_strokes(truth).astype(np.float64)
    planes[:2] *= target_contrast(truth.geometry)
    planes[2:] *= truth.geometry.snake_contrast
    owner = planes.argmax(0)
    counts = np.array(truth.markers_on, np.int8)
    lit = (planes.max(0) > 0) & (render(truth) > 0)
    return np.where(lit, counts[owner], np.int8(-1))


def _plane(tables: Tables, contour: Contour) -> Bytes:
    half, size = tables.half, tables.size
    canvas = np.zeros((size + 2 * half, size + 2 * half), np.uint8)
    _draw(canvas, tables.strokes[contour.states], contour)
    return canvas[half : half + size, half : half + size]


def _draw(canvas: Bytes | Floats, patches: Bytes | Floats, contour: Contour) -> None:
    """Combine patches [n, k, k], centred on the contour's pixels, into a canvas padded by k // 2."""
    side = patches.shape[-1]
    for patch, (y, x) in zip(patches, contour.pixels.tolist(), strict=True):
        window = canvas[y : y + side, x : x + side]
        np.maximum(window, patch, out=window)
