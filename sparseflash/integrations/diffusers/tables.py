"""The mask of a sequence of image and text tokens from the pattern of the image, and the order of its tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparseflash.ordering import token_order
from sparseflash.patterns.beside import beside
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.documents import documents
from sparseflash.patterns.packed import packed
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import Pattern, holds, instead
from sparseflash.patterns.placed_image import PlacedImage
from sparseflash.patterns.stacked import PerSample, per_sample


class Text(NamedTuple):
    """The text tokens of a sequence."""

    before: int  # number of text tokens before the image
    after: int
    used: tuple[int, ...] | None  # for each sample, how many of those after the image are not padding; None: all


def checked(pattern: str | Pattern) -> Pattern:
    """Parse and check a user's pattern.

    Raises:
        TypeError: neither text nor a pattern.
        ValueError: a text that is not a pattern, a pattern per sample, or one that mixes several token orders.
    """
    if not isinstance(pattern, str | Pattern):
        words = instead(pattern)
        raise TypeError(f"use_pattern takes a pattern or its text, got {pattern!r}{f': {words}' * bool(words)}")
    found = parse(pattern) if isinstance(pattern, str) else pattern
    if holds(found, PerSample):
        raise ValueError(f"{found}: a model's pattern applies to every batch, so it cannot be per sample")
    order_of(found)
    return found


def order_of(pattern: Pattern) -> PlacedImage | None:
    """The image that gives a pattern's token order; None: row by row, or no image.

    Raises:
        ValueError: parts in different orders, or an order in a pattern that also has tokens outside the image.
    """
    images = {image._replace(start=0) for image in pattern.placed_images()}
    ordered = [image for image in images if image.order != "raster"]
    if not ordered:
        return None
    if len(images) > 1:
        raise ValueError(
            f"{pattern} mixes {len(images)} token orders, {', '.join(sorted(image.order for image in images))}: give "
            "every part the same order=, tile= and shape"
        )
    (image,) = ordered
    if pattern.known_size != image.tokens:
        raise ValueError(
            f"{pattern}: order={image.order!r} is the order of the {image.tokens:,} tokens of an image, but the "
            "pattern has other tokens too: give order='raster', or the pattern of the image alone"
        )
    return image


@lru_cache(maxsize=64)
def mask_of(pattern: Pattern, text: Text, tokens: int, block: int) -> BlockMask:
    """The mask of a sequence of ``tokens`` tokens, including text.

    Raises:
        ValueError: a pattern for another number of image tokens.
    """
    image = tokens - text.before - text.after
    size = pattern.known_size
    if size is not None and size != image:
        raise ValueError(
            f"{pattern} is for {size:,} tokens; the image or video has {image:,} ({tokens:,} with text): give the "
            "shape after patching, (frames, height, width) of the latents divided by the patch size"
        )
    own = pattern if size is not None or text.used is None else documents([image]) & pattern
    if text.used is None:
        return beside(own, text.before, text.after).compile(tokens, block)
    rows = [packed(beside(own, text.before, used)) for used in text.used]
    return per_sample(*rows).compile(tokens, block)


@lru_cache(maxsize=16)
def _order(image: PlacedImage, text: Text, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The token at each position of the pattern's order, and the inverse, int64 [tokens]; text is not moved."""
    pixels, positions = token_order(image.shape, image.order, tile=image.tile)
    found = []
    for index in (pixels, positions):
        whole = np.arange(tokens)
        whole[text.before : tokens - text.after] = index + text.before
        found.append(torch.from_numpy(whole).to(device))
    return found[0], found[1]


def ordered(pattern: Pattern, text: Text, tokens: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The indices that permute tokens to the pattern's order and back; None: no permutation is needed."""
    image = order_of(pattern)
    return None if image is None else _order(image, text, tokens, device)


def used_of(mask: Tensor, tokens: int, text: int) -> tuple[int, ...] | None:
    """The number of text tokens after the image that each sample uses, from a model's mask; None: all of them.

    Args:
        mask: bool [B, 1, 1, N], false at padding.
        tokens: N.
        text: number of text tokens at the end of the N, including padding.

    Raises:
        ValueError: a mask that hides anything else.
    """
    if mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:3] == (1, 1) and mask.shape[3] == tokens:
        used = mask[:, 0, 0].sum(1).tolist()
        ends = torch.arange(tokens, device=mask.device) < mask[:, 0, 0].sum(1, keepdim=True)
        if torch.equal(ends, mask[:, 0, 0]) and min(used) >= tokens - text:
            found = tuple(count - (tokens - text) for count in used)
            return None if set(found) == {text} else found[:1] if len(set(found)) == 1 else found
    raise ValueError(
        f"the model's mask {mask.dtype} {tuple(mask.shape)} for {tokens:,} tokens, {text:,} of text, hides more than "
        "padding at the end of the text; use_pattern(transformer, None) goes back to dense attention"
    )
