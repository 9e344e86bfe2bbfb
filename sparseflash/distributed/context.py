"""Attention over a sequence that is shared out among ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparseflash.arguments import check_operands, parsed, under_autocast
from sparseflash.distributed.exchange import SendRecv, all_ranks_agree, fetch, mesh_group, return_partials
from sparseflash.distributed.merging import merged
from sparseflash.distributed.plan import Layout, LocalLayout, Plan, local_mask, plan, send_recv_lists
from sparseflash.distributed.sharding import Deal, Sharding
from sparseflash.functional import attention
from sparseflash.kernels import sinks as sink_logits
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.described import described
from sparseflash.patterns.pattern import Pattern
from sparseflash.tables import LookupTable, lasting, lookup
from sparseflash.transforms import refuse_all


@overload
def context_parallel_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask | Pattern | str, mesh: DeviceMesh, *,
    sharding: Sharding | Deal = "weight", kv_sharding: Sharding | None = None,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, dropout_p: float = 0.0, seed: int | torch.Tensor | None = None,
    return_lse: Literal[False] = False, deterministic: bool = False, backend: str | None = None,
) -> torch.Tensor: ...  # fmt: skip
@overload
def context_parallel_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask | Pattern | str, mesh: DeviceMesh, *,
    sharding: Sharding | Deal = "weight", kv_sharding: Sharding | None = None,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, dropout_p: float = 0.0, seed: int | torch.Tensor | None = None,
    return_lse: Literal[True], deterministic: bool = False, backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@torch.compiler.disable  # type: ignore[untyped-decorator]  # plans are made on the host, with numpy
def context_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask | Pattern | str,
    mesh: DeviceMesh,
    *,
    sharding: Sharding | Deal = "weight",
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
    which key blocks each rank needs; only those are exchanged, and their gradients go back to the ranks that hold them,
    where they are added up in the order of ranks. A block row that sees far more than others (global tokens) is worked
    on by all ranks where the keys are.

    Args:
        q: [B, Hq, S, D], this rank's queries; S is ``sharding.lengths[rank]``.
        k: [B, Hkv, S, D], this rank's keys.
        v: [B, Hkv, S, Dv].
        mask: for the whole sequence: a BlockMask, or a Pattern (or its text) with a Sharding, which knows the length.
            Equal on all ranks.
        mesh: a DeviceMesh of one dim, e.g. ``mesh["context"]`` of a larger one. B is this slice's own batch.
        sharding: which rank holds which tokens, as made by :meth:`Sharding.of`, or how to deal them, which makes the
            sharding ``Sharding.of(mask, ranks, deal)``.
        kv_sharding: of keys and values, if it is another one; by default the same where queries and keys have one
            length, and contiguous where not.
        scale: factor on the scores, default ``D ** -0.5``.
        softcap: as there.
        alibi_slopes: as there. Keys stand as far apart as in the whole sequence, which takes memory for the gaps
            between what a rank holds and received.
        sinks: as there, equal on all ranks. The gradient is this rank's share, as that of any weight which all ranks
            have: DDP or an all-reduce adds them up.
        dropout_p: as there. Bits belong to pairs of the whole sequence, so they are those of one process; this takes
            memory for tensors as long as the whole sequence.
        seed: of dropout, the same on all ranks; must be given with it.
        return_lse: also return the log-sum-exp of each query's scores.
        deterministic: gradients are equal bit for bit in every run whatever is asked for.
        backend: "cpu" or "triton"; None chooses by the device of q.

    In ``torch.compile`` the call breaks the graph.

    Returns:
        out [B, Hq, S, Dv] of this rank's queries, and with ``return_lse`` also lse [B, Hq, S].

    Raises:
        TypeError: an argument of another kind, on every rank.
        ValueError: a mesh with several dims, a shard of another length than the sharding says, masks, shapes or options
            that differ between ranks; on every rank.
        NotImplementedError: a transform of torch.func, or a forward-mode derivative.

    Example:
        One process is a mesh too; under ``torchrun`` the same lines run on as many as there are, with
        ``dist.init_process_group()``.

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
    arguments: dict[str, Any] = {
        "scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks, "dropout_p": dropout_p,
        "seed": seed, "deterministic": deterministic, "backend": backend,
    }  # fmt: skip
    intent: str | Exception
    about: object = None
    q, k, v = under_autocast(q, k, v)  # before anything is exchanged
    try:
        whole = _plan(mask, ranks, sharding, kv_sharding)
        layout: Layout = "global" if dropout_p else "aligned" if alibi_slopes is not None else "packed"
        about = whole.mask, whole.queries, whole.keys, layout
        _check_shards(whole, rank, q, k, v)
        refuse_all("context_parallel_attention", q, k, v, sinks, alibi_slopes)
        intent = _intent(whole, q, k, v, arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        intent = error
    all_ranks_agree(group, _device(q, mesh), about, intent)
    part = _part(whole, rank, layout, q.device)

    (q_local,) = fetch(part.rows, group, q)
    k_local, v_local = fetch(part.columns, group, k, v)
    if not whole.split.any():
        out, lse = attention(q_local, k_local, v_local, part.table, return_lse=True, **arguments)
        out, lse = _at_home(part.rows, out, lse)
    else:
        # The sink of a row counts once, not for every part of it.
        out, lse = attention(q_local, k_local, v_local, part.table, return_lse=True, **arguments | {"sinks": None})
        out, lse = _with_split_rows(part.rows, group, rank, out, lse)
        if sinks is not None:
            out = (out * sink_logits.differentiable_share(lse, sinks).unsqueeze(-1)).to(q.dtype)
    return (out, lse) if return_lse else out


def _plan(mask: BlockMask | Pattern | str, ranks: int, sharding: Sharding | Deal, kv_sharding: Sharding | None) -> Plan:
    for name, given in (("sharding", sharding), ("kv_sharding", kv_sharding)):
        if isinstance(given, Sharding) and given.ranks != ranks:
            raise ValueError(f"{name} is for {given.ranks} ranks, the mesh has {ranks}")
        if not isinstance(given, Sharding | str) and not (given is None and name == "kv_sharding"):
            raise TypeError(f"{name} must be a Sharding, got {given!r}")
    if isinstance(mask, str):
        mask = parsed(mask)
    if isinstance(mask, Pattern):
        if not isinstance(sharding, Sharding):
            raise TypeError("a Pattern knows no length: pass mask=pattern.compile(seq_len), or a Sharding beside it")
        length = sharding.seq_len
        mask = mask.compile((length, kv_sharding.seq_len if kv_sharding else length), block=min(sharding.cell, 128))
    if not isinstance(mask, BlockMask):
        which = "a LookupTable has left the host; " if isinstance(mask, LookupTable) else ""
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


def _check_shards(whole: Plan, rank: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check_operands(q, k, v)
    for name, x, sharding in (("q", q, whole.queries), ("k", k, whole.keys), ("v", v, whole.keys)):
        if x.shape[2] != sharding.lengths[rank]:
            raise ValueError(
                f"rank {rank} of {sharding.ranks} holds {sharding.lengths[rank]} of {sharding.seq_len} tokens, "
                f"but {name} has {x.shape[2]} (shape {tuple(x.shape)}); shard it by sharding.shard({name}, rank, dim=2)"
            )


def _intent(whole: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: dict[str, Any]) -> str:
    """What has to be equal on all ranks, as text."""
    if arguments["dropout_p"] and arguments["seed"] is None:
        raise ValueError("dropout over several ranks needs a seed, the same on all of them; got seed=None")

    def told(value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return "" if value in (None, False, 0.0) else repr(value)
        # A seed on a GPU stays there: reading it would wait for the device.
        return repr(int(value)) if not value.dim() and value.device.type == "cpu" else f"tensor {list(value.shape)}"

    (B, Hq, _, D), (_, Hkv, _, Dv) = q.shape, v.shape
    gradients = [name for name, x in (("q", q), ("k", k), ("v", v)) if x.requires_grad and torch.is_grad_enabled()]
    options = ", ".join(f"{name}={text}" for name, value in arguments.items() if (text := told(value)))
    return (
        f"q [{B}, {Hq}, ., {D}], k [{B}, {Hkv}, ., {D}], v [{B}, {Hkv}, ., {Dv}], {q.dtype}, "
        f"gradients of {', '.join(gradients) or 'none'}; {options or 'no options'}; {whole.description}"
    )


def _device(q: object, mesh: DeviceMesh) -> torch.device:
    return q.device if isinstance(q, torch.Tensor) else torch.device(mesh.device_type)


@dataclass(frozen=True, eq=False)
class _Part:
    """What one rank needs for every call of a plan, on its device."""

    rows: SendRecv
    columns: SendRecv
    table: LookupTable


@lru_cache(maxsize=64)
@lasting
def _part(whole: Plan, rank: int, layout: Layout, device: torch.device) -> _Part:
    rows, columns = LocalLayout.of(whole.rows, rank, layout), LocalLayout.of(whole.columns, rank, layout)
    shards = whole.queries.lengths[rank], whole.keys.lengths[rank]
    return _Part(
        rows=send_recv_lists(whole.rows, rows, rank, shards[0]).to(device),
        columns=send_recv_lists(whole.columns, columns, rank, shards[1], whole.dense).to(device),
        table=lookup(local_mask(whole, rank, rows, columns), device),
    )


def _at_home(rows: SendRecv, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a rank's own tensors, what belongs to its shard; nothing else was computed."""
    if out.shape[2] == len(rows.keep_at):
        return out, lse
    return out.index_select(2, rows.keep_at), lse.index_select(2, rows.keep_at)


def _with_split_rows(
    rows: SendRecv, group: dist.ProcessGroup, rank: int, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of this rank's shard, parts of split rows gathered from all ranks and merged."""
    home, home_lse = out.index_select(2, rows.keep_at), lse.index_select(2, rows.keep_at)
    foreign, foreign_lse = (return_partials(rows, group, x) for x in (out, lse.unsqueeze(-1)))
    # Every split row went to all other ranks: `send` lists the same tokens for each.
    mine = rows.send[: max(rows.send_counts)]
    if not len(mine):
        # Nothing came; but the way back carries gradients of what was sent, and all ranks must go it for the same
        # results: where rows are merged, out depends on both, lse on lse alone.
        nothing, nothing_lse = 0 * foreign.sum(), 0 * foreign_lse.sum()
        return home + nothing + nothing_lse.to(home.dtype), home_lse + nothing_lse

    def every(parts: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Parts [R - 1 times the rows, B, H, D] of the other ranks and this one's, in the order of ranks: [R, ...]."""
        others = parts.unflatten(0, (rows.ranks - 1, len(mine))).permute(0, 2, 3, 1, 4)
        return torch.cat([others[:rank], here.index_select(2, mine).unsqueeze(0), others[rank:]]).to(lse.dtype)

    lses = every(foreign_lse, home_lse.unsqueeze(-1)).squeeze(-1)
    whole_out, whole_lse = merged(every(foreign, home), lses)
    return home.index_copy(2, mine, whole_out.to(out.dtype)), home_lse.index_copy(2, mine, whole_lse)
