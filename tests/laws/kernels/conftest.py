"""These tests run the kernels: on a GPU if there is one, else on the CPU in Triton's interpreter.

Triton decides at import whether it interprets, so without a GPU this folder is collected only by a process that was
started with TRITON_INTERPRET=1, as `make interpreted` does.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
