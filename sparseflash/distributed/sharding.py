"""Which rank holds which tokens of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from sparseflash.distributed import partition
from sparseflash.distributed.exchange import all_gather, mesh_group
from sparseflash.distributed.partition import Owners
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.described import described
from sparseflash.patterns.grid import is_int
from sparseflash.patterns.intervals import Ints, positions
from sparseflash.patterns.runs import frozen

Deal: TypeAlias = Literal["weight", "zigzag", "contiguous"]


@dataclass(frozen=True, eq=False, repr=False)
class Sharding:
    """Which rank holds which tokens. A rank holds its tokens in the order of the sequence.

    Made by :meth:`of` for a mask, or for several masks of one model. Immutable, equal and hashed by content. It is a
    function of mask and number of ranks, so every rank makes its own and all have the same one.

    Example:
        >>> import torch
        >>> from sparseflash import patterns as P
        >>> from sparseflash.distributed import Sharding
        >>> sharding = Sharding.of(P.causal().compile(1000, block=128), ranks=2)
        >>> sharding.lengths
        (488, 512)
        >>> sharding.positions(0)[[0, 255, 256, -1]].tolist()  # the first and the last quarter: the zig-zag
        [0, 255, 768, 999]
        >>> x = torch.randn(1000, 16)
        >>> torch.equal(sharding.unshard([sharding.shard(x, rank, 0) for rank in range(2)], 0), x)
        True
    """

    seq_len: int
    cell: int  # tokens that stay together
    ranks: int
    owner: Owners = field()  # int32 [cells], which rank holds each

    @classmethod
    def of(
        cls, mask: BlockMask | Sequence[BlockMask], ranks: int, deal: Deal = "weight", axis: Literal["q", "k"] = "q"
    ) -> Sharding:
        """How a mask's sequence is shared out.

        Args:
            mask: a mask, or the masks of a model's layers, which share one sharding: their work is added up.
            ranks: how many share the sequence.
            deal: "weight" looks for equal work and few keys to receive, see :mod:`sparseflash.distributed.partition`;
                "zigzag" gives each rank the i-th piece from either end; "contiguous" gives each one piece.
            axis: "q" shards queries, and with them the keys of self-attention; "k" shards keys of a mask that is not
                square, whose work is the queries' business: only "contiguous" and "zigzag" deal them.

        Raises:
            TypeError: mask is no BlockMask, ranks no int.
            ValueError: masks of different lengths, fewer cells than ranks, or an unknown deal.
        """
        masks: list[BlockMask] = [mask] if isinstance(mask, BlockMask) else [*mask] if _listed(mask) else []
        if not masks or not all(isinstance(m, BlockMask) for m in masks):
            raise TypeError(f"Sharding.of takes a BlockMask (pattern.compile(...)) or several, got {described(mask)}")
        if deal not in get_args(Deal):
            raise ValueError(f"deal must be one of {', '.join(map(repr, get_args(Deal)))}, got {deal!r}")
        lengths = {m.shape[axis == "k"] for m in masks}
        if len(lengths) > 1:
            raise ValueError(f"masks that share a sharding have one length, got {sorted(lengths)}")
        square = all(m.shape[0] == m.shape[1] for m in masks)
        cell = max(max(m.block) if square else m.block[axis == "k"] for m in masks)
        check_ranks(ranks, lengths.copy().pop(), cell)
        return _of(tuple(masks), int(ranks), deal, lengths.pop(), cell, square)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        sizes = np.minimum(self.cell, self.seq_len - np.arange(self.owner.size) * self.cell)
        return tuple(np.bincount(self.owner, weights=sizes, minlength=self.ranks).astype(int).tolist())

    def positions(self, rank: int) -> torch.Tensor:
        """Where each token of a rank stands in the sequence, int64, ascending: for position ids and rotary embeddings.

        Raises:
            ValueError: no such rank.
        """
        return torch.from_numpy(self._positions(self._checked(rank)))

    def shard(self, x: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        """What a rank holds of a tensor of the whole sequence, which lies along ``dim``. Differentiable.

        Raises:
            ValueError: no such rank, or ``dim`` has another length than the sequence.
        """
        if x.shape[dim] != self.seq_len:
            raise ValueError(f"the sequence has {self.seq_len} tokens, dim {dim} of {tuple(x.shape)} has not")
        return x.index_select(dim, self.positions(rank).to(x.device))

    def unshard(self, shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The tensor of the whole sequence from those of all ranks, in their order. Differentiable.

        Raises:
            ValueError: another number of shards than ranks, or one with another number of tokens than its rank's.
        """
        got = tuple(x.shape[dim] for x in shards)
        if got != self.lengths:
            raise ValueError(f"shards have {self.lengths} tokens along dim {dim}, got {got}")
        back = np.argsort(np.concatenate([self._positions(rank) for rank in range(self.ranks)]), kind="stable")
        return torch.cat(list(shards), dim).index_select(dim, torch.from_numpy(back).to(shards[0].device))

    def gather(self, x: torch.Tensor, mesh: DeviceMesh, dim: int) -> torch.Tensor:
        """The tensor of the whole sequence on every rank of a mesh, from this rank's shard. Carries no gradient.

        A collective: every rank of the mesh calls it.

        Raises:
            TypeError: mesh is no DeviceMesh.
            ValueError: a mesh of several dims or of another size, or a shard with another number of tokens.
        """
        group, rank, _ = mesh_group(mesh, self.ranks)
        if x.shape[dim] != self.lengths[rank]:
            raise ValueError(
                f"rank {rank} holds {self.lengths[rank]} tokens, dim {dim} of {tuple(x.shape)} has {x.shape[dim]}"
            )
        rows = x.detach().movedim(dim, 0)
        padded = rows.new_zeros(max(self.lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        every = all_gather(group, padded).split(len(padded))
        parts = [part[:n] for part, n in zip(every, self.lengths, strict=True)]
        return self.unshard(parts, 0).movedim(0, dim)

    def block_owner(self, block: int) -> Owners:
        """Which rank holds each block, int32 [blocks]; `block` divides the cell."""
        assert self.cell % block == 0
        return np.repeat(self.owner, self.cell // block)[: -(-self.seq_len // block)]

    def _positions(self, rank: int) -> Ints:
        start = np.flatnonzero(self.owner == rank) * self.cell
        return positions(start, np.minimum(start + self.cell, self.seq_len))

    def _checked(self, rank: int) -> int:
        if not is_int(rank) or not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be 0 to {self.ranks - 1}, got {rank!r}")
        return int(rank)

    @cached_property
    def _content(self) -> tuple[int, int, int, bytes]:
        return self.seq_len, self.cell, self.ranks, self.owner.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sharding) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        pieces = 1 + int((np.diff(self.owner) != 0).sum())
        return f"Sharding({self.seq_len:,} tokens on {self.ranks} ranks in {pieces} pieces, cells of {self.cell})"


@lru_cache(maxsize=64)
def _of(masks: tuple[BlockMask, ...], ranks: int, deal: Deal, length: int, cell: int, square: bool) -> Sharding:
    cells = -(-length // cell)
    if deal == "zigzag":
        owner = partition.zigzag(cells, ranks)
    elif deal == "contiguous":
        owner = partition.contiguous(cells, ranks)
    else:
        owner = partition.cheapest_partition(masks, ranks, cell, square)
    return Sharding(length, cell, ranks, frozen(owner))


def _listed(value: object) -> bool:
    return isinstance(value, list | tuple)


def check_ranks(ranks: int, length: int, cell: int) -> None:
    """Refuse to share a sequence among ranks that would hold nothing of it.

    Raises:
        TypeError: ranks is no int.
        ValueError: fewer cells of so many tokens than ranks.
    """
    if not is_int(ranks):
        raise TypeError(f"ranks must be an int, got {ranks!r}")
    cells = -(-length // cell)
    if not 1 <= ranks <= cells:
        raise ValueError(
            f"{length} tokens are {cells} cells of {cell}, which {ranks} ranks cannot share: a rank holds at least one;"
            f" take fewer ranks, or a smaller block"
        )
