"""Plain attention over lookup tables on a CPU, forward and backward, with torch's own flash attention kernel.

The kernel is dense: it is called on strips of block rows (`cpu_strips`) and the key blocks that they meet. Blocks that
lie side by side are read in place, others are gathered, a bounded amount at a time, and results of one row are merged
by lse. Scores take nothing but a scale here: features are the business of `cpu`.

Shape legend: H query heads that walk together, each with a key head of its own, R strips, E key blocks a strip,
X queries a strip, L keys a strip, N / M tokens, D head dim of q and k, V head dim of v, W = width of what the kernel
is given (it wants one head dim for all).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from sparseflash.kernels.cpu_strips import Ints, Rows, Strips, cut, evenly
from sparseflash.kernels.layout import Side, Tiles

AVAILABLE = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
# Bytes of K, and as many of V, that are gathered for one call of the kernel: about what a core's cache holds.
GATHERED = 1 << 20
# Bytes of the largest operand or result of one call that reads in place, and pairs of tokens that one is worth making
# for: fewer are gathered together with others.
HELD = 1 << 22
WORTH = 1 << 18
# Bytes of fp32 accumulators for some of the queries, and for the gradients of some of the key heads.
QUERIES_HELD = 1 << 24
KEYS_HELD = 1 << 26
# Letters of a table that are looked at together, and bytes of unpacked tiles that are kept for a call.
LETTERS_HELD = 1 << 21
TILES_HELD = 1 << 24


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Side,
    tiles: Tiles,
    pattern_of: torch.Tensor,
    block: tuple[int, int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [B, Hq, N, V] in q's dtype and lse [B, Hq, N] in fp32 (fp64 for fp64 inputs); K or V may be dirty."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    masks = _Masks(tiles, block, wide, clean=not _finite(k, v))
    width = max(q.shape[-1], v.shape[-1])
    for lane in _lanes(pattern_of, q, k, v, out, lse):
        qx, kx, vx, out_x, lse_x = lane.tensors
        keys, values = _Keys(kx, block[1], width, masks), _Keys(vx, block[1], width, masks)
        for walk in _walks(lane, rows, block, q.shape[2], k.shape[2], range(len(kx)), v.shape[-1] * wide.itemsize):
            part = slice(*walk.tokens)
            acc, acc_lse = out_x[:, part].to(wide), lse_x[:, part]  # no copy where it is `wide` already
            for (strips, fresh), heads in itertools.product(_firsts(walk.strips), walk.heads):
                for batch in _batches(strips, heads, keys, walk.queries):
                    mask, blind = masks.of(batch)
                    k_strips, v_strips = keys.of(batch), values.of(batch)
                    for q_heads in heads.queries:
                        part_out, part_lse = kernel(
                            _padded(batch.strips_of(qx[q_heads, part]), width, batch.dtype),
                            *(k_strips, v_strips),
                            *(0.0, False),
                            attn_mask=mask,
                            scale=scale,
                        )
                        if blind is not None:
                            part_lse.masked_fill_(blind, -torch.inf)
                            part_out.masked_fill_(blind.unsqueeze(-1), 0)
                        part_out = part_out[..., : v.shape[-1]].to(wide)
                        _merge(batch, acc[q_heads], acc_lse[q_heads], part_out, part_lse, fresh)
            if q.dtype != wide:
                out_x[:, part] = acc
    return out, lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: Side,
    tiles: Tiles,
    pattern_of: torch.Tensor,
    block: tuple[int, int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v in their dtypes.

    The kernel takes dS = P * (dP - delta) with delta = rowsum(dout * out) and knows of no cotangent of lse, which is
    one more term of delta: it comes as one more element of each row, dlse in dout times -1 in out, 0 in v.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    wide = torch.promote_types(q.dtype, torch.float32)
    dead = lse == -torch.inf
    if dead.any():
        # Whatever cotangents rows that see nothing get, their gradients are 0: +inf makes their exp(score - lse) 0.
        dout, lse = dout.masked_fill(dead.unsqueeze(-1), 0), lse.masked_fill(dead, torch.inf)
        dlse = None if dlse is None else dlse.masked_fill(dead, 0)
    if dlse is not None and not dlse.any():
        dlse = None
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    masks = _Masks(tiles, block, wide, clean=not _finite(k, v))
    depth, v_depth = q.shape[-1], v.shape[-1]
    width = max(depth, v_depth + (dlse is not None))
    tensors = (q, k, v, dout, out, lse, dq, dk, dv, *(() if dlse is None else (dlse,)))
    for lane in _lanes(pattern_of, *tensors):
        qx, kx, vx, dout_x, out_x, lse_x, dq_x, dk_x, dv_x, *dlse_x = lane.tensors
        keys, values = _Keys(kx, block[1], width, masks), _Keys(vx, block[1], width, masks)
        at_once = max(1, KEYS_HELD // (k.shape[2] * (depth + v_depth) * wide.itemsize))
        for first in range(0, len(kx), at_once):
            some = range(first, min(len(kx), first + at_once))
            acc_k, acc_v = (x[some.start : some.stop].to(wide) for x in (dk_x, dv_x))
            for walk in _walks(lane, rows, block, q.shape[2], k.shape[2], some, depth * wide.itemsize):
                part = slice(*walk.tokens)
                acc = dq_x[:, part].to(wide)
                for strips, heads in itertools.product(walk.strips, walk.heads):
                    for batch in _batches(strips, heads, keys, walk.queries, backward=True):
                        mask, _ = masks.of(batch)
                        k_strips, v_strips = keys.of(batch), values.of(batch)
                        for q_heads in heads.queries:
                            grads, outs = (batch.strips_of(x[q_heads, part]) for x in (dout_x, out_x))
                            grads, outs = (_padded(x, width, batch.dtype) for x in (grads, outs))
                            if dlse_x:
                                grads[..., v_depth] = batch.strips_of(dlse_x[0][q_heads, part])
                                outs[..., v_depth] = -1
                            dq_here, dk_here, dv_here = kernel(
                                *(grads, _padded(batch.strips_of(qx[q_heads, part]), width, batch.dtype)),
                                *(k_strips, v_strips, outs, batch.strips_of(lse_x[q_heads, part]).contiguous()),
                                *(0.0, False),
                                attn_mask=mask,
                                scale=scale,
                            )
                            batch.add_queries(acc[q_heads], dq_here[..., :depth])
                            batch.add_keys(acc_k, first, dk_here[..., :depth])
                            batch.add_keys(acc_v, first, dv_here[..., :v_depth])
                if q.dtype != wide:
                    dq_x[:, part] = acc
            if q.dtype != wide:
                dk_x[some.start : some.stop], dv_x[some.start : some.stop] = acc_k, acc_v
    return dq, dk, dv


def _finite(k: torch.Tensor, v: torch.Tensor) -> bool:
    return bool(torch.isfinite(k.sum()) & torch.isfinite(v.sum()))


@dataclass(frozen=True)
class _Lane:
    """Tensors as [heads, tokens, ...]: all samples as one where memory allows, else a sample."""

    tensors: list[torch.Tensor]
    patterns: Ints  # [heads of q]


def _lanes(pattern_of: torch.Tensor, *tensors: torch.Tensor) -> Iterator[_Lane]:
    # The kernel takes elements of a row to lie side by side, which those of an expanded cotangent do not.
    tensors = tuple(x.contiguous() if x.dim() == 4 and x.stride(3) != 1 else x for x in tensors)
    batch, heads = tensors[0].shape[:2]
    patterns = pattern_of.expand(batch, heads).numpy()
    if batch == 1 or all(x.stride(0) == x.shape[1] * x.stride(1) for x in tensors):
        yield _Lane([x.flatten(0, 1) for x in tensors], patterns.reshape(-1))
        return
    for b in range(batch):
        yield _Lane([x[b] for x in tensors], patterns[b])


@dataclass(frozen=True)
class _Heads:
    """Key heads at even distances; for each place in a group of query heads those that read them."""

    keys: slice
    queries: list[slice]
    count: int

    @classmethod
    def find(cls, heads: Ints, group: int) -> list[_Heads]:
        """The query heads `heads` in as few of these as may be; `group` query heads share a key head."""
        found: dict[tuple[int, int, int], list[slice]] = {}
        for place in range(group):
            mine = heads[heads % group == place] // group
            for first, last in evenly(mine):
                step = int(mine[first + 1] - mine[first]) if last - first > 1 else 1
                start, stop = int(mine[first]), int(mine[last - 1]) + 1
                queries = slice(start * group + place, (stop - 1) * group + place + 1, step * group)
                found.setdefault((start, stop, step), []).append(queries)
        return [cls(slice(*keys), queries, len(range(*keys))) for keys, queries in found.items()]


@dataclass(frozen=True)
class _Walk:
    """Some rows of one pattern with the heads that share it."""

    tokens: tuple[int, int]
    queries: int  # of each block row
    heads: list[_Heads]
    strips: list[Strips]


def _walks(
    lane: _Lane, side: Side, block: tuple[int, int], q_len: int, kv_len: int, kv_heads: range, bytes_a_query: int
) -> Iterator[_Walk]:
    """All rows, a bounded number at a time, for the query heads whose key heads are in `kv_heads`."""
    q_heads = len(lane.tensors[0])
    group = q_heads // len(lane.tensors[1])
    width = -(-kv_len // block[1])
    whole = q_len // block[0]
    at_once = min(QUERIES_HELD // (q_heads * bytes_a_query * block[0]), LETTERS_HELD // width)
    at_once = max(1, at_once // 64) * 64
    full, partial, tile = (x.numpy() for x in (side.full, side.partial, side.tile))
    heads = np.arange(kv_heads.start * group, kv_heads.stop * group)
    for p, spans in enumerate(side.spans.numpy().astype(np.int64)):
        mine = _Heads.find(heads[lane.patterns[heads] == p], group)
        if not mine:
            continue
        rows = Rows(spans, full, partial, tile)
        for first in range(0, whole, at_once):
            last = min(whole, first + at_once)
            strips = list(cut(rows.letters(first, last, width), block))
            yield _Walk((first * block[0], last * block[0]), block[0], mine, strips)
        if q_len % block[0]:  # the last row is short
            strips = list(cut(rows.letters(whole, whole + 1, width), block))
            yield _Walk((whole * block[0], q_len), q_len % block[0], mine, strips)


def _firsts(strips: list[Strips]) -> list[tuple[Strips, bool]]:
    """The strips, each with whether no row of them was in any before."""
    seen: set[int] = set()
    found = []
    for some in strips:
        rows = set((some.rows[:, None] + np.arange(some.tall)).ravel().tolist())
        found.append((some, seen.isdisjoint(rows)))
        seen |= rows
    return found


@dataclass(frozen=True)
class _Batch:
    """Strips for one call of the kernel."""

    rows: Ints  # [R] the first row of each
    tall: int
    queries: int  # of a row
    cols: Ints  # [R, E]
    tiles: Ints | None  # [R, E] or None, as in Strips
    heads: slice  # key heads
    in_place: bool  # keys of each strip lie side by side, and strips at even distances in queries and keys
    size: int  # of a key block
    keys: int  # L
    dtype: torch.dtype  # of what the kernel is given

    def strips_of(self, x: torch.Tensor) -> torch.Tensor:
        """[R, H, X, ...] of x [H, N, ...]: a view where rows are at even distances, as they are in tall strips."""
        steps = np.diff(self.rows)
        if (steps == steps[:1]).all():
            step = int(steps[0]) if len(steps) else 0
            stride = step * self.queries * x.stride(1), *x.stride()
            shape = len(self.rows), len(x), self.tall * self.queries, *x.shape[2:]
            return x.as_strided(shape, stride, x.storage_offset() + int(self.rows[0]) * self.queries * x.stride(1))
        assert self.tall == 1
        picked: torch.Tensor = x.unflatten(1, (-1, self.queries))[:, torch.from_numpy(self.rows)]
        return picked.transpose(0, 1)

    def halved(self) -> _Batch:
        """The upper and the lower half of tall strips apart: the kernel shares out strips and heads among threads."""
        if len(self.rows) > 1 or self.tall % 2:
            return self
        rows = np.concatenate([self.rows, self.rows + self.tall // 2])
        return replace(self, rows=rows, tall=self.tall // 2, cols=self.cols.repeat(2, 0))

    def put(self, x: torch.Tensor, view: torch.Tensor) -> None:
        """After `view`, strips_of(x), has changed: see that x has what is in it."""
        if view.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            x.unflatten(1, (-1, self.queries))[:, torch.from_numpy(self.rows)] = view.transpose(0, 1)

    def add_queries(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add part [R, H, X, D] to total [H, N, D]."""
        here = self.strips_of(total)
        here += part
        self.put(total, here)

    def add_keys(self, total: torch.Tensor, first: int, part: torch.Tensor) -> None:
        """Add part [R, H, L, D] to total [heads from `first`, M, D]."""
        total = total[self.heads.start - first : self.heads.stop - first : self.heads.step]
        size = self.size
        if self.in_place:
            for start, here in zip(self.cols[:, 0].tolist(), part, strict=True):
                total[:, start * size : start * size + self.keys] += here
            return
        whole = self.keys // size
        blocks = total[:, : total.shape[1] // size * size].unflatten(1, (-1, size))
        index = torch.from_numpy(self.cols[:, :whole].ravel())
        found = part[:, :, : whole * size].unflatten(2, (whole, size)).transpose(0, 1).flatten(1, 2)
        blocks.index_add_(1, index, found.to(total.dtype))
        if self.keys % size:  # each strip ends in the short last block
            total[:, -(self.keys % size) :] += part[:, :, whole * size :].sum(0)


def _batches(strips: Strips, heads: _Heads, keys: _Keys, queries: int, backward: bool = False) -> Iterator[_Batch]:
    """The strips in bites of bounded memory, those that can be read in place apart from those to gather."""
    rows, cols, tiles, tall = strips.rows, strips.cols, strips.tiles, strips.tall
    entries = cols.shape[1]
    ends = cols[:, -1] == keys.short if keys.short is not None else np.zeros(len(cols), bool)
    dtype, direct = keys.dtype(tall), keys.direct(tall) and not (keys.masks.dirty and tiles is not None)
    near = (cols[:, -1] - cols[:, 0] == entries - 1) & direct
    for at_end in (False, True):
        length = entries * keys.size - (keys.spare if at_end else 0)
        bytes_each = heads.count * max(length, tall * queries) * keys.width * dtype.itemsize
        at_once = max(1, HELD // max(bytes_each, 0 if tiles is None else 4 * length * queries))
        enough = max(1, -(-WORTH // (heads.count * tall * queries * length)))
        apart = []
        for bunch in _runs((near & (ends == at_end)).nonzero()[0], np.stack([rows, cols[:, 0]], 1)):
            if len(bunch) < enough and tall == 1:
                apart.append(bunch)
                continue
            for some in _bites(bunch, at_once):
                their = None if tiles is None else tiles[some]
                batch = _Batch(rows[some], tall, queries, cols[some], their, heads.keys, True, keys.size, length, dtype)
                yield batch.halved() if backward and heads.count == 1 else batch
        apart.append((~near & (ends == at_end)).nonzero()[0])
        others = np.sort(np.concatenate(apart))
        at_once = max(1, GATHERED // (heads.count * length * keys.width * dtype.itemsize))
        for bunch in _runs(others, rows) if tall > 1 else [others]:
            for some in _bites(bunch, at_once):
                their = None if tiles is None else tiles[some]
                yield _Batch(rows[some], tall, queries, cols[some], their, heads.keys, False, keys.size, length, dtype)


def _runs(which: Ints, values: Ints) -> Iterator[Ints]:
    """`which` in runs whose `values` [n, m] are at even distances."""
    for first, last in evenly(values[which]):
        yield which[first:last]


def _bites(which: Ints, at_once: int) -> Iterator[Ints]:
    for first in range(0, len(which), at_once):
        yield which[first : first + at_once]


class _Keys:
    """Key blocks of K or V [heads, M, D] as the kernel wants them."""

    def __init__(self, x: torch.Tensor, size: int, width: int, masks: _Masks) -> None:
        self.x, self.size, self.width, self.masks = x, size, width, masks
        self.spare = -x.shape[1] % size
        self.short = x.shape[1] // size if self.spare else None  # the last block, if it is not whole
        self.blocks = x[:, : x.shape[1] // size * size].unflatten(1, (-1, size))
        self.buffer = x.new_empty(0)  # reused: fresh memory costs more than what is copied to it

    def dtype(self, tall: int) -> torch.dtype:
        """What the kernel computes in. Its bf16 is fast with many queries only, its fp16 never."""
        return self.x.dtype if tall > 1 and self.x.dtype == torch.bfloat16 else self.masks.dtype

    def direct(self, tall: int) -> bool:
        """Whether these keys are such that the kernel may read them where they lie."""
        return self.x.shape[-1] == self.width and self.x.dtype == self.dtype(tall)

    def of(self, batch: _Batch) -> torch.Tensor:
        """[R, H, L, W], a view or gathered."""
        if batch.in_place:
            x = self.x[batch.heads]
            step = int(batch.cols[1, 0] - batch.cols[0, 0]) if len(batch.cols) > 1 else 0
            stride = step * self.size * x.stride(1), *x.stride()
            offset = x.storage_offset() + int(batch.cols[0, 0]) * self.size * x.stride(1)
            return x.as_strided((len(batch.cols), len(x), batch.keys, x.shape[2]), stride, offset)
        strips, entries = batch.cols.shape
        whole = batch.keys // self.size
        index = torch.from_numpy(batch.cols[:, :whole].ravel())
        blocks = self.blocks[batch.heads]
        shape = len(blocks), len(index), *blocks.shape[2:]
        if self.buffer.numel() < (size := math.prod(shape)):
            self.buffer = blocks.new_empty(size)
        found = torch.index_select(blocks, 1, index, out=self.buffer[:size].view(shape))
        found = found.view(shape[0], strips, -1, shape[3])
        if whole < entries:
            tail = self.x[batch.heads, self.x.shape[1] // self.size * self.size :].unsqueeze(1)
            found = torch.cat([found, tail.expand(-1, strips, -1, -1)], 2)
        found = _padded(found, self.width, batch.dtype).transpose(0, 1)
        return self.masks.clean(batch, found)


class _Masks:
    """What PARTIAL blocks hide: scores by their tile, and keys that no query of the block sees."""

    def __init__(self, tiles: Tiles, block: tuple[int, int], dtype: torch.dtype, clean: bool) -> None:
        self.tiles, self.block, self.dtype, self.dirty = tiles, block, dtype, clean
        held = len(tiles.bits) * block[0] * block[1] * dtype.itemsize <= TILES_HELD
        # The last of these is the tile of a FULL block, so that -1 stands for one.
        self.held = self._unpacked(F.pad(tiles.bits, (0, 0, 0, 0, 0, 1), value=-1)) if held else None
        self.blind = F.pad((tiles.bits == 0).all(-1), (0, 0, 0, 1))  # [T + 1, BQ]: queries that see nothing of a tile
        self.last: tuple[object, torch.Tensor | None, torch.Tensor | None] = None, None, None

    def of(self, batch: _Batch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """0 or -inf [R or 1, 1, X, L] to add to scores, and which queries [R or 1, 1, X] see nothing; None: no such."""
        if batch.tiles is None:
            return None, None
        tiles = batch.tiles[:1] if (batch.tiles == batch.tiles[0]).all() else batch.tiles
        key = tiles.tobytes(), tiles.shape, batch.queries, batch.keys
        if self.last[0] != key:
            index = torch.from_numpy(tiles)
            if self.held is None:
                mask = self._unpacked(self.tiles.bits[index.clamp(min=0)])  # [R, E, BQ, BK]
                mask.masked_fill_((index < 0)[..., None, None], 0)
            else:
                mask = self.held[index]
            mask = mask.transpose(1, 2).flatten(2)[:, : batch.queries, : batch.keys].unsqueeze(1)
            blind = self.blind[index].all(1)[:, None, : batch.queries]
            # Of a tile at the end of a ragged length, often nothing is hidden but what lies past that end.
            cut = batch.queries < self.block[0] or batch.keys % self.block[1]
            self.last = key, None if cut and not mask.any() else mask, blind if blind.any() else None
        return self.last[1:]

    def clean(self, batch: _Batch, gathered: torch.Tensor) -> torch.Tensor:
        """Zero the rows of gathered keys or values [R, H, L, W] that no query sees: 0 * NaN would be NaN."""
        if batch.tiles is None or not self.dirty:
            return gathered
        index = torch.from_numpy(batch.tiles)
        unseen = self._hidden(self.tiles.seen_keys[index.clamp(min=0)]) & (index >= 0).unsqueeze(-1)
        return gathered.masked_fill(unseen.flatten(1)[:, None, : batch.keys, None], 0)

    def _unpacked(self, words: torch.Tensor) -> torch.Tensor:
        """Words [..., W] to [..., BK]: 0 where a bit is 1, -inf where it is 0."""
        hidden = self._hidden(words)
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)

    def _hidden(self, words: torch.Tensor) -> torch.Tensor:
        """Words [..., W] to booleans [..., BK], true where a bit is 0."""
        shifts = torch.arange(min(32, self.block[1]), dtype=torch.int32)
        return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2) == 0


def _padded(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The input [..., D] in `dtype`, with zeros up to [..., width]."""
    x = x.to(dtype)
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _merge(
    batch: _Batch, total: torch.Tensor, total_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, fresh: bool
) -> None:
    """Take the result of a batch into total [H, N, V] and total_lse [H, N]; if `fresh`, nothing is in them so far."""
    here, lse_here = batch.strips_of(total), batch.strips_of(total_lse)
    if fresh:
        here.copy_(out)
        lse_here.copy_(lse)
    else:
        new = torch.logaddexp(lse_here, lse)
        # A row that has seen nothing yet has -inf, which is to weigh 0.
        weight = torch.exp(lse - new.masked_fill(new == -torch.inf, 0))
        here.lerp_(out, weight.unsqueeze(-1))
        lse_here.copy_(new)
    batch.put(total, here)
    batch.put(total_lse, lse_here)
