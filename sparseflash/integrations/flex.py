"""Convert PyTorch's FlexAttention block masks to ours and back, exact to the token.

A FlexAttention mask is code: block indices, and a ``mask_mod`` that decides inside PARTIAL blocks. Ours is data: the
same blocks, and the bits of the PARTIAL ones.

Shape legend: B samples, H query heads, P distinct patterns, nQ x nK blocks of BQ x BK tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention.flex_attention import BlockMask as FlexMask

from sparseflash.integrations.mask_mods import MaskMod, Recording
from sparseflash.integrations.scanning import fitting_block, mask_of
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.described import described
from sparseflash.patterns.grid import BLOCK_SIZES, Grid, Ints, make_grid
from sparseflash.patterns.runs import EMPTY, FIRST_TILE, FULL, Runs
from sparseflash.patterns.set_operations import full_mask
from sparseflash.patterns.tiles import TileSet, pack, tile_table
from sparseflash.tables.device import tensor

# Token pairs evaluated by a mask_mod at once: bounds memory (it may hold several int64 arrays of this size).
PAIRS_AT_ONCE = 1 << 21
# FlexAttention's tables are dense: an int32 per block in each of about ten tables.
LARGEST_TABLE = 1 << 28


def from_flex(block_mask: FlexMask, *, q_offset: int = 0, B: int | None = None, H: int | None = None) -> BlockMask:
    """Convert a FlexAttention block mask to ours: the same token mask, in canonical form.

    Only blocks that FlexAttention lists as partial are evaluated; listed full blocks are taken as full, unlisted ones
    as empty. Tensors that ``mask_mod`` captures are read now: convert again after they change.

    Args:
        block_mask: from ``torch.nn.attention.flex_attention.create_block_mask`` or ``BlockMask.from_kv_blocks``, on any
            device, or from ``sparseflash.flex``. Blocks of other sizes than ours (384, 512, ...) are divided into the
            largest of ours. If no size of ours divides theirs (200, ...), all pairs are evaluated.
        q_offset: position of the first query. FlexAttention counts queries from 0, and so does the result; the mask
            does not depend on it, but biases by distance (``alibi_slopes``) do.
        B: number of samples. Required if ``mask_mod`` reads ``b`` and the block mask has one table for all samples:
            FlexAttention evaluates it for each sample of the batch then.
        H: number of query heads. Required likewise for ``h``.

    Returns:
        A :class:`sparseflash.patterns.BlockMask` of [B or 1, H or 1] masks.

    Raises:
        TypeError: not a FlexAttention block mask, or a mask_mod that does not return booleans.
        ValueError: a block side below 1, tables that do not cover the lengths, a block outside the tables or listed
            twice, a B or H that is missing or differs from that of the block mask.

    Source: Dong et al. (2024), "Flex Attention", https://arxiv.org/abs/2412.05496, and the PyTorch documentation.

    Example:
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> from sparseflash import patterns as P
        >>> from sparseflash.integrations.flex import from_flex
        >>> causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, 300, 300, device="cpu")
        >>> from_flex(causal) == P.causal().compile(300)
        True
    """
    if not isinstance(block_mask, FlexMask):
        raise TypeError(
            f"from_flex takes a BlockMask of torch.nn.attention.flex_attention, got {described(block_mask)}"
        )
    side = (int(block_mask.BLOCK_SIZE[0]), int(block_mask.BLOCK_SIZE[1]))
    lengths = (int(block_mask.seq_lengths[0]), int(block_mask.seq_lengths[1]))
    if (made := getattr(block_mask, "recorded", None)) is not None:
        return _moved(_checked(made, block_mask, (B, H)), q_offset)
    side = (_within(side[0], lengths[0]), _within(side[1], lengths[1]))
    grid = make_grid(lengths, (fitting_block(side[0]), fitting_block(side[1])), q_offset)
    whole = side[0] % grid.bq == 0 == side[1] % grid.bk
    theirs = grid if whole else Grid(*lengths, *side, q_offset)  # a block size that none of ours divides
    tables = [_four_dims(block_mask.kv_num_blocks, block_mask.kv_indices)]
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        tables.append(_four_dims(block_mask.full_kv_num_blocks, block_mask.full_kv_indices))
    samples, heads = np.broadcast_shapes(*(indices.shape[:2] for _, indices in tables))
    samples, heads = _asked_about(block_mask, (samples, heads), (B, H))

    blocks = [_listed(*table, samples, heads, theirs, side) for table in tables]
    _refuse_twice(np.sort(np.concatenate(blocks), kind="stable"), heads, theirs)
    if not whole:
        counted = replace(grid, q_offset=0)
        return _moved(_rounded(block_mask, blocks, (samples, heads), theirs, counted), q_offset)
    shape = (samples * heads * grid.rows, grid.cols)
    codes, tile_set = _evaluated(block_mask, blocks[0], heads, grid)
    linear = np.concatenate(blocks)
    codes = np.concatenate([codes, np.full(linear.size - codes.size, FULL, np.int32)])
    order = np.argsort(linear, kind="stable")
    linear, codes = linear[order], codes[order]
    pattern_of = np.arange(samples * heads, dtype=np.int32).reshape(samples, heads)
    mask = BlockMask.canonical(grid, Runs(shape, linear, linear + 1, codes), tile_set.tiles(), pattern_of)
    return mask & BlockMask.of(full_mask(grid))  # blocks at ragged ends reach past the tokens


def _asked_about(block_mask: FlexMask, have: tuple[int, int], given: tuple[int | None, int | None]) -> tuple[int, int]:
    """The numbers of samples and heads for which mask_mod has to be evaluated."""
    for name, size, number in zip("BH", have, given, strict=True):
        if number is not None and size not in (1, number):
            raise ValueError(f"the block mask has tables for {name}={size}, got {name}={number}")
    if have[0] > 1 < have[1] or not block_mask.kv_num_blocks.any():
        return have
    recording = Recording.of(block_mask.mask_mod, block_mask.kv_indices.device)
    found = []
    for name, what, looks, size, number in zip(
        *("BH", ("sample", "head"), (recording.looks_at_sample, recording.looks_at_head), have, given), strict=True
    ):
        if looks and size == 1 and number is None:
            raise ValueError(
                f"mask_mod reads {name.lower()}, the index of the {what}, but the block mask has one table for all of "
                f"them: give their number, from_flex(block_mask, {name}=...)"
            )
        found.append(number if looks and size == 1 and number is not None else size)
    return found[0], found[1]


def _within(size: int, tokens: int) -> int:
    """A block side, reduced if it is larger than needed to cover all tokens."""
    most = -(-tokens // BLOCK_SIZES[-1]) * BLOCK_SIZES[-1]
    if size < 1:
        raise ValueError(f"block sides must be at least 1 token, got BLOCK_SIZE={size}")
    return min(size, most)


def _checked(mask: BlockMask, block_mask: FlexMask, given: tuple[int | None, int | None]) -> BlockMask:
    """Our mask behind one of ``sparseflash.flex``, after checking the numbers of samples and heads."""
    for_one: tuple[bool, bool] = getattr(block_mask, "made_for_one", (False, False))
    for name, size, one, number in zip("BH", mask.pattern_of.shape, for_one, given, strict=True):
        if number is not None and (size not in (1, number) or (one and number > 1)):
            raise ValueError(f"the block mask was made with {name}={size}, got {name}={number}")
    return mask


def _moved(mask: BlockMask, q_offset: int) -> BlockMask:
    """The same mask with another position of the first query."""
    if q_offset == mask.q_offset:
        return mask
    return replace(mask, grid=replace(mask.grid, q_offset=q_offset), expression="")


def _refuse_twice(linear: Ints, heads: int, grid: Grid) -> None:
    for twice in linear[1:][linear[1:] == linear[:-1]][:1]:
        raise ValueError(f"the block mask lists {_place(twice, heads, grid)} twice")


def _rounded(block_mask: FlexMask, blocks: list[Ints], asked: tuple[int, int], theirs: Grid, grid: Grid) -> BlockMask:
    """The mask on blocks that do not divide theirs: evaluates every pair and looks up its block."""
    device = block_mask.kv_indices.device
    samples, heads = asked
    listed = np.zeros((2, samples * heads * theirs.rows * theirs.cols), bool)
    for chosen, linear in zip(listed, blocks, strict=False):
        chosen[linear] = True
    shape = (2, samples, heads, theirs.rows, theirs.cols)
    partial, full = torch.from_numpy(listed.reshape(shape)).to(device).unbind(0)

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        place = b, h, q // theirs.bq, k // theirs.bk
        return (partial[place] & block_mask.mask_mod(b, h, q, k)) | full[place]

    return mask_of(mask_mod, Recording.of(mask_mod, device), samples, heads, grid, device)


def _four_dims(counts: torch.Tensor, indices: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts [B, H, nQ] and indices [B, H, nQ, n] on the host; FlexAttention may leave out B and H."""
    missing = (1,) * (4 - indices.dim())
    n, index = (x.reshape(*missing, *x.shape).cpu().numpy().astype(np.int64) for x in (counts, indices))
    return n, index


def _listed(
    counts: NDArray[np.int64],
    indices: NDArray[np.int64],
    samples: int,
    heads: int,
    grid: Grid,
    side: tuple[int, int],
) -> Ints:
    """Linear indices, in the [samples * heads * nQ, nK] matrix of our blocks, of those inside the listed blocks."""
    rows, cols = -(-grid.q_len // side[0]), -(-grid.kv_len // side[1])
    if indices.shape[2] < rows:
        raise ValueError(
            f"{rows} block rows of {side[0]} cover {grid.q_len:,} queries, the block mask has {indices.shape[2]}"
        )
    indices = np.broadcast_to(indices, (samples, heads, *indices.shape[2:]))[:, :, :rows]
    counts = np.broadcast_to(counts, (samples, heads, counts.shape[2]))[:, :, :rows]
    b, h, row, slot = np.nonzero(np.arange(indices.shape[3]) < counts[..., None])
    col = indices[b, h, row, slot]
    for i in np.flatnonzero((col < 0) | (col >= cols))[:1]:
        raise ValueError(
            f"row {row[i]} of sample {b[i]}, head {h[i]} lists key block {col[i]}: "
            f"expected 0 to {cols - 1} for {grid.kv_len:,} keys in blocks of {side[1]}"
        )
    per_row, per_col = side[0] // grid.bq, side[1] // grid.bk
    row = row[:, None, None] * per_row + np.arange(per_row)[:, None]
    col = col[:, None, None] * per_col + np.arange(per_col)
    linear = (((b * heads + h)[:, None, None] * grid.rows) + row) * grid.cols + col
    inside: Ints = linear[(row < grid.rows) & (col < grid.cols)]
    return inside


def _place(linear: int, heads: int, grid: Grid) -> str:
    row, col = divmod(int(linear), grid.cols)
    p, row = divmod(row, grid.rows)
    return f"block ({row}, {col}) of sample {p // heads}, head {p % heads}"


def _evaluated(block_mask: FlexMask, linear: Ints, heads: int, grid: Grid) -> tuple[NDArray[np.int32], TileSet]:
    """Codes of blocks, from mask_mod at each of their pairs. Indices past the lengths are clamped to the last token.

    A mask_mod is written for single indices, so it is mapped over blocks, queries and keys, as in FlexAttention.
    """
    ask: MaskMod = block_mask.mask_mod
    for dims in ((None, None, None, 0), (None, None, 0, None), (0, 0, 0, 0)):
        ask = torch.vmap(ask, in_dims=dims)
    device = block_mask.kv_indices.device
    row, col = np.divmod(linear, grid.cols)
    p, row = np.divmod(row, grid.rows)
    q = row[:, None] * grid.bq + np.arange(grid.bq)
    k = col[:, None] * grid.bk + np.arange(grid.bk)
    questions = (p // heads, p % heads, np.minimum(q, grid.q_len - 1), np.minimum(k, grid.kv_len - 1))
    tile_set = TileSet(grid.bq, grid.bk)
    codes = np.full(linear.size, EMPTY, np.int32)
    step = max(1, PAIRS_AT_ONCE // (grid.bq * grid.bk))
    for start in range(0, linear.size, step):
        some = slice(start, start + step)
        with torch.no_grad():
            answer = ask(*(torch.from_numpy(x[some]).to(device) for x in questions))
        if answer.dtype != torch.bool:
            raise TypeError(f"mask_mod must return booleans, got {answer.dtype}")
        codes[some] = tile_set.codes(pack(answer.cpu().numpy()))
    return codes, tile_set


def to_flex(mask: BlockMask | FlexMask, device: torch.device | str = "cpu") -> FlexMask:
    """Convert our block mask to FlexAttention's, with a ``mask_mod`` that looks up the bits.

    The ``mask_mod`` is correct at every pair of tokens, listed or not, so it may be combined with others.

    Args:
        mask: a compiled pattern. A mask per head has as many heads as the queries. Its ``q_offset`` is lost: a
            ``score_mod`` in FlexAttention counts queries from 0. Or a block mask of ``sparseflash.flex``, which becomes
            one of torch's class with the same tables and ``mask_mod``.
        device: of the queries.

    Returns:
        A ``torch.nn.attention.flex_attention.BlockMask`` of (B, H, Q_LEN, KV_LEN), B and H 1 where all masks are equal.

    Raises:
        TypeError: mask is not a block mask.
        ValueError: more than 2**28 blocks over all samples and heads: FlexAttention's dense int32 tables would take
            more than 10 GB. Use larger blocks.

    Example:
        >>> import torch
        >>> from torch.nn.attention.flex_attention import flex_attention
        >>> from sparseflash import patterns as P
        >>> from sparseflash.integrations.flex import from_flex, to_flex
        >>> mask = P.streaming(sinks=4, window=300).compile(1000)
        >>> theirs = to_flex(mask)
        >>> theirs.shape, theirs.BLOCK_SIZE
        ((1, 1, 1000, 1000), (128, 128))
        >>> from_flex(theirs) == mask
        True
    """
    if isinstance(mask, FlexMask):
        whole: FlexMask = getattr(mask, "as_torch", lambda: mask)()
        return whole.to(device)
    if not isinstance(mask, BlockMask):
        raise TypeError(f"to_flex takes a BlockMask (pattern.compile(...)), got {described(mask)}")
    (nq, nk), (bq, bk), (samples, heads) = mask.grid_shape, mask.block, mask.pattern_of.shape
    if samples * heads * nq * nk > LARGEST_TABLE:
        raise ValueError(
            f"FlexAttention's tables would have {samples} x {heads} x {nq:,} x {nk:,} entries, more than "
            f"{LARGEST_TABLE:,}: use larger blocks"
        )
    device = torch.device(device)
    rows, cols, values = mask.runs.blocks()
    dense = np.zeros((mask.patterns * nq, nk), np.int32)
    dense[rows, cols] = values
    codes = tensor(dense.reshape(mask.patterns, nq, nk), device)
    pattern_of = tensor(mask.pattern_of, device)
    bits = tensor(tile_table(mask.tiles, bq, bk).view(np.int32), device)

    if device.type == "cpu":
        # For a second mask with another number of tiles, torch.compile would make these sizes symbolic, and Inductor's
        # C++ for FlexAttention does not compile when it gathers from tensors of symbolic size (torch 2.13).
        for table in (codes, pattern_of, bits):
            torch._dynamo.mark_static(table)

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        # Indexed only if the masks differ, so that a recording of this function shows whether it depends on b and h.
        pattern = pattern_of[b % samples if samples > 1 else 0, h % heads if heads > 1 else 0]
        code = codes[pattern, q_idx // bq, kv_idx // bk]
        key = kv_idx % bk
        return (bits[code, q_idx % bq, key // 32] >> (key % 32)) & 1 == 1

    partial, full = (_ordered(chosen, pattern_of) for chosen in (codes >= FIRST_TILE, codes == FULL))
    return FlexMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=(bq, bk), mask_mod=mask_mod, seq_lengths=mask.shape)


def _ordered(chosen: torch.Tensor, pattern_of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's table of the chosen blocks [P, nQ, nK]: counts [B, H, nQ] and columns, the chosen ones first."""
    counts = chosen.sum(-1, dtype=torch.int32)
    columns = chosen.byte().argsort(dim=-1, descending=True, stable=True).int()
    return counts[pattern_of], columns[pattern_of]
