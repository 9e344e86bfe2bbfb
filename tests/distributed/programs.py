"""What ranks run in tests; imported once, before they are forked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # imported by the first call otherwise, by each rank for itself
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sparseflash import lookup
from sparseflash import patterns as P
from sparseflash.distributed import Sharding, context_parallel_attention
from sparseflash.distributed.sharding import Partition
from sparseflash.patterns import BlockMask, Pattern
from tests.oracle import Case, check, random_case, random_features


@dataclass(frozen=True)
class Call:
    """One call of attention, whole."""

    pattern: Pattern
    q_len: int = 300
    kv_len: int | None = None
    block: tuple[int, int] = (16, 16)
    q_offset: int | None = None
    batch: int = 1
    heads: int = 1
    group: int = 1
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    partition: Partition = "weight"
    features: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    used: str = "out, lse"  # by the loss

    def mask(self) -> BlockMask:
        return self.pattern.compile((self.q_len, self.kv_len or self.q_len), block=self.block, q_offset=self.q_offset)

    def case(self) -> Case:
        sizes = self.batch, self.heads, self.group, self.q_len, self.kv_len or self.q_len
        case = random_case(self.seed, *sizes, *self.dims, self.dtype)
        case = replace(random_features(case, self.seed, **dict(self.features)), q_offset=self.q_offset)
        unused = {f"d{x}": 0 * getattr(case, f"d{x}") for x in ("out", "lse") if x not in self.used}
        return replace(case, **unused)


@lru_cache
def line() -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("context",))


def shardings(call: Call, mask: BlockMask, ranks: int) -> tuple[Sharding, Sharding]:
    queries = Sharding.of(mask, ranks, call.partition)
    return queries, queries if mask.shape[0] == mask.shape[1] else Sharding.of(mask, ranks, "contiguous", axis="k")


def attend(call: Call, recompute: bool = False) -> list[torch.Tensor]:
    """out, lse and gradients of the whole sequence, computed by all ranks together, on each of them."""
    mesh = line()
    mask, case = call.mask(), call.case()
    rank = mesh.get_local_rank()
    queries, keys = shardings(call, mask, mesh.size())
    of = [queries, keys, keys]
    q, k, v = leaves = [
        s.shard(x, rank, 2).detach().requires_grad_() for s, x in zip(of, (case.q, case.k, case.v), strict=True)
    ]
    sinks = None if case.features.sinks is None else case.features.sinks.clone().requires_grad_()

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = case.features.arguments(sinks)
        return context_parallel_attention(
            q, k, v, mask, mesh, sharding=call.partition, scale=case.scale, return_lse=True, **arguments
        )

    out, lse = checkpoint(attention, q, k, v, use_reentrant=False) if recompute else attention(q, k, v)
    cotangents = [queries.shard(x, rank, 2) for x in (case.dout, case.dlse.to(lse.dtype))]
    roots = [x for x, name in zip(((out, cotangents[0]), (lse, cotangents[1])), ("out", "lse"), strict=True)
             if name in call.used]  # fmt: skip
    torch.autograd.backward([x for x, _ in roots], [cotangent for _, cotangent in roots])
    results = [queries.gather(x, mesh, 2) for x in (out, lse)]
    for sharding, leaf in zip(of, leaves, strict=True):
        assert leaf.grad is not None
        results.append(sharding.gather(leaf.grad, mesh, 2))
    if sinks is not None:
        assert sinks.grad is not None
        dist.all_reduce(sinks.grad, group=mesh.get_group())
        results.append(sinks.grad)
    return results


def compare(call: Call) -> None:
    """Equal to dense attention in one process, within the tolerance that oracle.py derives; a rerun bit for bit."""
    results = attend(call)
    if line().get_local_rank() == 0:
        check(call.case(), torch.from_numpy(call.mask().to_dense()), results)


def rerun(call: Call, recompute: bool = False) -> None:
    for first, again in zip(attend(call), attend(call, recompute), strict=True):
        assert torch.equal(first, again)


class Counter(TorchDispatchMode):
    """Bytes that this rank receives from others, by what torch is really asked to move."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.collectives: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            output = args[0]
            if output.dtype != torch.uint8:  # what the ranks tell each other beforehand
                ranks, rank = dist.get_world_size(), dist.get_rank()
                if "alltoall_base" in func.__name__:
                    splits = args[3]
                    assert splits[rank] == 0, "nothing goes from a rank to itself"
                    share = sum(splits) / max(len(output), 1)
                else:
                    assert "_allgather_base" in func.__name__, f"{func} is not counted"
                    share = (ranks - 1) / ranks
                self.bytes += round(output.nbytes * share)
                self.collectives.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def count(call: Call) -> tuple[int, int, set[str]]:
    """Bytes received in the forward and in the backward pass, and the collectives of the forward pass."""
    mask, case = call.mask(), call.case()
    mesh = line()
    queries, keys = shardings(call, mask, mesh.size())
    rank = mesh.get_local_rank()
    q = queries.shard(case.q, rank, 2).requires_grad_()
    k, v = (keys.shard(x, rank, 2).requires_grad_() for x in (case.k, case.v))
    with Counter() as forward:
        out, lse = context_parallel_attention(q, k, v, mask, mesh, sharding=call.partition, return_lse=True)
    with Counter() as backward:
        (out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
    return forward.bytes, backward.bytes, forward.collectives


def fail(what: str) -> None:
    """A call that is wrong on the last rank, or on all; every rank has to raise."""
    mesh, rank, last = line(), dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
    mask = P.causal().compile(300, block=16)
    sharding = Sharding.of(mask, mesh.size())
    x = torch.zeros(1, 2, sharding.lengths[rank], 16)
    arguments: dict[str, Any] = {"q": x, "k": x, "v": x, "mask": mask, "mesh": mesh}
    if what == "shard":
        arguments |= {"q": x[:, :, 1:]} if last else {}
    elif what == "batch":
        arguments |= dict.fromkeys("qkv", x.repeat(2, 1, 1, 1)) if last else {}
    elif what == "mask":
        arguments |= {"mask": P.local(30).compile(300, block=16)} if last else {}
    elif what == "no tensor":
        arguments |= {"q": None} if last else {}
    elif what == "option":
        arguments |= {"softcap": 2.0} if last else {}
    elif what == "partition":
        arguments |= {"sharding": "contiguous"} if last else {}
    elif what == "gradient":
        arguments |= {"q": x.clone().requires_grad_()} if last else {}
    elif what == "length":
        arguments |= {"mask": P.causal().compile(301, block=16), "sharding": sharding}
    elif what == "ranks":
        arguments |= {"sharding": Sharding.of(mask, mesh.size() + 1)}
    elif what == "few cells":
        arguments |= {"mask": P.causal().compile(100)}
    elif what == "table":
        arguments |= {"mask": lookup(mask)}
    elif what == "pattern":
        arguments |= {"mask": P.causal()}
    elif what == "seed":
        arguments |= {"dropout_p": 0.5}
    elif what == "mesh":
        arguments |= {"mesh": init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("data", "context"))}
    elif what == "no mesh":
        arguments |= {"mesh": dist.group.WORLD}
    elif what == "softcap":
        arguments |= {"softcap": -1.0}
    elif what == "grad":
        torch.func.grad(lambda x: context_parallel_attention(**arguments | {"q": x}).sum())(x)
    elif what == "tangent":
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x) if last else x
            context_parallel_attention(**arguments | {"q": dual})
    context_parallel_attention(**arguments)
