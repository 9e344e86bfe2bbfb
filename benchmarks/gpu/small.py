"""A small sweep of calls for tools that look at every access: ``compute-sanitizer python -m benchmarks.gpu.small``.

Outputs are not looked at here; every kernel runs, with ragged lengths, whole and cut lines, with and without features.
"""

from __future__ import annotations

import sys

import torch

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.patterns import Pattern

PATTERNS: tuple[Pattern, ...] = (
    P.causal(),
    P.local(20) | P.global_tokens(3),
    P.documents([50, 1, 200]) & P.causal(),
    P.random_blocks(1, unit=32),
)


HEAD_DIMS = (40, 64, 128)


def sweep(device: torch.device, head_dims: tuple[int, ...] = HEAD_DIMS, blocks: tuple[int, ...] = (32, 128)) -> int:
    """How many calls were made, each forward and backward."""
    dtypes = (torch.bfloat16, torch.float32)
    calls = 0
    for D in head_dims:
        for dtype in dtypes:
            for number, pattern in enumerate(PATTERNS):
                block = blocks[number % len(blocks)]
                # Few heads: a tool that looks for races slows a kernel down by orders of magnitude.
                q = torch.randn(1, 2, 193, D, device=device, dtype=dtype, requires_grad=True)
                k, v = (torch.randn(1, 1, 193, D, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
                mask = pattern.compile(193, block=block)
                features = {"softcap": 5.0, "dropout_p": 0.1, "seed": 1} if number == 1 else {}
                out, lse = sf.attention(q, k, v, mask, return_lse=True, **features)  # type: ignore[call-overload]
                torch.autograd.backward((out, lse), (torch.randn_like(out), torch.randn_like(lse)))
                with torch.no_grad():
                    sf.decode(q[:, :, :3], k, v, pattern if number != 3 else None, lengths=150)
                calls += 1
    chosen = torch.randint(0, 4, (1, 1, 4, 2), device=device)
    table = sf.LookupTable.from_indices(chosen, shape=250, block=64, q_heads=2, causal=True)
    q, k = (torch.randn(1, h, 250, 64, device=device, requires_grad=True) for h in (2, 1))
    sf.attention(q, k, k, table).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls + 1


if __name__ == "__main__":
    # Head dims, if not all of them: to look for races takes far longer than to look at addresses.
    print(f"{sweep(torch.device('cuda'), tuple(map(int, sys.argv[1:])) or HEAD_DIMS)} calls, forward and backward")
