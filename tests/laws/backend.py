"""Which backend the laws run on, and what is small enough for it.

The CPU backend by default. With SPARSEFLASH_TEST_BACKEND=triton the Triton kernels: compiled if there is a GPU (``make
gpu``), else in Triton's interpreter (``make interpreted``), which runs a few thousand scores a second.
"""

from __future__ import annotations

import os

import torch

BACKEND = os.environ.get("SPARSEFLASH_TEST_BACKEND", "cpu")
COMPILED = BACKEND == "triton" and torch.cuda.is_available()
INTERPRETED = BACKEND == "triton" and not COMPILED
DEVICE = "cuda" if COMPILED else "cpu"
# The interpreter computes bf16 products wrongly, silently.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = (16, 32) if INTERPRETED else (16, 32, 64, 128, 256)
DIMS = (16, 24, 40) if INTERPRETED else (16, 24, 32, 64, 72, 128)
