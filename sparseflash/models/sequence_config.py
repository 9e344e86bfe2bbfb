"""The config of a sequence transformer, as data that round-trips through JSON, including the patterns."""

import dataclasses
from typing import ClassVar

from sparseflash.models.json_config import MOST, JsonConfig
from sparseflash.patterns import BlockMask, Pattern, parse
from sparseflash.patterns.grid import BLOCK_SIZES

READOUTS = ("mean", "first")


@dataclasses.dataclass(frozen=True)
class SequenceTransformerConfig(JsonConfig):
    """The shape of a `SequenceTransformer`, independent of length: positions are relative, patterns have no size.

    Attributes:
        symbols: size of the vocabulary: 256 for bytes.
        pattern: the text of the attention pattern: one for all layers, or one per layer.
        block: (BQ, BK) at which patterns are compiled.
        documents: documents per example, 1 or 2; the same weights read both.
        readout: ``"mean"`` over the tokens of a document, or its ``"first"`` token.
        width: size of the residual stream.
        heads: attention heads; the head dim ``width / heads`` must be even.
        layers: number of layers.
        tied: all layers share one set of weights.
        mlp_width: hidden size of the MLP, and of the head for two documents.
        classes: outputs of the classification head.
        rotary_base: plane i of a head of size D rotates by ``rotary_base ** (-2 i / D)`` per token.

    Raises:
        ValueError: a field out of range, or a pattern that does not parse.

    Example:
        >>> config = SequenceTransformerConfig(symbols=15, classes=10, pattern="local(64) | global_tokens(1)")
        >>> SequenceTransformerConfig.from_json(config.to_json()) == config
        True
    """

    symbols: int
    pattern: str | tuple[str, ...] = "full()"
    block: tuple[int, int] = (128, 128)
    documents: int = 1
    readout: str = "mean"
    width: int = 64
    heads: int = 2
    layers: int = 4
    tied: bool = False
    mlp_width: int = 128
    classes: int = 2
    rotary_base: float = 10_000.0

    # Every symbol is a token; dense losses and key gates are for images only.
    tokens: ClassVar[str] = "all"
    dense_classes: ClassVar[int] = 0
    key_gate: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.pattern, list):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        object.__setattr__(self, "block", tuple(self.block))
        if len(self.block) != 2 or not set(self.block) <= set(BLOCK_SIZES):
            raise ValueError(f"block must be two of {', '.join(map(str, BLOCK_SIZES))}; got {self.block!r}")
        for name in ("width", "heads", "layers", "mlp_width", "classes"):
            if not 1 <= getattr(self, name) <= MOST[name]:
                raise ValueError(f"{name} must be in 1..{MOST[name]:,}; got {getattr(self, name)!r}")
        if not 1 <= self.symbols <= 256:
            raise ValueError(f"symbols must be in 1..256, for a token is a byte; got {self.symbols!r}")
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2; got {self.classes!r}")
        if self.documents not in (1, 2):
            raise ValueError(f"documents must be 1 or 2; got {self.documents!r}")
        if self.readout not in READOUTS:
            raise ValueError(f"readout must be one of {', '.join(READOUTS)}; got {self.readout!r}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width / heads must be an even number; got {self.width!r} and {self.heads!r}")
        if not self.rotary_base > 0:
            raise ValueError(f"rotary_base must be positive; got {self.rotary_base!r}")
        if isinstance(self.pattern, tuple) and len(self.pattern) != self.layers:
            raise ValueError(
                f"pattern must be one expression or one for each of the {self.layers} layers; got {len(self.pattern)}"
            )
        self.patterns()

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.width // self.heads

    def patterns(self) -> tuple[Pattern, ...]:
        """The parsed pattern of each layer."""
        texts = (self.pattern,) * self.layers if isinstance(self.pattern, str) else self.pattern
        parsed = {text: parse(text) for text in set(texts)}
        return tuple(parsed[text] for text in texts)

    def patterns_at(self, size: int) -> tuple[Pattern, ...]:
        """The parsed pattern of each layer, whatever the number of tokens."""
        return self.patterns()

    def masks_at(self, size: int) -> tuple[BlockMask, ...]:
        """The compiled mask of each layer for documents of this many tokens."""
        masks = {pattern: pattern.compile(size, block=self.block) for pattern in set(self.patterns())}
        return tuple(masks[pattern] for pattern in self.patterns())
