"""Vision models: patterns of the patches of an image or a video, with the tokens that are no patches beside them.

The text of a pattern may hold ``{grid}``, the (height, width) of an image in patches or the (frames, height, width) of
a video; ``{frames}`` and ``{tokens_per_frame}`` are those of a video. Such a pattern is for the patches alone: class
and register tokens, which stand before them, see all and are seen by all. It is for the layers that read patches:
whatever else attends in such a model (the predictor and the poolers of V-JEPA 2, the decoder of VideoMAE, the pooling
heads of SigLIP) sees everything.

A forward pass says how large its images are: the convolution that cuts them into patches is watched, or where patches
come cut already (SigLIP 2) their ``spatial_shapes``. So an image of another size than the config's gets its own grid.
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

# By model_type, as of Transformers 5.24: tokens before the patches and the registers, which the config counts.
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
ATTRIBUTE = "block_sparse_patches"  # of a module that attends in a vision model: its Patches; None: it reads no patches


class Patches:
    """The grids of the images that a model reads.

    Attributes:
        special: tokens before the patches.
        home: the grid of the images that the config speaks of.
    """

    def __init__(self, config: Any, cut_before: bool) -> None:
        self.special: int = KINDS[config.model_type] + getattr(config, "num_register_tokens", 0)
        self.home = _of_config(config)
        self._cut_before = cut_before  # and padded: images of several shapes make rows of one length
        self._now: dict[int, tuple[Shape, ...]] = {}  # by thread: the images of the forward pass that runs there
        self._read: dict[int, list[tuple[Shape, ...]]] = {}  # by the number of patches, two at most

    def of_convolution(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Patches were cut, [B, C, height, width] or [B, C, frames, height, width]."""
        shape = tuple(int(side) for side in out.shape[2:])
        self._begin(math.prod(shape), (shape,))

    def of_shapes(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Patches came cut, with the (height, width) of each image, int [B, 2]."""
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{type(module).__name__} is told the shapes of its images as a tensor, which a graph that is being "
                "traced cannot read: call the model without torch.compile, or without a pattern"
            )
        given = dict(zip(("pixel_values", "spatial_shapes"), args, strict=False)) | kwargs
        found = tuple((int(height), int(width)) for height, width in given["spatial_shapes"].tolist())
        self._begin(given["pixel_values"].shape[1], found[:1] if len(set(found)) == 1 else found)

    def end(self, *_: Any) -> None:
        """The images of this forward pass are read."""
        self._now.pop(_thread(), None)

    def _begin(self, patches: int, shapes: tuple[Shape, ...]) -> None:
        self._now[_thread()] = shapes
        if not torch.compiler.is_compiling():
            read = self._read.setdefault(patches, [])
            if shapes not in read[:2]:
                read[1:] = [shapes]

    def written(self, text: str, tokens: int) -> str:
        """The pattern of a layer with so many tokens, for the images of this forward pass.

        Raises:
            ValueError: tokens that are not the patches of these images and the special ones; a layer that is called by
                itself, or recomputed when it is not known for which images.
        """
        shapes = self._shapes(tokens)
        texts = [self.of_grid(text, shape) for shape in shapes]
        if not self._cut_before:
            return texts[0]
        return BETWEEN_SAMPLES.join(f"packed({one})" for one in texts)  # padding behind an image sees nothing

    def of_grid(self, text: str, grid: Shape) -> str:
        """The pattern for images of a grid."""
        # A graph that is being traced knows f-strings of sides, and str not.
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
    """A graph that is traced serves every thread, and reads what it wrote itself."""
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
    """Tell every module that asks for attention in a vision model whether it reads patches, and have these watched.

    Args:
        model: of Transformers, or a part of one.
        readers: its modules that ask for attention.
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
    for module in readers:  # of an encoder by itself nothing is known
        if _kind(module) in seeing and not hasattr(module, ATTRIBUTE):
            setattr(module, ATTRIBUTE, None)


def _kind(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)


def _cutting(part: nn.Module) -> nn.Module | None:
    """What makes tokens of images in a part that has embeddings of its own: a convolution, or all of the embeddings."""
    embeddings = getattr(part, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        return None
    if _kind(part) == "siglip2_vision_model":
        return embeddings
    return next((module for module in embeddings.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)), None)


def _draw_masks_for_pooling(part: nn.Module) -> None:
    """Give a head that pools patches by torch's own attention a config of its own, by which its mask is a plain one."""
    head = getattr(part, "head", None)
    if head is not None and hasattr(head, "config"):
        head.config = copy.copy(head.config)
        head.config._attn_implementation = "sdpa"


def names_patches(text: str) -> bool:
    """Whether the text of a pattern leaves the grid to the model."""
    return "{" in text


def reads_none(module: nn.Module) -> bool:
    """Whether a module attends in a vision model, but not to patches."""
    return getattr(module, ATTRIBUTE, module) is None


def at_home(module: nn.Module, text: str) -> str:
    """The text of a pattern that leaves the grid to the model, for the images that the config speaks of.

    Raises:
        ValueError: nothing is known of the patches that a module reads.
    """
    patches = of_module(module, text)
    return patches.of_grid(text, patches.home)


def check(module: nn.Module, text: str) -> None:
    """Raise for a text that is no pattern of patches, whatever the size of the images.

    Raises:
        TypeError: numbers of another kind, or for other axes.
        ValueError: nothing is known of the patches that a module reads; a text that is no pattern, or one per sample;
            a pattern with tokens in another order than theirs.
    """
    patches = of_module(module, text)
    # Images may be larger than the config says; whether a window fits them a forward pass knows.
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
        ValueError: nothing is known of them.
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
