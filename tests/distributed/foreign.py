"""What ranks run inside of torch's own context_parallel; imported once, before they are forked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental import context_parallel

import sparseflash as sf
from sparseflash import flex
from sparseflash import patterns as P
from sparseflash.distributed import context_parallel_attention
from tests.distributed.programs import line

TOKENS = 256
MASK = P.causal().compile(TOKENS, block=16)


def whole() -> torch.Tensor:
    return torch.randn(1, 2, TOKENS, 16, generator=torch.Generator().manual_seed(0))


compiled = torch.compile(lambda x: sf.attention(x, x, x, "causal()"), backend="eager", fullgraph=True)
CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "attention": lambda x: sf.attention(x, x, x, P.causal()),
    "decode": lambda x: sf.decode(x[:, :, :1], x, x, P.causal(), lengths=x.shape[2]),
    "module": lambda x: sf.SparseAttention(32, 2, P.causal())(x.transpose(1, 2).flatten(2)),
    "flex": lambda x: flex.flex_attention(x, x, x),
    "context_parallel_attention": lambda x: context_parallel_attention(x, x, x, MASK, line()),
    "compiled outside": compiled,
}  # fmt: skip


def inside(name: str) -> tuple[int, str]:
    """The tokens of this rank inside the context, and what the call there says; afterwards it works as before."""
    x, before = whole(), None
    if name == "compiled outside":
        before = compiled(x)
    with context_parallel(line(), buffers=[x], buffer_seq_dims=[2]):
        try:
            CALLS[name](x)
            said = "nothing"
        except (ValueError, RuntimeError) as error:  # of a compiled function, torch's error around ours
            said = str(error)
        shard = x.shape[2]
    if name != "context_parallel_attention":
        after = CALLS[name](x)
        assert before is None or torch.equal(before, after)
    return shard, said


def model_inside() -> str:
    from tests.integrations.batches import ids, model

    made, tokens, at = (
        model("llama", block_sparse_pattern="local(8)"),
        ids(1, TOKENS // 2),
        torch.arange(TOKENS // 2)[None],
    )
    with torch.no_grad(), context_parallel(line(), buffers=[tokens, at], buffer_seq_dims=[1, 1]):
        try:
            made(tokens, position_ids=at, use_cache=False)
        except ValueError as error:
            return str(error)
    return "nothing"


def model_on_a_shard(head_and_tail: bool) -> str:
    """Each rank calls a model on its tokens and their positions in the whole sequence, and nothing else tells."""
    from tests.integrations.batches import ids, model

    made, tokens = model("llama", block_sparse_pattern="local(8)"), ids(1, 64)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    positions = torch.arange(64).chunk(2 * ranks if head_and_tail else ranks)
    mine = torch.cat([positions[rank], positions[-1 - rank]]) if head_and_tail else positions[rank]
    with torch.no_grad():
        try:
            made(tokens[:, mine], position_ids=mine[None], use_cache=False)
        except ValueError as error:
            return str(error)
    return "nothing"
