"""Rotary positions in two dimensions: scores depend on where the key lies from the query, not on where both are."""

import math

import numpy as np
import torch
from torch import Tensor

from sparseflash.ordering import Indices


def rotary_table(
    pixels: Indices, width: int, head_dim: int, wavelengths: tuple[float, float] = (4.0, 80.0)
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's position, for `rotate`.

    A head is split into ``head_dim / 2`` planes; half of them turn with y, half with x, at wavelengths that grow
    geometrically (RoFormer, Su et al. 2021, on each axis by itself).

    Args:
        pixels: raster index of the pixel behind each token, [N], as `token_order` gives it.
        width: width of the image in pixels.
        head_dim: a multiple of 4.
        wavelengths: shortest and longest, in pixels.

    Returns:
        Two float32 tensors [N, head_dim / 2].

    Example:
        >>> import numpy as np
        >>> cos, sin = rotary_table(np.arange(64), width=8, head_dim=16)
        >>> cos.shape
        torch.Size([64, 8])
    """
    shortest, longest = wavelengths
    turns_per_pixel = 1 / np.geomspace(shortest, longest, head_dim // 4)
    y, x = np.divmod(pixels, width)
    angles = 2 * math.pi * np.concatenate([np.outer(y, turns_per_pixel), np.outer(x, turns_per_pixel)], axis=1)
    return torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys [..., N, D] by their positions; cos and sin are float32 [N, D / 2]."""
    # Half-precision vectors are promoted by cos and sin, so only the result is rounded.
    real, imaginary = vectors.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).to(vectors.dtype)
