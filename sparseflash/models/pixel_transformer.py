"""A small transformer over pixels: one pixel is one token, and attention is a pattern.

Shape legend: B images, S sequences of N tokens (one of all pixels for each image, or one of the lit tiles of all
images), C = width of the residual stream, H heads of size D, L lit pixels in the whole batch, K classes.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparseflash.functional.attention import Mask, attention
from sparseflash.models.config import PixelTransformerConfig
from sparseflash.models.files import load_model, loaded, save_model
from sparseflash.models.json_config import LayerShape
from sparseflash.models.key_gate import KeyGate, opened
from sparseflash.models.tokens import Canvas, Tokens, compiled
from sparseflash.patterns import BlockMask
from sparseflash.rotary import rotate

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


class PixelOutput(NamedTuple):
    """What a `PixelTransformer` returns.

    Attributes:
        logits: [B, K] scores of the classes of each image.
        dense_logits: [L, K'] scores for each lit pixel; None without a dense head. If ranks share the images, only for
            the pixels of this rank.
        dense_pixels: [L] flat indices of these pixels into the images [B, height, width]; None without a dense head.
    """

    logits: Tensor
    dense_logits: Tensor | None
    dense_pixels: Tensor | None


class GreyEmbedding(nn.Module):
    """Grey values 0..255 -> vectors, linear between learned anchors.

    Black has its own anchor: attention learns slowly from zero vectors, and black means something else than very dark.
    """

    lower: Tensor
    upper: Tensor
    share: Tensor

    def __init__(self, levels: int, width: int) -> None:
        super().__init__()
        # Anchor 0 is black; grey values 1..255 spread over anchors 1..levels.
        place = 1 + torch.linspace(0, levels - 1, 255)
        lower = place.long().clamp(max=levels - 1)
        self.register_buffer("lower", F.pad(lower, (1, 0)), persistent=False)
        self.register_buffer("upper", F.pad(lower + 1, (1, 0)), persistent=False)
        self.register_buffer("share", F.pad(place - lower, (1, 0))[:, None], persistent=False)
        self.anchors = nn.Parameter(torch.randn(levels + 1, width))

    def forward(self, grey: Tensor) -> Tensor:
        """Uint8 [S, N] -> float32 [S, N, C]."""
        # Elementwise, so that autocast leaves the residual stream in float32.
        table = torch.lerp(self.anchors[self.lower], self.anchors[self.upper], self.share)
        return F.embedding(grey.int(), table)


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    Args:
        config: the shape of the model.
        gated: whether scores depend on the grey value of the key, see `KeyGate`.

    Attributes:
        attend: `sparseflash.attention`, or a replacement for comparisons: (q, k, v, mask) -> out.
    """

    attend: Attend

    def __init__(self, config: LayerShape, gated: bool = False) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attend = attention
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, width)
        for linear in (self.attention_out, self.mlp_out):
            # The residual stream sums 2 * layers such terms.
            nn.init.normal_(linear.weight, std=1 / math.sqrt(2 * config.layers * linear.in_features))
        nn.init.zeros_(self.mlp_out.bias)
        self.key_gate = KeyGate(config.heads) if gated else None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, grey: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [S, H, N, D] each, of tokens [S, N, C]; gated ones of D + 8, values of D."""
        q, k, v = rearrange(self.qkv(self.attention_norm(x)), "s n (three h d) -> three s h n d", three=3, h=self.heads)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.key_gate is not None:
            assert grey is not None
            q, k = self.key_gate(q, k, grey)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        mask: Mask,
        cos: Tensor,
        sin: Tensor,
        grey: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """[S, N, C] -> [S, N, C]; grey values uint8 [S, N] if keys are gated; ``attend`` is used for this call only."""
        q, k, v = self.project(x, cos, sin, grey)
        # The CPU backend computes half precision in float32 internally; autocast would round again.
        with torch.autocast(x.device.type, enabled=False):
            seen = (attend or self.attend)(q, k, v, mask)
        x = x + self.attention_out(rearrange(seen, "s h n d -> s n (h d)"))
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))
        return x


class PixelTransformer(nn.Module):
    """Classifies grey images by attention alone, with one token for each pixel and no convolution.

    The readout is the mean over lit pixels: in a 256 x 256 Pathfinder image 1.7 % of the pixels are lit, and a mean
    over all of them dilutes the signal 60-fold. The weights are independent of image size, token order and pattern, so
    training can move from small to large images, or from lit tiles to all pixels.

    Args:
        config: the shape of the model.

    Attributes:
        activation_checkpointing: recompute each layer in the backward instead of keeping its activations; off by
            default. For 65,536 tokens on small machines.

    Example:
        >>> import torch
        >>> model = PixelTransformer(PixelTransformerConfig(pattern="local(16)", block=(16, 16), width=16, layers=1))
        >>> model(torch.zeros(2, 16, 16, dtype=torch.uint8)).logits.shape
        torch.Size([2, 2])
    """

    def __init__(self, config: PixelTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = GreyEmbedding(config.grey_levels, config.width)
        self.layers = nn.ModuleList(Layer(config, config.key_gate) for _ in range(1 if config.tied else config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.classes)
        self.dense_head = nn.Linear(config.width, config.dense_classes) if config.dense_classes else None
        self._canvases: dict[tuple[tuple[int, int], torch.device], Canvas] = {}

    def masks(self, shape: tuple[int, int]) -> tuple[BlockMask, ...]:
        """The compiled mask of each layer over all pixels of (height, width) images.

        Raises:
            ValueError: an image size that does not suit the order, the tiles or a pattern.
        """
        return compiled(self.config, shape)

    def forward(
        self,
        images: Tensor,
        masks: Sequence[Mask] | None = None,
        tokens: str | None = None,
        mesh: "DeviceMesh | None" = None,
    ) -> PixelOutput:
        """Classify images.

        Args:
            images: uint8 [B, height, width].
            masks: the mask of each layer, in place of the config's patterns: any mask for `sparseflash.attention`, in
                token order.
            tokens: which pixels are tokens, one of "all", "lit_tiles" and "lit_pixels", in place of the config. A model
                of lit pixels gives other answers over all pixels, see `over_all_pixels`.
            mesh: a DeviceMesh of one dim whose ranks share the tokens of these images, which are equal on all ranks. A
                collective: every rank calls.

        Returns:
            Logits of the images and, with a dense head, of their lit pixels.

        Raises:
            ValueError: images of another rank or dtype, a number of masks that is not the number of layers, or tokens
                that ranks cannot share.
        """
        if images.ndim != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 [B, height, width]; got {images.dtype} {list(images.shape)}")
        chosen = self.tokens(images, tokens)
        masks = chosen.masks if masks is None else masks
        if len(masks) != self.config.layers:
            raise ValueError(f"masks must be one for each of the {self.config.layers} layers; got {len(masks)}")

        attend: Attend | None = None
        if mesh is not None:
            from sparseflash.models.sharing import shared

            chosen, attend = shared(chosen, masks, mesh)

        grey = images.flatten()[chosen.place]
        x = self.embedding(grey)
        for number, mask in enumerate(masks):
            layer = self.layers[0 if self.config.tied else number]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(layer, x, mask, chosen.cos, chosen.sin, grey, attend, use_reentrant=False))
            else:
                x = layer(x, mask, chosen.cos, chosen.sin, grey, attend)

        readable = self._read(images)  # [B, height, width]; all of them are tokens
        read = readable.flatten()[chosen.place]  # [S, N]
        lit = self.norm(x[read])  # [L, C]
        pixels = chosen.place[read]  # [L]
        image = pixels // images[0].numel()
        total = lit.new_zeros(len(images), lit.shape[1]).index_add(0, image, lit)
        if mesh is not None:
            from sparseflash.distributed import summed

            total = summed(total, mesh)
        count = readable.flatten(1).sum(1).clamp(min=1)
        logits = self.head(total / count[:, None])
        if self.dense_head is None:
            return PixelOutput(logits, None, None)
        return PixelOutput(logits, self.dense_head(lit), pixels)

    def tokens(self, images: Tensor, which: str | None = None) -> Tokens:
        """The tokens of images uint8 [B, height, width]; see `forward`."""
        shape = (images.shape[1], images.shape[2])
        key = shape, images.device
        if key not in self._canvases:
            self._canvases[key] = Canvas(self.config, shape, images.device)
        canvas, which = self._canvases[key], self.config.tokens if which is None else which
        if which == "all":
            return canvas.all_pixels(len(images))
        lit = images.flatten(1) > self.config.lit_above
        return canvas.lit_tiles(lit) if which == "lit_tiles" else canvas.lit_pixels(lit)

    def _read(self, images: Tensor) -> Tensor:
        """The pixels [B, height, width] over which the readout averages."""
        lit = images > self.config.lit_above
        if not (reach := self.config.readout_reach):
            return lit
        dark = F.max_pool2d((~lit)[:, None].float(), 2 * reach + 1, stride=1, padding=reach)
        return dark[:, 0] == 0

    def over_all_pixels(self) -> "PixelTransformer":
        """This model of lit pixels as one of all pixels with the same answers: `sparseflash.models.key_gate.opened`.

        Its weights are copies, on the same device and in the same mode. In contrast, `forward` with ``tokens="all"``
        uses the weights unchanged, and weights that were trained on lit pixels only do not ignore dark ones.

        Raises:
            ValueError: a model with other tokens, or with a gate.

        Example:
            >>> import torch
            >>> config = PixelTransformerConfig(
            ...     "neighborhood({shape}, 4, {order})", tokens="lit_pixels", block=(32, 32), width=16, lit_above=9
            ... )
            >>> few = PixelTransformer(config)
            >>> images = torch.randint(0, 20, (2, 16, 16), dtype=torch.uint8)
            >>> torch.allclose(few.over_all_pixels()(images).logits, few(images).logits, atol=1e-5)
            True
        """
        config, weights = opened(self.config, self.state_dict())
        model = PixelTransformer(config)
        model.load_state_dict(weights)
        return model.to(self.head.weight.device).train(self.training)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, which is created if necessary."""
        save_model(Path(folder), self.config.to_json(), self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "PixelTransformer":
        """The model that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder or one of the two files is not there.
            ValueError: a corrupt file, or weights that do not match the config.
        """
        config_text, weights = load_model(Path(folder))
        config = PixelTransformerConfig.from_json(config_text)
        return loaded(lambda: cls(config), weights, Path(folder)).to(device)
