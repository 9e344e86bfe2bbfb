"""A small transformer over bytes or symbols, whose attention is a pattern: the layers of `PixelTransformer` on a line.

Shape legend: B examples of one or two documents, S documents in all, N tokens of the longest one, C = width of the
residual stream, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparseflash.functional.attention import Mask
from sparseflash.models.files import load_model, loaded, save_model
from sparseflash.models.pixel_transformer import Layer
from sparseflash.models.sequence_config import SequenceTransformerConfig
from sparseflash.patterns import BlockMask, Pattern, per_sample
from sparseflash.patterns.grid import Ints
from sparseflash.patterns.interval import Interval
from sparseflash.rotary import rotary_table


class SequenceOutput(NamedTuple):
    """What a `SequenceTransformer` returns.

    Attributes:
        logits: [B, K] scores of the classes of each example.
    """

    logits: Tensor


@dataclass(frozen=True, repr=False)
class Document(Interval):
    """The first ``length`` tokens see each other; later ones see nothing and are not seen."""

    length: int
    name = "document"

    def bounds(self, q: Ints) -> tuple[Ints, Ints]:
        stop = np.full_like(q, self.length)
        return np.where(q < self.length, 0, stop), stop


class SequenceTransformer(nn.Module):
    """Classifies sequences, or pairs of them, by attention alone.

    Positions are rotary, on a line. Documents of a batch may differ in length: padding is masked, so the logits of an
    example do not depend on the rest of the batch (unless the pattern depends on the number of tokens, as
    ``random_blocks`` does). For two documents u and v, which the same weights read separately, the head gets u, v,
    their product and their difference, as in the Long Range Arena
    (``lra_benchmarks/models/layers/common_layers.py``, after Mou et al. 2016).

    Args:
        config: the shape of the model.

    Attributes:
        activation_checkpointing: recompute each layer in the backward instead of keeping its activations.

    Example:
        >>> import torch
        >>> model = SequenceTransformer(SequenceTransformerConfig(symbols=15, pattern="local(16)", layers=1))
        >>> model(torch.tensor([[11, 2, 9, 14, -1], [11, 2, 3, 9, 14]])).logits.shape
        torch.Size([2, 2])
    """

    def __init__(self, config: SequenceTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.symbols, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(1 if config.tied else config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        if config.documents == 1:
            self.head: nn.Module = nn.Linear(config.width, config.classes)
        else:
            pair = nn.Linear(4 * config.width, config.mlp_width), nn.Linear(config.mlp_width, config.classes)
            self.head = nn.Sequential(pair[0], nn.GELU(approximate="tanh"), pair[1])
        self._turns: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def masks(self, lengths: Sequence[int], tokens: int) -> tuple[BlockMask, ...]:
        """The compiled mask of each layer for documents of these lengths, each padded to this many tokens."""
        return _compiled(self.config, tuple(lengths), tokens)

    def forward(self, tokens: Tensor) -> SequenceOutput:
        """Classify examples.

        Args:
            tokens: int [B, N], or [B, 2, N] if an example is two documents; -1 after the end of a document.

        Raises:
            ValueError: tokens of another shape or dtype, an empty document, or a token that is not a symbol.
        """
        per_example = self.config.documents
        if tokens.dtype.is_floating_point or tokens.ndim != (2 if per_example == 1 else 3):
            raise ValueError(
                f"tokens must be int [B, {'' if per_example == 1 else '2, '}N]; got {tokens.dtype} {list(tokens.shape)}"
            )
        if per_example == 2 and tokens.shape[1] != 2:
            raise ValueError(f"an example must have 2 documents; got {list(tokens.shape)}")
        flat = tokens.reshape(-1, tokens.shape[-1])  # [S, N]
        there = flat >= 0
        lengths = there.sum(1)
        counts, largest = lengths.tolist(), int(flat.max())
        if min(counts) < 1:
            raise ValueError("a document must have at least one token")
        if largest >= self.config.symbols:
            raise ValueError(f"a token must be below {self.config.symbols}, the model's symbols; got {largest}")
        masks: Sequence[Mask] = self.masks(counts, flat.shape[1])
        cos, sin = self._positions(flat.shape[1], flat.device)

        x = self.embedding(flat.clamp(min=0).int())
        for number, mask in enumerate(masks):
            layer = self.layers[0 if self.config.tied else number]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(layer, x, mask, cos, sin, use_reentrant=False))
            else:
                x = layer(x, mask, cos, sin)

        if self.config.readout == "first":
            read = self.norm(x[:, 0])
        else:
            read = (self.norm(x) * there[..., None]).sum(1) / lengths[:, None]
        if per_example == 1:
            return SequenceOutput(self.head(read))
        u, v = read.view(-1, 2, read.shape[-1]).unbind(1)
        return SequenceOutput(self.head(torch.cat([u, v, u * v, u - v], -1)))

    def _positions(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = tokens, device
        if key not in self._turns:
            cos, sin = rotary_table(np.arange(tokens), self.config.head_dim, self.config.rotary_base)
            self._turns[key] = cos.to(device), sin.to(device)
        return self._turns[key]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, which is created if necessary."""
        save_model(Path(folder), self.config.to_json(), self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "SequenceTransformer":
        """The model that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder or one of the two files is not there.
            ValueError: a corrupt file, or weights that do not match the config.
        """
        config_text, weights = load_model(Path(folder))
        config = SequenceTransformerConfig.from_json(config_text)
        return loaded(lambda: cls(config), weights, Path(folder)).to(device)


@lru_cache(maxsize=16)
def _compiled(config: SequenceTransformerConfig, lengths: tuple[int, ...], tokens: int) -> tuple[BlockMask, ...]:
    found: dict[Pattern, BlockMask] = {}
    patterns = config.patterns()
    for pattern in set(patterns):
        cut = [pattern & Document(length) for length in lengths]
        wanted = pattern if min(lengths) == tokens else per_sample(*cut)
        found[pattern] = wanted.compile(tokens, block=config.block)
    return tuple(found[pattern] for pattern in patterns)
