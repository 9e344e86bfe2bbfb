"""Which models take the steps: the rows of the FlashAttention paper, and Path-256.

Dao et al. (2022), "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", section 4: BERT-large
at 512 tokens, GPT-2 small and medium at 1,024 and longer, the Long Range Arena at 1,024 to 4,096, Path-256 at 65,536.
Batch sizes are ours. The small versions keep the lengths, Path-256 excepted, and have fewer and narrower layers.
"""

from __future__ import annotations

from dataclasses import dataclass

# A window of a block either way and a flat butterfly, the fixed sparsity of that paper's block-sparse rows.
FINE, COARSE = "local(64) | butterfly(unit=64)", "local(128) | butterfly(unit=128)"
TILES = "neighborhood({shape}, (2, 1))"  # the preset's: tiles of 8 x 16 pixels see those around them


@dataclass(frozen=True)
class Setting:
    """One model and one batch."""

    model: str
    family: str  # gpt2, bert (masked language model), lra (a classifier of sequences), path256
    tokens: int
    batch: int
    layers: int
    width: int
    heads: int
    pattern: str
    block: int
    vocabulary: int = 1024


FULL = (
    Setting("GPT-2 small", "gpt2", 1024, 16, 12, 768, 12, FINE, 64, 50257),
    Setting("GPT-2 medium", "gpt2", 1024, 8, 24, 1024, 16, FINE, 64, 50257),
    Setting("GPT-2 small, 4,096 tokens", "gpt2", 4096, 2, 12, 768, 12, COARSE, 128, 50257),
    Setting("BERT-large", "bert", 512, 16, 24, 1024, 16, FINE, 64, 30522),
    Setting("LRA Image, Pathfinder", "lra", 1024, 64, 2, 64, 2, FINE, 64, 256),
    Setting("LRA ListOps", "lra", 2048, 32, 2, 64, 2, FINE, 64, 256),
    Setting("LRA Text, Retrieval", "lra", 4096, 32, 2, 64, 2, COARSE, 128, 256),
    Setting("Path-256", "path256", 65536, 4, 10, 128, 2, TILES, 128),
)
SMALL = (
    Setting("GPT-2 small", "gpt2", 1024, 1, 2, 192, 3, FINE, 64),
    Setting("GPT-2 medium", "gpt2", 1024, 1, 4, 256, 4, FINE, 64),
    Setting("GPT-2 small, 4,096 tokens", "gpt2", 4096, 1, 2, 192, 3, COARSE, 128),
    Setting("BERT-large", "bert", 512, 2, 4, 256, 4, FINE, 64),
    Setting("LRA Image, Pathfinder", "lra", 1024, 2, 2, 64, 2, FINE, 64, 256),
    Setting("LRA ListOps", "lra", 2048, 1, 2, 64, 2, FINE, 64, 256),
    Setting("LRA Text, Retrieval", "lra", 4096, 1, 2, 64, 2, COARSE, 128, 256),
    Setting("Path-256", "path256", 4096, 1, 2, 128, 2, TILES, 128),
)
