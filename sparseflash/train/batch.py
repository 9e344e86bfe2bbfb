"""A batch of training examples, and the symmetries of its images."""

from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SYMMETRIES = 8
Pixel = TypeVar("Pixel", bound=np.generic)


class Batch(NamedTuple):
    """Examples with labels and targets: B images of H x H pixels, or documents of at most N tokens."""

    inputs: Tensor  # uint8 [B, H, H]; int16 [B, N] or [B, 2, N] for sequences, -1 behind the end
    labels: Tensor  # int64 [B]
    targets: Tensor | None  # int64 [B, H, H]: markers on the curve of each pixel, -1 where there is none

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        targets = None if self.targets is None else self.targets.to(device, non_blocking=True)
        return Batch(self.inputs.to(device), self.labels.to(device), targets)

    @classmethod
    def of_images(
        cls,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        targets: NDArray[np.integer] | None = None,
        symmetries: NDArray[np.int64] | None = None,
    ) -> "Batch":
        """Images [B, H, H] as a batch, each mirrored and transposed by its symmetry, 0 to 7."""
        if symmetries is not None:
            images = turned(images, symmetries)
            targets = None if targets is None else turned(targets, symmetries)
        wanted = None if targets is None else torch.from_numpy(targets).long()
        return cls(torch.from_numpy(images), torch.from_numpy(labels), wanted)


def turned(images: NDArray[Pixel], symmetries: NDArray[np.int64]) -> NDArray[Pixel]:
    """Square images [B, H, H], each mirrored and transposed by its symmetry, 0 to 7."""
    result = np.empty_like(images)
    for image, number, place in zip(images, symmetries.tolist(), result, strict=True):
        seen = image[:: -1 if number & 1 else 1, :: -1 if number & 2 else 1]
        place[:] = seen.T if number & 4 else seen
    return result
