"""Patterns of a video whose tokens are stored frame by frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.grid import LARGEST
from sparseflash.patterns.image import ImagePattern, Layout, Term, checked_grid
from sparseflash.patterns.pattern import Pattern, checked_int
from sparseflash.patterns.span import Span


class FramePattern(ImagePattern):
    """Base of patterns defined by the distance between frames and the distance between positions within a frame."""

    frames: int
    tokens_per_frame: int

    @property
    def layout(self) -> Layout:
        return Layout((self.frames, self.tokens_per_frame))

    def between(self, low: int, high: int, reach: int = LARGEST, step: int = 1) -> Term:
        """Every ``step``-th of the frames ``low`` to ``high`` later, and positions at most ``reach`` away."""
        frames = Span.offsets(self.frames, low, high, step)
        return frames, Span.offsets(self.tokens_per_frame, -reach, reach)

    def first_frame(self) -> Term:
        """All positions of the first frame."""
        zero = np.zeros(self.frames, np.int64)
        return Span.of(zero, zero + 1), Span.everything(self.tokens_per_frame)

    def beside_first(self, near: Term, first: bool) -> tuple[Term, ...]:
        """The term ``near`` and, if ``first``, the first frame."""
        return (near, self.first_frame()) if first else (near,)


@dataclass(frozen=True, repr=False)
class Spatial(FramePattern):
    """See :func:`spatial`."""

    frames: int
    tokens_per_frame: int
    reach: int = 1
    first: bool = True
    name = "spatial"

    def terms(self) -> tuple[Term, ...]:
        return self.beside_first(self.between(-self.reach, self.reach), self.first)


@dataclass(frozen=True, repr=False)
class Temporal(FramePattern):
    """See :func:`temporal`."""

    frames: int
    tokens_per_frame: int
    reach: int = 0
    first: bool = True
    name = "temporal"

    def terms(self) -> tuple[Term, ...]:
        return self.beside_first(self.between(-self.frames, self.frames, self.reach), self.first)


@dataclass(frozen=True, repr=False)
class Radial(FramePattern):
    """See :func:`radial`."""

    frames: int
    tokens_per_frame: int
    decay: float = 1.0
    neighbors: int | None = None
    narrowest: int = 128
    name = "radial"

    def terms(self) -> tuple[Term, ...]:
        near = self.tokens_per_frame // 2 if self.neighbors is None else self.neighbors
        terms = [self.first_frame(), self.between(0, 0)]
        for bits in range(1, (self.frames - 1).bit_length() + 1):  # of the distance between frames
            length = 2.0 ** (self.tokens_per_frame.bit_length() - bits)
            reach = near if bits == 1 else int(min(max(length * self.decay, self.narrowest), LARGEST))
            step = max(int(self.narrowest / length), 1)
            nearest, farthest = 1 << (bits - 1), (1 << bits) - 1
            terms += [self.between(nearest, farthest, reach, step), self.between(-farthest, -nearest, reach, step)]
        return tuple(terms)


def spatial(frames: int, tokens_per_frame: int, reach: int = 1, *, first: bool = True) -> Pattern:
    """The query's and the key's frames are at most ``reach`` apart, or the key is in the first frame.

    The spatial heads of Sparse VideoGen, Xi et al., https://arxiv.org/abs/2502.01776, section 4. Their code counts the
    distance in tokens, rounded to blocks of 128; here it is exact, in frames.

    Args:
        frames: number of frames.
        tokens_per_frame: tokens of each, one frame after another.
        reach: frames seen on either side.
        first: whether the first frame is seen by all.

    Raises:
        TypeError: an argument is not an int, or first not a bool.
        ValueError: a number below 1, or a negative reach; when compiling, a sequence longer than the video.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.spatial(5, 1).compile(5, block=16).to_dense().astype(int)
        array([[1, 1, 0, 0, 0],
               [1, 1, 1, 0, 0],
               [1, 1, 1, 1, 0],
               [1, 0, 1, 1, 1],
               [1, 0, 0, 1, 1]])
    """
    frames, tokens = _video("spatial", frames, tokens_per_frame)
    return Spatial(frames, tokens, checked_int("spatial", "reach", reach, 0), _flag("spatial", first))


def temporal(frames: int, tokens_per_frame: int, reach: int = 0, *, first: bool = True) -> Pattern:
    """The query's and the key's positions within their frames are at most ``reach`` apart, or the key is in frame 0.

    The temporal heads of Sparse VideoGen, Xi et al., https://arxiv.org/abs/2502.01776, section 4. Their code first
    reorders tokens by position, then frame, and counts the distance in that order, rounded to blocks of 128; here it
    is exact, in positions of the frame.

    Args:
        frames: number of frames.
        tokens_per_frame: tokens of each, one frame after another.
        reach: tokens seen on either side, in every frame.
        first: whether the first frame is seen by all.

    Raises:
        TypeError: an argument is not an int, or first not a bool.
        ValueError: a number below 1, or a negative reach; when compiling, a sequence longer than the video.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.temporal(2, 3, first=False).compile(6, block=16).to_dense().astype(int)
        array([[1, 0, 0, 1, 0, 0],
               [0, 1, 0, 0, 1, 0],
               [0, 0, 1, 0, 0, 1],
               [1, 0, 0, 1, 0, 0],
               [0, 1, 0, 0, 1, 0],
               [0, 0, 1, 0, 0, 1]])
    """
    frames, tokens = _video("temporal", frames, tokens_per_frame)
    return Temporal(frames, tokens, checked_int("temporal", "reach", reach, 0), _flag("temporal", first))


def radial(
    frames: int, tokens_per_frame: int, *, decay: float = 1.0, neighbors: int | None = None, narrowest: int = 128
) -> Pattern:
    """Bands within frames whose width halves with each doubling of the distance between frames.

    Radial attention of Li et al., https://arxiv.org/abs/2506.19852, section 4, as in its published code
    (``get_window_width`` and ``get_diagonal_split_mask`` of radial_attn/attn_mask.py), token by token. A query sees all
    of its own frame and of the first one. For a frame d frames away, ``length`` is ``2**(a - b)``, where a and b are
    the bit lengths of ``tokens_per_frame`` and d. The frame is seen if d is a multiple of ``int(narrowest / length)``,
    or if that is below 1: positions at most ``neighbors`` apart if d is 1, and at most ``max(length * decay,
    narrowest)`` apart otherwise. The code then keeps or drops whole blocks of 128 by their density; this pattern does
    not.

    Args:
        frames: number of frames.
        tokens_per_frame: tokens of each, one frame after another.
        decay: factor of the width, the code's ``decay_factor``.
        neighbors: tokens seen on either side in the frames before and after; default ``tokens_per_frame // 2``, as for
            Wan. Give ``tokens_per_frame`` for HunyuanVideo's whole frames.
        narrowest: the least width, in tokens; the code's block size.

    Raises:
        TypeError: decay is not a number, or another argument not an int.
        ValueError: a number below 1, a negative ``neighbors``, a decay that is not positive and finite; when compiling,
            a sequence longer than the video.

    Example:
        >>> from sparseflash import patterns as P
        >>> mask = P.radial(21, 1560, decay=0.2).compile(21 * 1560)
        >>> f"{mask.token_density:.1%}"
        '28.5%'
    """
    frames, tokens = _video("radial", frames, tokens_per_frame)
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise TypeError(f"radial: decay must be a number, got {decay!r}")
    if not 0 < decay < LARGEST:
        raise ValueError(f"radial: decay must be positive and finite, got decay={decay}")
    if neighbors is not None:
        neighbors = checked_int("radial", "neighbors", neighbors, 0)
    return Radial(frames, tokens, float(decay), neighbors, checked_int("radial", "narrowest", narrowest, 1))


def _video(owner: str, frames: int, tokens_per_frame: int) -> tuple[int, int]:
    shape = (
        checked_int(owner, "frames", frames, 1),
        checked_int(owner, "tokens_per_frame", tokens_per_frame, 1),
    )
    checked_grid(owner, shape, "raster", None)
    return shape


def _flag(owner: str, first: bool) -> bool:
    if not isinstance(first, bool):
        raise TypeError(f"{owner}: first must be True or False, got {first!r}")
    return first
