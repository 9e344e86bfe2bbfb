"""Vision models: patterns over the patches of an image or a video, with class and register tokens beside them.

The text of a pattern may contain ``{grid}``, the (height, width) of an image in patches or the (frames, height, width)
of a video, and for videos ``{frames}`` and ``{tokens_per_frame}``. Such a pattern is over the patches alone: class and
register tokens, which come first, see all and are seen by all. It applies to the layers that read patches: other
attention in such a model (the predictor and the poolers of V-JEPA 2, the decoder of VideoMAE, the pooling heads of
SigLIP) sees everything.

The grid is taken from each forward pass, by a hook on the convolution that makes the patches, or from the
``spatial_shapes`` of a model that takes patches as inputs (SigLIP 2). So images of any size get their own grid.
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

# By model_type, as of Transformers 5.24: tokens before the patches, without registers, whose number is in the config.
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
ATTRIBUTE = "block_sparse_patches"  # of an attention module of a vision model: its Patches; None: it reads no patches


class Patches:
    """The grids of the images that a model reads.

    Attributes:
        special: tokens before the patches.
        home: the grid of images of the config's size.
    """

    def __init__(self, config: Any, cut_before: bool) -> None:
        self.special: int = KINDS[config.model_type] + getattr(config, "num_register_tokens", 0)
        self.home = _of_config(config)
        self._cut_before = cut_before  # patches are inputs, padded to one length for images of several shapes
        self._now: dict[int, tuple[Shape, ...]] = {}  # by thread: the images of the running forward pass
        self._read: dict[int, list[tuple[Shape, ...]]] = {}  # by the number of patches, two at most

    def of_convolution(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """The hook after the convolution: out is [B, C, height, width] or [B, C, frames, height, width]."""
        shape = tuple(int(side) for side in out.shape[2:])
        self._begin(math.prod(shape), (shape,))

    def of_shapes(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before embeddings that take patches and the (height, width) of each image, int [B, 2]."""
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{type(module).__name__} gets the shapes of its images in a tensor, which a traced graph cannot read: "
                "call the model without torch.compile, or without a pattern"
            )
        given = dict(zip(("pixel_values", "spatial_shapes"), args, strict=False)) | kwargs
        found = tuple((int(height), int(width)) for height, width in given["spatial_shapes"].tolist())
        self._begin(given["pixel_values"].shape[1], found[:1] if len(set(found)) == 1 else found)

    def end(self, *_: Any) -> None:
        """The hook after the forward pass."""
        self._now.pop(_thread(), None)

    def _begin(self, patches: int, shapes: tuple[Shape, ...]) -> None:
        self._now[_thread()] = shapes
        if not torch.compiler.is_compiling():
            read = self._read.setdefault(patches, [])
            if shapes not in read[:2]:
                read[1:] = [shapes]

    def written(self, text: str, tokens: int) -> str:
        """The pattern of a layer with ``tokens`` tokens, for the images of this forward pass.

        Raises:
            ValueError: another number of tokens than these images have; a layer that is called by itself, or recomputed
                in the backward pass after images of several shapes.
        """
        shapes = self._shapes(tokens)
        texts = [self.of_grid(text, shape) for shape in shapes]
        if not self._cut_before:
            return texts[0]
        return BETWEEN_SAMPLES.join(f"packed({one})" for one in texts)  # padding after an image sees nothing

    def of_grid(self, text: str, grid: Shape) -> str:
        """The pattern for images of a grid."""
        # Dynamo traces f-strings of symbolic sizes, but not str().
        filled = text.replace("{grid}", f"({', '.join([f'{side}' for side in grid])})")
        if len(grid) == 3:
            for name, number in zip(OF_VIDEO, (grid[0], grid[1] * grid[2]), strict=True):
                filled = filled.replace(name, f"{number}")
        elif any(name in text for name in OF_VIDEO):
            raise ValueError(
                f"{text}: {' and '.join(OF_VIDEO)} are for videos; for the patches of an image use {{grid}}"
            )
        if "{" in filled:
            raise ValueError(
                f"{text}: a model fills in only {{grid}}, {' and '.join(OF_VIDEO)}; use {{grid}} for its patches"
            )
        return f"beside({filled}, {self.special})" if self.special else filled

    def _shapes(self, tokens: int) -> tuple[Shape, ...]:
        patches = tokens - self.special
        found = self._now.get(_thread(), ())
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # recomputed in a backward
            read = self._read.get(patches, [])
            if len(read) > 1:
                raise ValueError(
                    f"gradient checkpointing recomputes a layer of {patches:,} patches, and this model has read images "
                    f"of {_listed(read)}: train without checkpointing, or on images of one shape"
                )
            found = read[0] if read else ()
        if not found:
            raise ValueError(
                "a pattern with {grid} needs the images of the same forward pass: call, or compile, the whole model, "
                "or write the shape in place of {grid}"
            )
        if not self._fits(found, patches):
            raise ValueError(
                f"a layer has {tokens:,} tokens, but the image or video has {_listed([found])} patches, with "
                f"{self.special} tokens before them: a model that leaves out patches (bool_masked_pos) cannot use a "
                "pattern with {grid}; use_pattern(model, None) lets it see everything"
            )
        return found

    def _fits(self, shapes: tuple[Shape, ...], patches: int) -> bool:
        most = max(map(math.prod, shapes))
        return most <= patches if self._cut_before else most == patches


def _listed(read: Collection[tuple[Shape, ...]]) -> str:
    return " and of ".join(sorted(" x ".join(map(str, shapes[0])) for shapes in read))


def _thread() -> int:
    """The key of the running forward pass: the thread, or 0 while tracing, since a graph serves every thread."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _of_config(config: Any) -> Shape:
    if (number := getattr(config, "num_patches", None)) is not None:  # SigLIP 2: of a square
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
    """Mark every attention module of a vision model by whether it reads patches, and install the hooks for their grid.

    Args:
        model: of Transformers, or a part of one.
        readers: its modules that call our attention.
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
    for module in readers:  # without embeddings (an encoder by itself) modules stay unmarked
        if _kind(module) in seeing and not hasattr(module, ATTRIBUTE):
            setattr(module, ATTRIBUTE, None)


def _kind(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)


def _cutting(part: nn.Module) -> nn.Module | None:
    """The module to hook in a part with embeddings: the convolution that makes patches, or all of the embeddings."""
    embeddings = getattr(part, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        return None
    if _kind(part) == "siglip2_vision_model":
        return embeddings
    return next((module for module in embeddings.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)), None)


def _draw_masks_for_pooling(part: nn.Module) -> None:
    """Give a pooling head that uses torch's own attention a copy of the config with sdpa, for an ordinary mask."""
    head = getattr(part, "head", None)
    if head is not None and hasattr(head, "config"):
        head.config = copy.copy(head.config)
        head.config._attn_implementation = "sdpa"


def names_patches(text: str) -> bool:
    """Whether the text of a pattern has a ``{grid}`` or another entry that the model fills in."""
    return "{" in text


def reads_none(module: nn.Module) -> bool:
    """Whether a module is attention of a vision model that does not read patches."""
    return getattr(module, ATTRIBUTE, module) is None


def at_home(module: nn.Module, text: str) -> str:
    """The text of a pattern with its ``{grid}`` filled in for images of the config's size.

    Raises:
        ValueError: the patches that the module reads are unknown.
    """
    patches = of_module(module, text)
    return patches.of_grid(text, patches.home)


def check(module: nn.Module, text: str) -> None:
    """Raise for a text that is not a pattern of patches for any size of images.

    Raises:
        TypeError: arguments of the wrong type or number of axes.
        ValueError: the patches that the module reads are unknown; a text that is not a pattern, or one per sample; a
            pattern with tokens in another order than row by row.
    """
    patches = of_module(module, text)
    # Images may be larger than the config's; whether a window fits is checked in the forward pass.
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
            f"the patches of {name} are not known yet: call sparseflash.integrations.transformers.use_pattern("
            "model, ...), or the model once before it is compiled"
        )
    raise ValueError(
        f"{text} needs the patches of an image, which are supported for {', '.join(KINDS)}; {name} is of {kind!r}. For "
        "a model of text and images give the vision part, as use_pattern(model.vision_model, ...); for any other model "
        "write the shape, as beside(neighborhood((14, 14), 3), before=1)"
    )
