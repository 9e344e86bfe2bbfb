"""What the gallery shows: patterns, each with a sentence and its source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sparseflash import patterns as P
from sparseflash.patterns import Pattern

TOKENS, BLOCK = 1024, 16
IMAGE = (32, 32)  # the tokens of image patterns are its pixels


@dataclass(frozen=True)
class Entry:
    """One picture. ``text`` is the expression, or Python where there is no expression."""

    title: str
    text: str
    sentence: str
    source: str = ""
    python: Pattern | None = None

    @property
    def pattern(self) -> Pattern:
        return self.python if self.python is not None else P.parse(self.text)

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.title.lower()) + ".png"

    @property
    def dark_file(self) -> str:
        return self.file.replace(".png", "-dark.png")


ATTENTION = 'Vaswani et al., "Attention Is All You Need" (2017), section 3'
LONGFORMER = 'Beltagy et al., "Longformer" (2020), section 3.1'
SPARSE_TRANSFORMER = 'Child et al., "Sparse Transformers" (2019), section 4.2'
BIG_BIRD = 'Zaheer et al., "Big Bird" (2020), section 2'
PIXELATED_BUTTERFLY = 'Dao et al., "Pixelated Butterfly" (ICLR 2022), section 3.2'
STAR = 'Guo et al., "Star-Transformer" (2019)'
ALONE = 'Ramachandran et al., "Stand-Alone Self-Attention in Vision Models" (2019), section 3'
NATTEN = "Hassani et al., https://arxiv.org/abs/2204.07143"
SPARSE_VIDEO = "Xi et al., https://arxiv.org/abs/2502.01776, section 4"
JOINT = (
    'Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (2024), section 4: text '
    "and image attend to both"
)

SECTIONS: dict[str, list[Entry]] = {
    "Everything and the past": [
        Entry("full", "full()", "Every query sees every key: dense attention, all blocks full.", ATTENTION),
        Entry("causal", "causal()", "Every query sees itself and what came before.", f"{ATTENTION}.2.3"),
        Entry(
            "prefix",
            "prefix(256)",
            "A prompt that all may read, and a causal continuation.",
            'Raffel et al., "T5" (2020), section 3.2.1',
        ),
    ],
    "Near keys": [
        Entry("local", "local(64)", "A sliding window: keys at most 64 tokens away on either side.", LONGFORMER),
        Entry("causal local", "causal() & local(64)", "The same window of a decoder: only its past half.", LONGFORMER),
        Entry(
            "dilated",
            "dilated(16, 16)",
            "A window with gaps: 16 keys on either side, 16 tokens apart, reach 256 tokens. Nearly all of each stored "
            "block is masked: few pairs, and hardly less time than the window without gaps.",
            LONGFORMER,
        ),
        Entry(
            "streaming",
            "streaming(16, 128)",
            "A decoder's window that keeps the first tokens, the attention sinks, in sight.",
            'Xiao et al., "StreamingLLM" (2023), section 3.2',
        ),
    ],
    "Far keys": [
        Entry(
            "strided",
            "strided(8, unit=16)",
            "Every 8th cell of 16 tokens, counted from the query's own. Cells as large as blocks leave no block "
            "partial.",
            SPARSE_TRANSFORMER,
        ),
        Entry(
            "fixed",
            "fixed(8, 1, unit=16)",
            "The query's own stretch of 8 cells, and the last cell of every stretch as its summary.",
            SPARSE_TRANSFORMER,
        ),
        Entry(
            "butterfly",
            "butterfly(unit=16)",
            "Cell a sees cell b where their numbers differ in at most one bit: log2 n of n cells, and itself. Any two "
            "cells are joined within log2 n layers.",
            PIXELATED_BUTTERFLY,
        ),
        Entry(
            "log sparse",
            "log_sparse()",
            "Keys at distances that are powers of two, token by token, in both directions.",
            'Li et al., "Enhancing the Locality and Breaking the Memory Bottleneck of Transformer on Time Series '
            'Forecasting" (2019), section 4.2',
        ),
        Entry(
            "columns and diagonals",
            "causal() & (columns((0, 1, 300)) | diagonals((0, 1, 2, 200)))",
            "Keys that all later queries see, and keys at a few distances: vertical and slash lines.",
            "Jiang et al., https://arxiv.org/abs/2407.02490, section 3",
        ),
        Entry(
            "global tokens",
            "global_tokens((0, 1, 2, 3, 600))",
            "A few tokens see all and are seen by all.",
            f"{LONGFORMER}; {BIG_BIRD}",
        ),
        Entry(
            "random blocks",
            "random_blocks(4, unit=16)",
            "Four cells drawn at random for each cell of queries, the same ones on every machine.",
            BIG_BIRD,
        ),
    ],
    "Packed documents": [
        Entry("documents", "documents((100, 300, 24, 600))", "Packed documents that do not see each other."),
        Entry(
            "causal documents",
            "causal() & documents((100, 300, 24, 600))",
            "The same for a decoder. Lengths need not be multiples of the block: the edges are exact.",
        ),
        Entry(
            "per sample",
            "per_sample(documents((512, 512)), documents((200, 824))) & causal()",
            "One mask for each sample of a batch, here two samples packed differently.",
        ),
    ],
    "Images": [
        Entry(
            "axial",
            "axial((32, 32))",
            "Pixels of the same row or the same column.",
            'Ho et al., "Axial Attention" (2019)',
        ),
        Entry(
            "neighborhood raster",
            "neighborhood((32, 32), 3)",
            "Pixels at most 3 rows and 3 columns away. Pixels stand row by row: a block is half a row, and touches "
            "many others.",
            ALONE,
        ),
        Entry(
            "neighborhood tile",
            "neighborhood((32, 32), 3, order='tile')",
            "The same pairs of pixels, which stand tile by tile of 8 x 8: a block is a quarter of a tile.",
            ALONE,
        ),
        Entry(
            "neighborhood morton",
            "neighborhood((32, 32), 3, order='morton')",
            "The same pairs of pixels, which stand in Morton order: a block is a patch of 4 x 4, and touches few "
            "others.",
            ALONE,
        ),
        Entry(
            "neighborhood hilbert",
            "neighborhood((32, 32), 3, order='hilbert')",
            "The same pairs of pixels along a Hilbert curve: patches of 4 x 4 again, neighbours in the sequence always "
            "neighbours in the image.",
            ALONE,
        ),
        Entry(
            "neighborhood of a kernel size",
            "neighborhood((32, 32), kernel_size=7, order='tile')",
            "Windows of 7 x 7 pixels that keep their size at the border, as NATTEN defines them.",
            NATTEN,
        ),
        Entry(
            "beside",
            "beside(neighborhood((28, 32), 3), before=128)",
            "128 tokens of text before an image, as in joint attention: they see all and are seen by all.",
            JOINT,
        ),
        Entry(
            "packed",
            "packed(neighborhood((24, 24), 3), beside(neighborhood((16, 16), 3), before=40))",
            "An image, and one with text of its own, packed into one row. The rest of the row is padding, which sees "
            "nothing and is seen by nothing.",
        ),
    ],
    "Videos": [
        Entry(
            "neighborhood of a video",
            "neighborhood((4, 16, 16), kernel_size=(3, 7, 7), is_causal=(True, False, False))",
            "Windows in 4 frames of 16 x 16, causal in time: a frame sees itself and the two before it.",
            NATTEN,
        ),
        Entry(
            "sliding tile",
            "sliding_tile((8, 8, 16), (2, 2, 4), 3)",
            "Tiles of 2 x 2 x 4 see the 3 x 3 x 3 tiles around them. A block is a tile, so every block is seen whole.",
            "Zhang et al., https://arxiv.org/abs/2502.04507, section 3",
        ),
        Entry(
            "spatial",
            "spatial(8, 128)",
            "The own frame of 128 tokens and one on either side; the first frame is seen by all.",
            SPARSE_VIDEO,
        ),
        Entry(
            "temporal",
            "temporal(8, 128, 4)",
            "Places at most 4 apart, in every frame; the first frame is seen by all.",
            SPARSE_VIDEO,
        ),
        Entry(
            "radial",
            "radial(8, 128, narrowest=16)",
            "The farther the frame, the narrower the band: half as wide with each doubling of the distance.",
            "Li et al., https://arxiv.org/abs/2506.19852, section 4, and its published code",
        ),
    ],
    "Published models": [
        Entry(
            "bigbird",
            "bigbird(unit=16)",
            "A window of 3 cells, 2 global cells and 3 random ones for each.",
            f"{BIG_BIRD}, internal construction",
        ),
        Entry(
            "longformer",
            "longformer(128)",
            "A sliding window of 128 tokens, half on either side, and a global first token.",
            LONGFORMER,
        ),
        Entry(
            "sparse transformer strided",
            "sparse_transformer_strided(32)",
            "The 32 tokens before the query and every 32nd before those, in one mask. Counted in tokens, the stride "
            "leaves a diagonal in every second block; counted in cells, as in strided above, it skips most.",
            SPARSE_TRANSFORMER,
        ),
        Entry(
            "sparse transformer fixed",
            "sparse_transformer_fixed(64, 8)",
            "The query's own stretch of 64 tokens so far, and the last 8 tokens of each earlier one.",
            SPARSE_TRANSFORMER,
        ),
        Entry("star", "star()", "Neighbours, and one relay token that joins all.", STAR),
        Entry("star transformer", "star_transformer()", "The same by the model's name.", STAR),
    ],
    "Your own": [
        Entry(
            "local butterfly",
            "local(32) | butterfly(unit=16)",
            "A window for what is near and a butterfly for what is far.",
            f"The butterfly: {PIXELATED_BUTTERFLY}",
        ),
        Entry(
            "causal local butterfly",
            "causal() & (local(64) | butterfly(unit=16))",
            "Patterns combine with `|`, `&`, `-` and `~`.",
        ),
        Entry(
            "difference",
            "(causal() - local(256)) | global_tokens(16)",
            "The far past without the near, and 16 global tokens.",
        ),
        Entry(
            "complement",
            "~local(256)",
            "What a window leaves out.",
        ),
        Entry(
            "per head",
            "per_head(causal() & local(32), causal() & strided(8, unit=16))",
            "One mask for each head: one head looks near, another far.",
            'Child et al., "Sparse Transformers" (2019)',
        ),
        Entry(
            "where",
            "where(lambda q, k: (q - 512) ** 2 + (k - 512) ** 2 < 400**2)",
            "Any predicate of positions, here a disc, exact to the pair.",
            python=P.where(lambda q, k: np.asarray((q - 512) ** 2 + (k - 512) ** 2 < 400**2)),
        ),
        Entry(
            "from blocks",
            "from_blocks(np.arange(64)[:, None] & np.arange(64) == 0, unit=16)",
            "Any array of cells, learned, drawn or, as this one, computed: cells whose numbers share no bit.",
            python=P.from_blocks(np.arange(64)[:, None] & np.arange(64) == 0, unit=16),
        ),
    ],
}


def entries() -> Iterator[Entry]:
    for section in SECTIONS.values():
        yield from section
