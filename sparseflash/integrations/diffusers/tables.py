"""Makes the mask of a sequence of image tokens and text from the image's pattern, and the order of its tokens."""

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
    """Where the text is in a sequence."""

    before: int  # tokens
    after: int
    used: tuple[int, ...] | None  # for text after the image: how many tokens of each sample are not padding; None: all


def checked(pattern: str | Pattern) -> Pattern:
    """The user's pattern.

    Raises:
        TypeError: neither a text nor a pattern.
        ValueError: a text that is not a pattern, a pattern per sample, or one with several token orders.
    """
    if not isinstance(pattern, str | Pattern):
        words = instead(pattern)
        raise TypeError(f"use_pattern takes a pattern or its text, got {pattern!r}{f': {words}' * bool(words)}")
    found = parse(pattern) if isinstance(pattern, str) else pattern
    if holds(found, PerSample):
        raise ValueError(f"{found}: a model's pattern serves every batch, it cannot be per sample")
    order_of(found)
    return found


def order_of(pattern: Pattern) -> PlacedImage | None:
    """The image that defines the token order of a pattern; None: row by row, or no image.

    Raises:
        ValueError: parts in different orders, or an order of something that is packed or has text beside it.
    """
    images = {image._replace(start=0) for image in pattern.placed_images()}
    ordered = [image for image in images if image.order != "raster"]
    if not ordered:
        return None
    if len(images) > 1:
        raise ValueError(
            f"{pattern} has tokens in {len(images)} orders, {', '.join(sorted(image.order for image in images))}; a "
            "sequence has one: give every part the same order=, tile= and shape"
        )
    (image,) = ordered
    if pattern.known_size != image.tokens:
        raise ValueError(
            f"{pattern}: order={image.order!r} puts the {image.tokens:,} tokens of an image in order; tokens beside "
            "or after them have no place in it: give order='raster', or the pattern of the image alone"
        )
    return image


@lru_cache(maxsize=64)
def mask_of(pattern: Pattern, text: Text, tokens: int, block: int) -> BlockMask:
    """The mask of a sequence of this many tokens, including text.

    Raises:
        ValueError: a pattern that is not for the number of image tokens.
    """
    image = tokens - text.before - text.after
    size = pattern.known_size
    if size is not None and size != image:
        raise ValueError(
            f"{pattern} is for {size:,} tokens; the image or video has {image:,} ({tokens:,} with text): give the "
            "shape after patching, (frames, height, width) of the latents over the patch size"
        )
    own = pattern if size is not None or text.used is None else documents([image]) & pattern
    if text.used is None:
        return beside(own, text.before, text.after).compile(tokens, block)
    rows = [packed(beside(own, text.before, used)) for used in text.used]
    return per_sample(*rows).compile(tokens, block)


@lru_cache(maxsize=16)
def _order(image: PlacedImage, text: Text, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The token at each place, and the place of each token; text is not moved."""
    pixels, positions = token_order(image.shape, image.order, tile=image.tile)
    found = []
    for index in (pixels, positions):
        whole = np.arange(tokens)
        whole[text.before : tokens - text.after] = index + text.before
        found.append(torch.from_numpy(whole).to(device))
    return found[0], found[1]


def ordered(pattern: Pattern, text: Text, tokens: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The indices that permute tokens to the pattern's order and back; None: they are in it already."""
    image = order_of(pattern)
    return None if image is None else _order(image, text, tokens, device)


def used_of(mask: Tensor, tokens: int, text: int) -> tuple[int, ...] | None:
    """The number of text tokens after the image in each sample, from the model's mask; None: all of them.

    Args:
        mask: bool [B, 1, 1, N], false for padding.
        tokens: N.
        text: text tokens at the end of N, including padding.

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
        f"the model hides keys in a way that no text after the image does, by a mask {mask.dtype} {tuple(mask.shape)} "
        f"for {tokens:,} tokens, {text:,} of text; use_pattern(transformer, None) goes back to dense attention"
    )
