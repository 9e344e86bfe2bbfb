"""Attention over a sequence that is sharded over ranks, and sums over it.

Legend: R ranks, S tokens of a rank's shard, L tokens of its own tensors; otherwise the letters of `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparseflash.distributed.exchange import SendRecv, all_ranks_agree, fetch, mesh_group, return_partials
from sparseflash.distributed.plan import Layout, LocalLayout, Plan, local_mask, plan, send_recv_lists
from sparseflash.distributed.sharding import Partition, Sharding
from sparseflash.functional.arguments import parsed
from sparseflash.functional.attention import attend
from sparseflash.functional.call import Call
from sparseflash.functional.operands import check_operands
from sparseflash.functional.transforms import refuse_all
from sparseflash.kernels import sinks as sink_logits
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.described import described
from sparseflash.patterns.pattern import Pattern
from sparseflash.tables.device import per_device
from sparseflash.tables.lookup import lookup
from sparseflash.tables.table import LookupTable


@overload
def context_parallel_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask | Pattern | str, mesh: DeviceMesh, *,
    sharding: Sharding | Partition = "weight", kv_sharding: Sharding | None = None,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, dropout_p: float = 0.0, seed: int | torch.Tensor | None = None,
    return_lse: Literal[False] = False, deterministic: bool = False, backend: str | None = None,
) -> torch.Tensor: ...  # fmt: skip
@overload
def context_parallel_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask | Pattern | str, mesh: DeviceMesh, *,
    sharding: Sharding | Partition = "weight", kv_sharding: Sharding | None = None,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, dropout_p: float = 0.0, seed: int | torch.Tensor | None = None,
    return_lse: Literal[True], deterministic: bool = False, backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@torch.compiler.disable  # type: ignore[untyped-decorator]  # numpy makes the plan on the host
def context_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask | Pattern | str,
    mesh: DeviceMesh,
    *,
    sharding: Sharding | Partition = "weight",
    kv_sharding: Sharding | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`sparseflash.attention` over a sequence that the ranks of a mesh hold in shards.

    A collective: every rank of the mesh calls it with its shard, and runs the backward pass if one does. The mask says
    which key blocks each rank needs. Only those are exchanged; their gradients return to the ranks that hold them, and
    are summed there in the order of ranks. A block row that sees far more keys than others (global tokens) is split:
    every rank computes it over the keys that it holds.

    Args:
        q: [B, Hq, S, D], this rank's queries; S is ``sharding.lengths[rank]``.
        k: [B, Hkv, S, D], this rank's keys.
        v: [B, Hkv, S, Dv].
        mask: of the whole sequence: a BlockMask; or a Pattern (or its text) if ``sharding`` is a Sharding, which gives
            the length. Equal on all ranks.
        mesh: a DeviceMesh of one dim, e.g. ``mesh["context"]`` of a larger one. B is the batch of this slice.
        sharding: which rank holds which tokens, as made by :meth:`Sharding.of`; or the name of a ``partition``, for
            ``Sharding.of(mask, ranks, partition)``.
        kv_sharding: of keys and values. Default: that of the queries if both have the same length, else contiguous.
        scale: factor on the scores, default ``D ** -0.5``.
        softcap: see ``attention``.
        alibi_slopes: see ``attention``. Keys are laid out as far apart as in the whole sequence, so the gaps between
            the keys of a rank take memory.
        sinks: see ``attention``; equal on all ranks. Each rank gets the gradient of its own tokens, as for any
            replicated weight: DDP or an all-reduce sums them.
        dropout_p: see ``attention``. The bits belong to pairs of the whole sequence, so they equal those of one
            process. Tensors as long as the whole sequence are allocated for this.
        seed: seed of dropout, equal on all ranks; required with dropout.
        return_lse: also return the log-sum-exp of each query's scores.
        deterministic: has no effect today: gradients are always equal bit for bit in every run.
        backend: "cpu" or "triton"; None chooses by the device of q.

    ``torch.compile`` breaks the graph at this call.

    Returns:
        out [B, Hq, S, Dv] of this rank's queries, and with ``return_lse`` also lse [B, Hq, S].

    Raises:
        TypeError: an argument of another type; on every rank.
        ValueError: a mesh with several dims, a shard whose length is not that of the sharding, or masks, shapes or
            options that differ between ranks; on every rank.
        NotImplementedError: a transform of torch.func, or a forward-mode derivative.

    Example:
        With one process. Under ``torchrun`` the same lines run on several, with ``dist.init_process_group()``.

        >>> import torch, torch.distributed as dist, sparseflash as sf
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from sparseflash.distributed import Sharding, context_parallel_attention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        >>> mask = sf.parse("causal() & local(100)").compile(1000)
        >>> sharding, rank = Sharding.of(mask, mesh.size()), mesh.get_local_rank()
        >>> x = torch.randn(1, 4, 1000, 32)
        >>> shard = sharding.shard(x, rank, dim=2)
        >>> out = context_parallel_attention(shard, shard, shard, mask, mesh)
        >>> torch.equal(sharding.gather(out, mesh, dim=2), sf.attention(x, x, x, mask))
        True
        >>> dist.destroy_process_group()
    """
    group, rank, ranks = mesh_group(mesh)
    intent: str | Exception
    key: object = None
    try:
        whole = _plan(mask, ranks, sharding, kv_sharding)
        layout: Layout = "global" if dropout_p else "aligned" if alibi_slopes is not None else "packed"
        key = whole.mask, whole.queries, whole.keys, layout
        if dropout_p and seed is None:
            raise ValueError("dropout over several ranks needs a seed, the same on all of them; got seed=None")
        call = Call.checked(
            q, k, v, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
            dropout_p=dropout_p, seed=seed, deterministic=deterministic, backend=backend,
        )  # fmt: skip
        _check_shards(whole, rank, call)
        refuse_all("context_parallel_attention", q, k, v, sinks, alibi_slopes)
        intent = _intent(whole, call)
    except (TypeError, ValueError, NotImplementedError) as error:
        intent = error
    all_ranks_agree(group, _device(q, mesh), key, intent)
    local = _rank_plan(whole, rank, layout, q.device)

    (q_local,) = fetch(local.rows, group, call.q)
    k_local, v_local = fetch(local.columns, group, call.k, call.v)
    check_operands(q_local, k_local, v_local)  # laid out as in the whole sequence, they may be too long
    own = call._replace(q=q_local, k=k_local, v=v_local)
    if not whole.split.any():
        out, lse = attend(own, local.table)
        out, lse = _shard_results(local.rows, out, lse)
    else:
        # The sink of a row counts once, not once per partial result.
        out, lse = attend(own._replace(sinks=None), local.table)
        out, lse = _shard_results_with_split_rows(local.rows, group, rank, out, lse)
        if sinks is not None:
            out = (out * sink_logits.differentiable_share(lse, sinks).unsqueeze(-1)).to(call.q.dtype)
    return (out, lse) if return_lse else out


def _plan(
    mask: BlockMask | Pattern | str, ranks: int, sharding: Sharding | Partition, kv_sharding: Sharding | None
) -> Plan:
    for name, given in (("sharding", sharding), ("kv_sharding", kv_sharding)):
        if isinstance(given, Sharding) and given.ranks != ranks:
            raise ValueError(f"{name} is for {given.ranks} ranks, the mesh has {ranks}")
        if not isinstance(given, Sharding | str) and not (given is None and name == "kv_sharding"):
            raise TypeError(f"{name} must be a Sharding, got {given!r}")
    if isinstance(mask, str):
        mask = parsed(mask)
    if isinstance(mask, Pattern):
        if not isinstance(sharding, Sharding):
            raise TypeError("a Pattern has no length: pass mask=pattern.compile(seq_len), or a Sharding too")
        length = sharding.seq_len
        mask = mask.compile((length, kv_sharding.seq_len if kv_sharding else length), block=min(sharding.cell, 128))
    if not isinstance(mask, BlockMask):
        which = "a LookupTable is no longer on the host; " if isinstance(mask, LookupTable) else ""
        raise TypeError(f"mask must be a BlockMask, a Pattern or its text: {which}got {described(mask)}")
    queries = sharding if isinstance(sharding, Sharding) else Sharding.of(mask, ranks, sharding)
    keys = kv_sharding
    if keys is None:
        same = mask.shape[0] == mask.shape[1]
        keys = queries if same else Sharding.of(mask, ranks, "contiguous", axis="k")
    for name, given, length, block in zip(
        ("sharding", "kv_sharding"), (queries, keys), mask.shape, mask.block, strict=True
    ):
        if given.seq_len != length:
            raise ValueError(f"{name} is for {given.seq_len} tokens, the mask for {length}")
        if given.cell % block:
            raise ValueError(f"{name} keeps {given.cell} tokens together, the mask's blocks have {block}")
    return plan(mask, queries, keys)


def _check_shards(whole: Plan, rank: int, call: Call) -> None:
    for name, x, sharding in (("q", call.q, whole.queries), ("k", call.k, whole.keys), ("v", call.v, whole.keys)):
        if x.shape[2] != sharding.lengths[rank]:
            raise ValueError(
                f"rank {rank} of {sharding.ranks} holds {sharding.lengths[rank]} of {sharding.seq_len} tokens, "
                f"but {name} has {x.shape[2]} (shape {tuple(x.shape)}); shard it by sharding.shard({name}, rank, dim=2)"
            )


def _intent(whole: Plan, call: Call) -> str:
    """What must be equal on all ranks, as text."""

    def text(value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return "" if value in (None, False, 0.0) else repr(value)
        # A seed on a GPU is not compared: reading it would make the host wait for the device.
        return repr(int(value)) if not value.dim() and value.device.type == "cpu" else f"tensor {list(value.shape)}"

    (B, Hq, _, D), (_, Hkv, _, Dv) = call.q.shape, call.v.shape
    arguments = call._asdict()
    operands = {name: arguments.pop(name) for name in ("q", "k", "v")}
    gradients = [name for name, x in operands.items() if x.requires_grad and torch.is_grad_enabled()]
    options = ", ".join(f"{name}={given}" for name, value in arguments.items() if (given := text(value)))
    return (
        f"q [{B}, {Hq}, ., {D}], k [{B}, {Hkv}, ., {D}], v [{B}, {Hkv}, ., {Dv}], {call.q.dtype}, "
        f"gradients of {', '.join(gradients) or 'none'}; {options}; {whole.description}"
    )


def _device(q: object, mesh: DeviceMesh) -> torch.device:
    return q.device if isinstance(q, torch.Tensor) else torch.device(mesh.device_type)


@dataclass(frozen=True, eq=False)
class _RankPlan:
    """What one rank needs in every call with a plan, on its device."""

    rows: SendRecv
    columns: SendRecv
    table: LookupTable


@per_device(maxsize=64)
def _rank_plan(whole: Plan, rank: int, layout: Layout, device: torch.device) -> _RankPlan:
    rows, columns = LocalLayout.of(whole.rows, rank, layout), LocalLayout.of(whole.columns, rank, layout)
    shards = whole.queries.lengths[rank], whole.keys.lengths[rank]
    return _RankPlan(
        rows=send_recv_lists(whole.rows, rows, rank, shards[0]).to(device),
        columns=send_recv_lists(whole.columns, columns, rank, shards[1], whole.dense).to(device),
        table=lookup(local_mask(whole, rank, rows, columns), device),
    )


def _shard_results(rows: SendRecv, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of this rank's shard, [B, Hq, S, Dv] and [B, Hq, S], from those of its own tensors, [.., L, ..].

    No row is split, so the rank computed its own rows only.
    """
    if out.shape[2] == len(rows.keep_at):
        return out, lse
    return out.index_select(2, rows.keep_at), lse.index_select(2, rows.keep_at)


def _shard_results_with_split_rows(
    rows: SendRecv, group: dist.ProcessGroup, rank: int, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same if rows are split: their partial results are gathered from all ranks and merged."""
    home, home_lse = out.index_select(2, rows.keep_at), lse.index_select(2, rows.keep_at)
    foreign, foreign_lse = (return_partials(rows, group, x) for x in (out, lse.unsqueeze(-1)))
    # Every split row was sent to all other ranks: `send` lists the same tokens for each.
    mine = rows.send[: max(rows.send_counts)]
    if not len(mine):
        # This rank holds no split row and received no partial result. But the backward pass of the exchange returns the
        # gradients of what this rank sent, so it must run on all ranks, for the same results: where rows are merged,
        # out depends on both, lse on lse alone.
        nothing, nothing_lse = 0 * foreign.sum(), 0 * foreign_lse.sum()
        return home + nothing + nothing_lse.to(home.dtype), home_lse + nothing_lse

    def by_rank(parts: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Parts of the other ranks, [(R - 1) * rows, B, H, D], and this rank's own, in the order of ranks: [R, ...]."""
        others = parts.unflatten(0, (rows.ranks - 1, len(mine))).permute(0, 2, 3, 1, 4)
        return torch.cat([others[:rank], own.index_select(2, mine).unsqueeze(0), others[rank:]]).to(lse.dtype)

    lses = by_rank(foreign_lse, home_lse.unsqueeze(-1)).squeeze(-1)
    merged_out, merged_lse = merge_by_lse(by_rank(foreign, home), lses)
    return home.index_copy(2, mine, merged_out.to(out.dtype)), home_lse.index_copy(2, mine, merged_lse)


def merge_by_lse(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of R disjoint key sets, from attention over each. Differentiable, summed in order.

    Args:
        out: [R, ..., D], output over each key set.
        lse: [R, ...], its log-sum-exp; -inf if a query sees no key of the set.

    Returns:
        out [..., D] and lse [...]; 0 and -inf if a query sees no key at all.

    Example:
        >>> import torch
        >>> out, lse = merge_by_lse(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[2.0], [2.0]]))
        >>> out.item(), round(lse.item() - 2, 4)
        (2.0, 0.6931)
    """
    peak = lse.detach().amax(0)
    # If a query sees no key, its peak is -inf; with 0 in its place exp(-inf - peak) is 0.
    peak = peak.masked_fill(peak == -torch.inf, 0)
    weight = (lse - peak).exp()
    total = weight.sum(0)
    seen = total > 0
    safe = total.masked_fill(~seen, 1)
    mean = (weight.unsqueeze(-1) * out).sum(0) / safe.unsqueeze(-1)
    return mean, (peak + safe.log()).masked_fill(~seen, -torch.inf)


def summed(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum of a tensor over the ranks of a mesh, on every rank: for a readout of all tokens. Differentiable.

    A collective, and so is its backward pass. What follows, such as a head and a loss, is then computed by every rank
    with the same result. The gradient sums the gradients of all ranks, so averaging the gradients of weights over all
    ranks, as DDP and FSDP2 do, gives the gradients of the loss.

    Args:
        x: this rank's part, of the same shape on all ranks: for example the sum over its tokens' features.
        mesh: a DeviceMesh of one dim.

    Returns:
        The sum, in the shape of x.

    Raises:
        TypeError: mesh is not a DeviceMesh.
        ValueError: a mesh with several dims.
        NotImplementedError: a transform of torch.func, or a forward-mode derivative.
    """
    refuse_all("summed", x)
    group, _, ranks = mesh_group(mesh)
    total: torch.Tensor = x if ranks == 1 else _Sum.apply(group, x)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        return _all_reduced(group, x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _all_reduced(ctx.group, grad)


def _all_reduced(group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total
