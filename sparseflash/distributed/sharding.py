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
from sparseflash.patterns.renamed import renamed
from sparseflash.patterns.runs import frozen

Partition: TypeAlias = Literal["weight", "zigzag", "contiguous"]


@dataclass(frozen=True, eq=False, repr=False)
class Sharding:
    """Which rank holds which tokens. A rank holds its tokens in the order of the sequence.

    Made by :meth:`of` for a mask, or for several masks of one model. Immutable; compared and hashed by content. It
    depends on the mask and the number of ranks alone, so every rank computes the same one by itself.

    Example:
        >>> import torch
        >>> from sparseflash import patterns as P
        >>> from sparseflash.distributed import Sharding
        >>> sharding = Sharding.of(P.causal().compile(1000, block=128), ranks=2)
        >>> sharding.lengths
        (488, 512)
        >>> sharding.positions(0)[[0, 255, 256, -1]].tolist()  # the first and the last quarter: the zigzag
        [0, 255, 768, 999]
        >>> x = torch.randn(1000, 16)
        >>> torch.equal(sharding.unshard([sharding.shard(x, rank, 0) for rank in range(2)], 0), x)
        True
    """

    seq_len: int
    cell: int  # tokens per cell; the tokens of a cell stay together
    ranks: int
    owner: Owners = field()  # int32 [cells], the rank that holds each cell

    @classmethod
    @renamed(deal="partition")
    def of(
        cls,
        mask: BlockMask | Sequence[BlockMask],
        ranks: int,
        partition: Partition = "weight",
        axis: Literal["q", "k"] = "q",
    ) -> Sharding:
        """The sharding of a mask's sequence.

        Args:
            mask: a mask, or the masks of a model's layers; these share one sharding, which balances their total work.
            ranks: number of ranks.
            partition: "weight" balances the work and keeps the number of received keys low, see
                :mod:`sparseflash.distributed.partition`; "zigzag" gives rank i the i-th piece from either end;
                "contiguous" gives each rank one piece.
            axis: "q" shards the queries, and in self-attention the keys with them; "k" shards the keys of a mask that
                is not square. Work belongs to queries, so use "contiguous" or "zigzag" for keys.

        Raises:
            TypeError: mask is not a BlockMask, or ranks is not an int.
            ValueError: masks of different lengths, fewer cells than ranks, or an unknown partition.
        """
        masks: list[BlockMask] = [mask] if isinstance(mask, BlockMask) else [*mask] if _is_list(mask) else []
        if not masks or not all(isinstance(m, BlockMask) for m in masks):
            raise TypeError(f"Sharding.of takes a BlockMask (pattern.compile(...)) or several, got {described(mask)}")
        if partition not in get_args(Partition):
            raise ValueError(f"partition must be one of {', '.join(map(repr, get_args(Partition)))}, got {partition!r}")
        lengths = {m.shape[axis == "k"] for m in masks}
        if len(lengths) > 1:
            raise ValueError(f"masks that share a sharding have one length, got {sorted(lengths)}")
        square = all(m.shape[0] == m.shape[1] for m in masks)
        cell = max(max(m.block) if square else m.block[axis == "k"] for m in masks)
        check_ranks(ranks, lengths.copy().pop(), cell)
        return _of(tuple(masks), int(ranks), partition, lengths.pop(), cell, square)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each rank."""
        sizes = np.minimum(self.cell, self.seq_len - np.arange(self.owner.size) * self.cell)
        return tuple(np.bincount(self.owner, weights=sizes, minlength=self.ranks).astype(int).tolist())

    def positions(self, rank: int) -> torch.Tensor:
        """Positions of a rank's tokens in the sequence, int64, ascending: for position ids and rotary embeddings.

        Raises:
            ValueError: no such rank.
        """
        return torch.from_numpy(self._positions(self._checked(rank)))

    def shard(self, x: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        """A rank's shard of a tensor whose dim ``dim`` is the whole sequence. Differentiable.

        Raises:
            ValueError: no such rank, or the length of ``dim`` is not that of the sequence.
        """
        if x.shape[dim] != self.seq_len:
            raise ValueError(f"the sequence has {self.seq_len} tokens, dim {dim} of {tuple(x.shape)} has not")
        return x.index_select(dim, self.positions(rank).to(x.device))

    def unshard(self, shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The tensor of the whole sequence, from the shards of all ranks in the order of ranks. Differentiable.

        Raises:
            ValueError: the number of shards is not that of ranks, or a shard has the wrong number of tokens.
        """
        got = tuple(x.shape[dim] for x in shards)
        if got != self.lengths:
            raise ValueError(f"shards have {self.lengths} tokens along dim {dim}, got {got}")
        order = np.argsort(np.concatenate([self._positions(rank) for rank in range(self.ranks)]), kind="stable")
        return torch.cat(list(shards), dim).index_select(dim, torch.from_numpy(order).to(shards[0].device))

    def gather(self, x: torch.Tensor, mesh: DeviceMesh, dim: int) -> torch.Tensor:
        """The tensor of the whole sequence on every rank of a mesh, from the shard of each. Carries no gradient.

        A collective: every rank of the mesh calls it.

        Raises:
            TypeError: mesh is not a DeviceMesh.
            ValueError: a mesh of several dims or of another size, or a shard with the wrong number of tokens.
        """
        group, rank, _ = mesh_group(mesh, self.ranks)
        if x.shape[dim] != self.lengths[rank]:
            raise ValueError(
                f"rank {rank} holds {self.lengths[rank]} tokens, dim {dim} of {tuple(x.shape)} has {x.shape[dim]}"
            )
        rows = x.detach().movedim(dim, 0)
        padded = rows.new_zeros(max(self.lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = all_gather(group, padded).split(len(padded))
        shards = [shard[:n] for shard, n in zip(gathered, self.lengths, strict=True)]
        return self.unshard(shards, 0).movedim(0, dim)

    def block_owner(self, block: int) -> Owners:
        """The rank that holds each block, int32 [blocks]; ``block``, in tokens, divides the cell."""
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
def _of(masks: tuple[BlockMask, ...], ranks: int, kind: Partition, length: int, cell: int, square: bool) -> Sharding:
    cells = -(-length // cell)
    if kind == "zigzag":
        owner = partition.zigzag(cells, ranks)
    elif kind == "contiguous":
        owner = partition.contiguous(cells, ranks)
    else:
        owner = partition.cheapest_partition(masks, ranks, cell, square)
    return Sharding(length, cell, ranks, frozen(owner))


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def check_ranks(ranks: int, length: int, cell: int) -> None:
    """Check that every rank can hold at least one cell of a sequence.

    Args:
        ranks: number of ranks.
        length: tokens of the sequence.
        cell: tokens per cell.

    Raises:
        TypeError: ranks is not an int.
        ValueError: fewer cells than ranks.
    """
    if not is_int(ranks):
        raise TypeError(f"ranks must be an int, got {ranks!r}")
    cells = -(-length // cell)
    if not 1 <= ranks <= cells:
        raise ValueError(
            f"{length} tokens are {cells} cells of {cell}, which {ranks} ranks cannot share: a rank holds at least one;"
            f" take fewer ranks, or a smaller block"
        )
