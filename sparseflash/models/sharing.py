"""Sharing the tokens of images among ranks, which communicate in attention only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparseflash.distributed.context import context_parallel_attention
from sparseflash.distributed.sharding import Sharding, check_ranks
from sparseflash.functional.attention import Mask
from sparseflash.models.config import PixelTransformerConfig
from sparseflash.models.tokens import Tokens
from sparseflash.patterns import BlockMask
from sparseflash.tables.device import per_device

if TYPE_CHECKING:
    from sparseflash.models.pixel_transformer import Attend


def shared(tokens: Tokens, masks: Sequence[Mask], mesh: DeviceMesh) -> tuple[Tokens, Attend]:
    """This rank's part of the tokens, and the attention over the tokens of all ranks.

    All layers hold the same tokens, assigned by the work of all masks together.

    Args:
        tokens: tokens of whole images, equal on all ranks.
        masks: the mask of each layer.
        mesh: a DeviceMesh of one dim.

    Raises:
        ValueError: a mask that is not a BlockMask, or fewer cells than ranks.
    """
    compiled = [mask for mask in masks if isinstance(mask, BlockMask)]
    if other := [type(mask).__name__ for mask in masks if not isinstance(mask, BlockMask)]:
        raise ValueError(f"ranks share tokens by what each layer's BlockMask says; got a {other[0]}: {_ON_HOST}")
    sharding = Sharding.of(compiled, mesh.size())
    here = _positions(sharding, mesh.get_local_rank(), tokens.place.device)
    part = tokens._replace(place=tokens.place[:, here], cos=tokens.cos[here], sin=tokens.sin[here])
    return part, partial(context_parallel_attention, mesh=mesh, sharding=sharding)


def check_shared(config: PixelTransformerConfig, size: int, tokens: str | None, ranks: int) -> None:
    """Refuse images whose tokens this many ranks cannot share.

    Args:
        config: config of the model.
        size: height and width of the images, in pixels.
        tokens: which pixels are tokens, if different from the config.
        ranks: number of ranks that share the tokens of an image.

    Raises:
        ValueError: tokens that depend on the image, or fewer cells than ranks.

    Example:
        >>> check_shared(PixelTransformerConfig(), 64, None, ranks=32)
        >>> check_shared(PixelTransformerConfig(), 64, None, ranks=64)
        Traceback (most recent call last):
        ValueError: 4096 tokens are 32 cells of 128, which 64 ranks cannot share: a rank holds at least one; ...
    """
    which = config.tokens if tokens is None else tokens
    if which != "all":
        raise ValueError(f'tokens "{which}" cannot be shared out among ranks: {_ON_HOST}; use tokens "all"')
    check_ranks(ranks, size * size, max(config.block))


_ON_HOST = "who needs which keys must be known on the host, before an image is seen"


@per_device(maxsize=16)
def _positions(sharding: Sharding, rank: int, device: torch.device) -> Tensor:
    return sharding.positions(rank).to(device)
