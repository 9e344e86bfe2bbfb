"""Rotary positions: scores depend on the distance from query to key, not on their absolute positions.

RoFormer (Su et al. 2021, https://arxiv.org/abs/2104.09864): a head of size D has D / 2 planes, and each
rotates with the position at its own rate. Plane i holds the entries i and i + D / 2 of a vector, the halves convention
of Llama's published code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflash.ordering import ORDERS, Indices, token_order
from sparseflash.patterns.traced_constant import Constant


@dataclass(frozen=True)
class Rotary1d(Constant):
    """Positions on a line: token i has position i.

    Attributes:
        base: plane i rotates by ``base ** (-2 * i / D)`` per token.

    Example:
        >>> cos, sin = Rotary1d().table(100, head_dim=16)
        >>> cos.shape
        torch.Size([100, 8])
    """

    base: float = 10_000.0

    def __post_init__(self) -> None:
        if not self.base > 0:
            raise ValueError(f"base must be positive, got {self.base!r}")

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError unless heads of this size split into planes."""
        if head_dim % 2:
            raise ValueError(f"Rotary1d needs an even head dim, got {head_dim}")

    def table(self, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to tokens - 1: two fp32 tensors [tokens, head_dim / 2]."""
        return rotary_table(np.arange(tokens), head_dim, self.base)

    def traced_table(self, tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same table, from operations that a compiled graph can run for any number of tokens."""
        rates = float(self.base) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
        angles = torch.arange(tokens, dtype=torch.float64, device=device).unsqueeze(-1) * rates
        return angles.cos().float(), angles.sin().float()


@dataclass(frozen=True)
class Rotary2d(Constant):
    """Token i is a pixel of an image: half of the planes turn with y, half with x.

    Attributes:
        shape: height and width of the image in pixels.
        order: the order in which pixels become tokens, see :func:`sparseflash.ordering.token_order`.
        tile: height and width of a tile in pixels; used by order ``"tile"`` alone.
        wavelengths: shortest and longest wavelength, in pixels.

    Example:
        >>> cos, sin = Rotary2d((8, 8), order="morton").table(64, head_dim=16)
        >>> cos.shape
        torch.Size([64, 8])
    """

    shape: tuple[int, int]
    order: str = "raster"
    tile: tuple[int, int] = (8, 8)
    wavelengths: tuple[float, float] = (4.0, 80.0)

    def __post_init__(self) -> None:
        for name in ("shape", "tile", "wavelengths"):
            value = tuple(getattr(self, name))
            if len(value) != 2:
                raise ValueError(f"{name} must have two entries, got {value!r}")
            object.__setattr__(self, name, value)  # lists do not hash
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {self.order!r}")
        shortest, longest = self.wavelengths
        if not 0 < shortest <= longest:
            raise ValueError(f"wavelengths must be 0 < shortest <= longest; got {self.wavelengths!r}")

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError unless heads of this size split into planes for two axes."""
        if head_dim % 4:
            raise ValueError(f"Rotary2d needs a head dim that is a multiple of 4, got {head_dim}")

    def table(self, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all pixels in token order: two fp32 tensors [tokens, head_dim / 2]."""
        height, width = self.shape
        if tokens != height * width:
            raise ValueError(f"an image of {height} x {width} pixels has {height * width} tokens, got {tokens}")
        pixels, _ = token_order(self.shape, self.order, tile=self.tile)
        return rotary_table_2d(pixels, width, head_dim, self.wavelengths)


@dataclass(frozen=True)
class Rotary3d(Constant):
    """Token i is a place of a video: some planes turn with the frame, some with y, some with x.

    Along each axis, plane i of the n entries that turn with it turns by ``base ** (-2 * i / n)`` a place, as in the
    models Wan, HunyuanVideo and CogVideoX. Their code makes planes of neighbouring entries 2 i and 2 i + 1 of a head;
    :func:`rotate` of entries i and i + D / 2, so weights trained with theirs need the entries of q and k put in that
    order: 0, 2, 4, ... and then 1, 3, 5, ...

    Attributes:
        shape: frames, height and width of the video in tokens.
        order: the order in which places become tokens, see :func:`sparseflash.ordering.token_order`.
        tile: places of a tile along each axis; used by order ``"tile"`` alone. Default ``(4, 4, 4)``.
        split: entries of a head that turn with the frame, with y and with x, all even; together the head dim. Default
            ``D - 4 * (D // 6)`` and twice ``2 * (D // 6)``, as in Wan: 44, 42 and 42 of 128. HunyuanVideo has (16, 56,
            56), CogVideoX (16, 24, 24).
        base: see above.

    Example:
        >>> cos, sin = Rotary3d((4, 6, 5)).table(120, head_dim=16)
        >>> cos.shape
        torch.Size([120, 8])
    """

    shape: tuple[int, int, int]
    order: str = "raster"
    tile: tuple[int, int, int] | None = None
    split: tuple[int, int, int] | None = None
    base: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("shape", "tile", "split"):
            if getattr(self, name) is None and name != "shape":
                continue
            value = tuple(getattr(self, name))
            if len(value) != 3:
                raise ValueError(f"{name} must have three entries, for frames, y and x; got {value!r}")
            object.__setattr__(self, name, value)  # lists do not hash
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {self.order!r}")
        if self.split is not None and any(part < 0 or part % 2 for part in self.split):
            raise ValueError(f"split must be even numbers of entries, got {self.split!r}")
        if not self.base > 0:
            raise ValueError(f"base must be positive, got {self.base!r}")

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError unless heads of this size split into planes for three axes."""
        if self.split is not None and sum(self.split) != head_dim:
            raise ValueError(f"split={self.split!r} is for a head dim of {sum(self.split)}, got {head_dim}")
        if head_dim % 2:
            raise ValueError(f"Rotary3d needs an even head dim, got {head_dim}")

    def table(self, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all places in token order: two fp32 tensors [tokens, head_dim / 2]."""
        self.check_head_dim(head_dim)
        frames, height, width = self.shape
        if tokens != frames * height * width:
            raise ValueError(
                f"a video of {frames} x {height} x {width} has {frames * height * width} tokens, got {tokens}"
            )
        side = 2 * (head_dim // 6)
        split = (head_dim - 2 * side, side, side) if self.split is None else self.split
        places, _ = token_order(self.shape, self.order, tile=self.tile)
        rates = (float(self.base) ** (-np.arange(0, part, 2) / max(part, 1)) for part in split)
        axes = np.unravel_index(places, self.shape)
        angles = [np.outer(axis, rate) for axis, rate in zip(axes, rates, strict=True)]
        return _cos_sin(np.concatenate(angles, axis=1))


@dataclass(frozen=True)
class PackedRotary(Constant):
    """Positions of tokens of several kinds in a row: text beside an image, or images of several sizes.

    Each part counts its own positions from its first token, as the parts of :func:`sparseflash.patterns.packed` and the
    pattern inside of :func:`sparseflash.patterns.beside` do. The rest of a longer row is not rotated.

    Attributes:
        parts: positions and number of tokens of each part. None leaves the tokens of a part unrotated.

    Example:
        >>> from sparseflash.rotary import PackedRotary, Rotary2d
        >>> text, images = (None, 77), [(Rotary2d(shape), shape[0] * shape[1]) for shape in ((8, 8), (4, 6))]
        >>> cos, sin = PackedRotary((text, *images)).table(200, head_dim=16)
        >>> cos.shape, bool((sin[:77] == 0).all())
        (torch.Size([200, 8]), True)
    """

    parts: tuple[tuple[Rotary1d | Rotary2d | Rotary3d | None, int], ...]

    def __post_init__(self) -> None:
        parts = tuple(tuple(part) for part in self.parts)  # lists do not hash
        for part in parts:
            if len(part) != 2 or not isinstance(part[0], Rotary1d | Rotary2d | Rotary3d | None):
                raise TypeError(f"parts must be pairs (positions or None, tokens), got {part!r}")
            if isinstance(part[1], bool) or not isinstance(part[1], int) or part[1] < 0:
                raise ValueError(f"a part must have an int of at least 0 tokens, got {part!r}")
        object.__setattr__(self, "parts", parts)

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError unless heads of this size split into planes for every part."""
        if head_dim % 2:
            raise ValueError(f"PackedRotary needs an even head dim, got {head_dim}")
        for rotary, _ in self.parts:
            if rotary is not None:
                rotary.check_head_dim(head_dim)

    def table(self, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a row of this many tokens: two fp32 tensors [tokens, head_dim / 2]."""
        packed = sum(count for _, count in self.parts)
        if tokens < packed:
            raise ValueError(f"the parts have {packed} tokens together, the row has {tokens}")
        tables = []
        for rotary, count in (*self.parts, (None, tokens - packed)):
            still = torch.ones(count, head_dim // 2), torch.zeros(count, head_dim // 2)
            tables.append(still if rotary is None or count == 0 else rotary.table(count, head_dim))
        cos, sin = (torch.cat(side) for side in zip(*tables, strict=True))
        return cos, sin


Rotary = Rotary1d | Rotary2d | Rotary3d | PackedRotary


def rotary_table(positions: Indices, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions on a line, for :func:`rotate`.

    Args:
        positions: [N], ints.
        head_dim: D, even.
        base: plane i rotates by ``base ** (-2 * i / D)`` per position.

    Returns:
        Two fp32 tensors [N, D / 2]. Angles are computed in fp64; in fp32 they would be off by 0.03 at position
        1,000,000.

    Example:
        >>> import numpy as np
        >>> cos, sin = rotary_table(np.arange(64), head_dim=16)
        >>> cos.shape
        torch.Size([64, 8])
    """
    rates = float(base) ** (-np.arange(0, head_dim, 2) / head_dim)
    return _cos_sin(np.outer(positions, rates))


def rotary_table_2d(
    pixels: Indices, width: int, head_dim: int, wavelengths: tuple[float, float] = (4.0, 80.0)
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the position of every pixel of an image, for :func:`rotate`.

    Half of the planes turn with y, half with x, at wavelengths that grow geometrically.

    Args:
        pixels: raster index of the pixel behind each token, [N], as `token_order` gives it.
        width: width of the image in pixels.
        head_dim: D, a multiple of 4.
        wavelengths: shortest and longest, in pixels.

    Returns:
        Two fp32 tensors [N, D / 2].

    Example:
        >>> import numpy as np
        >>> cos, sin = rotary_table_2d(np.arange(64), width=8, head_dim=16)
        >>> cos.shape
        torch.Size([64, 8])
    """
    shortest, longest = wavelengths
    turns_per_pixel = 1 / np.geomspace(shortest, longest, head_dim // 4)
    y, x = np.divmod(pixels, width)
    return _cos_sin(2 * math.pi * np.concatenate([np.outer(y, turns_per_pixel), np.outer(x, turns_per_pixel)], axis=1))


def _cos_sin(angles: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [..., N, D] by their positions; cos and sin are fp32 [N, D / 2].

    Example:
        >>> import torch
        >>> q = torch.randn(2, 4, 100, 16)
        >>> turned = rotate(q, *Rotary1d().table(100, head_dim=16))
        >>> torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), rtol=1e-4)
        True
    """
    # Heads split off a projection lie apart: on CPUs elementwise operations then go row by row, up to six times slower.
    # Half-precision vectors are promoted by cos and sin, so only the result is rounded.
    real, imaginary = vectors.contiguous().chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).to(vectors.dtype)
