"""Vision models: patterns over the patches of an image or a video, and the special tokens beside them.

The text of a pattern may contain ``{grid}``, the (height, width) of an image in patches or the (frames, height, width)
of a video, and for videos ``{frames}`` and ``{tokens_per_frame}``. Such a pattern applies to patches only: class and
register tokens, which come first, see everything and are seen by everything. It also applies only to layers that read
patches: other attention in such a model (the predictor and the poolers of V-JEPA 2, the decoder of VideoMAE, the
pooling heads of SigLIP) sees everything.

Each forward pass tells the size of its images: hooks read it from the convolution that makes the patches or, for a
model that is given patches (SigLIP 2), from ``spatial_shapes``. An image of another size than the config's gets its own
grid.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Collection
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparseflash.integrations.transformers.operators import BETWEEN_SAMPLES, checked

Shape: TypeAlias = tuple[int, ...]

# By model_type, as of Transformers 5.24: special tokens before the patches, without the registers of the config.
KINDS = {
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "siglip2_vision_model": 0,
    "siglip_vision_model": 0,
    "videomae": 0,
    "vit": 1,
    "vjepa2": 0,
}
OF_VIDEO = ("{frames}", "{tokens_per_frame}")
ATTRIBUTE = "block_sparse_patches"  # of attention modules in a vision model: Patches or None


class Patches:
    """The grids of the images that a model reads.

    Attributes:
        special: tokens before the patches.
        home: the grid of images of the config's size.
    """

    def __init__(self, config: Any, cut_before: bool) -> None:
        self.special: int = KINDS[config.model_type] + getattr(config, "num_register_tokens", 0)
        self.home = _of_config(config)
        self._cut_before = cut_before  # padded, since images of several shapes make rows of one length
        self._now: dict[int, tuple[Shape, ...]] = {}  # by thread: the images of its current forward pass
        self._read: dict[int, list[tuple[Shape, ...]]] = {}  # by the number of patches, two at most

    def of_convolution(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Hook of the convolution, whose output is [B, C, height, width] or [B, C, frames, height, width]."""
        shape = tuple(int(side) for side in out.shape[2:])
        self._begin(math.prod(shape), (shape,))

    def of_shapes(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook for given patches, with the (height, width) of each image, int [B, 2]."""
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{type(module).__name__} is told the shapes of its images as a tensor, which a graph that is being "
                "traced cannot read: call the model without torch.compile, or without a pattern"
            )
        given = dict(zip(("pixel_values", "spatial_shapes"), args, strict=False)) | kwargs
        found = tuple((int(height), int(width)) for height, width in given["spatial_shapes"].tolist())
        self._begin(given["pixel_values"].shape[1], found[:1] if len(set(found)) == 1 else found)

    def end(self, *_: Any) -> None:
        """Hook at the end of a forward pass."""
        self._now.pop(_thread(), None)

    def _begin(self, patches: int, shapes: tuple[Shape, ...]) -> None:
        self._now[_thread()] = shapes
        if not torch.compiler.is_compiling():
            read = self._read.setdefault(patches, [])
            if shapes not in read[:2]:
                read[1:] = [shapes]

    def written(self, text: str, tokens: int) -> str:
        """The pattern of a layer with this many tokens, for the images of this forward pass.

        Raises:
            ValueError: tokens that are not the patches of these images and the special ones; a layer that is called by
                itself, or recomputed when it is not known for which images.
        """
        shapes = self._shapes(tokens)
        texts = [self.of_grid(text, shape) for shape in shapes]
        if not self._cut_before:
            return texts[0]
        return BETWEEN_SAMPLES.join(f"packed({one})" for one in texts)  # padding after an image sees nothing

    def of_grid(self, text: str, grid: Shape) -> str:
        """The pattern for images with this grid."""
        # Tracing supports f-strings of symbolic sides, but not str().
        filled = text.replace("{grid}", f"({', '.join([f'{side}' for side in grid])})")
        if len(grid) == 3:
            for name, number in zip(OF_VIDEO, (grid[0], grid[1] * grid[2]), strict=True):
                filled = filled.replace(name, f"{number}")
        elif any(name in text for name in OF_VIDEO):
            raise ValueError(
                f"{text}: {' and '.join(OF_VIDEO)} are of videos; for the patches of an image give {{grid}}"
            )
        if "{" in filled:
            raise ValueError(
                f"{text}: a model fills in {{grid}}, {' and '.join(OF_VIDEO)} alone; write {{grid}} for its patches"
            )
        return f"beside({filled}, {self.special})" if self.special else filled

    def _shapes(self, tokens: int) -> tuple[Shape, ...]:
        patches = tokens - self.special
        found = self._now.get(_thread(), ())
        if (
            not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        ):  # recomputed in a backward pass
            read = self._read.get(patches, [])
            if len(read) > 1:
                raise ValueError(
                    f"gradient checkpointing recomputes a layer of {patches:,} patches, and this model has read images "
                    f"of {_listed(read)}: train without checkpointing, or on images of one shape"
                )
            found = read[0] if read else ()
        if not found:
            raise ValueError(
                "a pattern that names {grid} is for images that are cut into patches in the same forward pass: call, "
                "or compile, the whole model, or write the shape in place of {grid}"
            )
        if not self._fits(found, patches):
            raise ValueError(
                f"a layer has {tokens:,} tokens, but the image or video has {_listed([found])} patches, with "
                f"{self.special} tokens before them: a model that leaves out patches (bool_masked_pos) can take no "
                "pattern that names {grid}; use_pattern(model, None) lets it see everything"
            )
        return found

    def _fits(self, shapes: tuple[Shape, ...], patches: int) -> bool:
        most = max(map(math.prod, shapes))
        return most <= patches if self._cut_before else most == patches


def _listed(read: Collection[tuple[Shape, ...]]) -> str:
    return " and of ".join(sorted(" x ".join(map(str, shapes[0])) for shapes in read))


def _thread() -> int:
    """The key of this thread; a traced graph serves every thread and reads only what it wrote itself."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _of_config(config: Any) -> Shape:
    if (number := getattr(config, "num_patches", None)) is not None:  # SigLIP 2 counts the patches of a square
        return math.isqrt(number), math.isqrt(number)
    sides, patch = (
        _pair(size) for size in (getattr(config, "image_size", None) or config.crop_size, config.patch_size)
    )
    grid = tuple(side // by for side, by in zip(sides, patch, strict=True))
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    return grid if frames is None else (max(frames // config.tubelet_size, 1), *grid)


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, tuple | list) else (size, size)


def mark_patches(model: Any, readers: Collection[nn.Module]) -> None:
    """Mark every attention module of a vision model as reading patches or not, and hook what makes the patches.

    Args:
        model: a model of Transformers, or a part of one.
        readers: its modules that call the attention interface.
    """
    asking, seeing = set(map(id, readers)), set()
    for part in model.modules():
        if _kind(part) not in KINDS or not (watched := _cutting(part)):
            continue
        seeing.add(_kind(part))
        known = [m for m in part.modules() if id(m) in asking and not isinstance(getattr(m, ATTRIBUTE, None), Patches)]
        if not known:
            continue
        cuts = isinstance(watched, nn.Conv2d | nn.Conv3d)
        patches = Patches(part.config, cut_before=not cuts)
        if cuts:
            watched.register_forward_hook(patches.of_convolution)
        else:
            watched.register_forward_pre_hook(patches.of_shapes, with_kwargs=True)
        part.register_forward_hook(patches.end, always_call=True)
        for module in known:
            setattr(module, ATTRIBUTE, patches)
        _draw_masks_for_pooling(part)
    for module in readers:  # nothing is known about an encoder by itself
        if _kind(module) in seeing and not hasattr(module, ATTRIBUTE):
            setattr(module, ATTRIBUTE, None)


def _kind(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)


def _cutting(part: nn.Module) -> nn.Module | None:
    """The module that makes tokens from images, in a part with its own embeddings: a convolution, or the embeddings."""
    embeddings = getattr(part, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        return None
    if _kind(part) == "siglip2_vision_model":
        return embeddings
    return next((module for module in embeddings.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)), None)


def _draw_masks_for_pooling(part: nn.Module) -> None:
    """Give a pooling head that uses torch's attention a config of its own, so that it gets an ordinary mask."""
    head = getattr(part, "head", None)
    if head is not None and hasattr(head, "config"):
        head.config = copy.copy(head.config)
        head.config._attn_implementation = "sdpa"


def names_patches(text: str) -> bool:
    """Whether the text of a pattern leaves the grid to the model."""
    return "{" in text


def reads_none(module: nn.Module) -> bool:
    """Whether this is attention in a vision model that does not read patches."""
    return getattr(module, ATTRIBUTE, module) is None


def at_home(module: nn.Module, text: str) -> str:
    """The text of a pattern with the grid of the config's images filled in.

    Raises:
        ValueError: the patches of this module are unknown.
    """
    patches = of_module(module, text)
    return patches.of_grid(text, patches.home)


def check(module: nn.Module, text: str) -> None:
    """Raise for a text that is not a pattern of patches for any image size.

    Raises:
        TypeError: arguments of a wrong type, or for other axes.
        ValueError: the patches of this module are unknown; a text that is not a pattern, or one per sample; a pattern
            with another token order.
    """
    patches = of_module(module, text)
    # Images may be larger than the config's; only a forward pass can tell whether a window fits.
    pattern = checked(patches.of_grid(text, tuple(4 * side for side in patches.home)))
    orders = sorted({image.order for image in pattern.placed_images()} - {"raster"})
    if orders:
        raise ValueError(
            f"{text}: the tokens of a vision model are its patches row by row, not in {orders[0]} order: leave "
            "order= out"
        )


def of_module(module: nn.Module, text: str) -> Patches:
    """The patches that a module reads.

    Raises:
        ValueError: they are unknown.
    """
    patches = getattr(module, ATTRIBUTE, None)
    if isinstance(patches, Patches):
        return patches
    name, kind = type(module).__name__, _kind(module)
    if kind in KINDS:
        raise ValueError(
            f"{name} has not been told of its patches yet: call sparseflash.integrations.transformers.use_pattern("
            "model, ...), or the model once before it is compiled"
        )
    raise ValueError(
        f"{text} names the patches of an image, which are known of {', '.join(KINDS)}; {name} is of {kind!r}. Of a "
        "model of text and images give the part that sees, as use_pattern(model.vision_model, ...); of another one "
        "write the shape, as beside(neighborhood((14, 14), 3), before=1)"
    )
