"""Hypothesis strategies: random patterns and shapes, sized so that a failing case can be read."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from sparseflash.patterns.documents import Documents
from sparseflash.patterns.pattern import holds

BLOCKS = (16, 32, 64, 128, 256)
# A campaign (tests/fuzz) draws larger expressions and longer sequences than the suite has time for.
WIDER = 2 if os.environ.get("SPARSEFLASH_FUZZ") else 1

# Grids of 1 to 3 axes with a place for every token that is asked about, whatever their sides divide.
GRIDS = ((5200,), (64, 88), (80, 72), (45, 121), (20, 17, 16), (16, 16, 22), (3, 44, 40))


@st.composite
def orders(draw: st.DrawFn, axes: int) -> dict[str, Any]:
    """An order of tokens, and tiles that need not divide the grid."""
    order = draw(st.sampled_from(["raster", "tile", "morton", "hilbert"]))
    side = st.integers(1, (200, 16, 6)[axes - 1])
    return {"order": order, "tile": tuple(draw(side) for _ in range(axes)) if order == "tile" else None}


@st.composite
def windows(draw: st.DrawFn) -> Pattern:
    """A neighborhood with any window, stride, dilation, causal axes and border that fit."""
    shape = draw(st.sampled_from(GRIDS))
    dilation = [draw(st.integers(1, min(n, 4))) for n in shape]
    border = draw(st.sampled_from(["clip", "shift"]))
    # Small windows more often than large ones, which see almost everything.
    size = [draw(st.integers(1, n // d) | st.integers(1, min(5, n // d))) for n, d in zip(shape, dilation, strict=True)]
    return P.neighborhood(
        shape,
        kernel_size=tuple(size),
        stride=tuple(draw(st.integers(1, w)) for w in size),
        dilation=tuple(dilation),
        is_causal=tuple(draw(st.booleans()) for _ in shape),
        border=border,
        **draw(orders(len(shape))),
    )


@st.composite
def images(draw: st.DrawFn) -> Pattern:
    """Neighborhoods with a radius, and lines."""
    shape = draw(st.sampled_from(GRIDS))
    order = draw(orders(len(shape)))
    if draw(st.booleans()):
        return P.axial(shape, **order)
    return P.neighborhood(shape, tuple(draw(st.integers(0, 9)) for _ in shape), **order)


@st.composite
def videos(draw: st.DrawFn) -> Pattern:
    """Whole tiles, and masks of frames."""
    kind = draw(st.sampled_from(["sliding_tile", "spatial", "temporal", "radial"]))
    if kind == "sliding_tile":
        shape = draw(st.sampled_from(GRIDS))
        tile = tuple(draw(st.integers(1, n)) for n in shape)
        tiles = (-(-n // t) for n, t in zip(shape, tile, strict=True))
        window = tuple(draw(st.sampled_from([*range(1, m + 1, 2), m])) for m in tiles)
        return P.sliding_tile(shape, tile, window, draw(st.sampled_from(["tile", "raster", "morton"])))
    tokens = draw(st.integers(1, 700))
    frames = -(-5200 // tokens)
    if kind == "radial":
        near = draw(st.none() | st.integers(0, tokens))
        return P.radial(
            frames, tokens, decay=draw(st.floats(0.01, 4)), neighbors=near, narrowest=draw(st.integers(1, 300))
        )
    return (P.spatial if kind == "spatial" else P.temporal)(
        frames, tokens, draw(st.integers(0, 9)), first=draw(st.booleans())
    )


named_leaves = st.one_of(
    st.just(P.full()),
    st.just(P.causal()),
    st.builds(P.local, st.integers(0, 300)),
    st.builds(P.strided, st.integers(1, 20), st.integers(1, 80)),
    st.builds(P.butterfly, st.integers(1, 80), st.none() | st.integers(1, 16)),
    st.builds(P.dilated, st.integers(0, 30), st.integers(1, 200)),
    st.builds(
        lambda lengths, causal: P.documents([*lengths, 5000], causal=causal),
        st.lists(st.integers(0, 300), max_size=8),
        st.booleans(),
    ),
    st.integers(1, 20).flatmap(lambda s: st.builds(P.fixed, st.just(s), st.integers(0, s), st.integers(1, 80))),
    st.just(P.log_sparse()),
    windows(),
    images(),
    videos(),
    st.builds(P.columns, st.lists(st.integers(0, 700), min_size=1, max_size=5)),
    st.builds(P.diagonals, st.lists(st.integers(-300, 700), min_size=1, max_size=5)),
    st.builds(P.random_blocks, st.integers(0, 5), st.integers(1, 90), st.integers(0, 3)),
    st.builds(P.prefix, st.integers(0, 400)),
    st.just(P.star()),
    st.builds(P.bigbird, st.integers(1, 80), st.sampled_from([1, 3, 5]), st.integers(0, 2), st.integers(0, 3)),
    st.builds(P.streaming, st.integers(0, 200), st.integers(1, 300)),
    st.builds(
        lambda inner, before, sees, seen: P.beside(inner, before, sees=sees, seen=seen),
        st.sampled_from([P.causal(), P.local(9), P.butterfly(unit=7), P.dilated(3, 40), P.documents([90, 4990])]),
        st.integers(0, 300),
        st.booleans(),
        st.booleans(),
    ),
    st.lists(
        st.sampled_from(
            [
                P.neighborhood((9, 11), 2),
                P.beside(P.axial((6, 6), "morton"), before=5, seen=False),
                P.documents([70]) & P.causal(),
                P.documents([30, 40, 0]),
            ]
        ),
        min_size=1,
        max_size=4,
    ).map(lambda parts: P.packed(*parts)),
    st.builds(P.global_tokens, st.integers(0, 80) | st.lists(st.integers(0, 700), min_size=1, max_size=5)),
)


def _predicate(a: int, b: int, modulus: int) -> Pattern:
    return P.where(lambda q, k: (a * q + b * k) % modulus == 0)


def _random_cells(seed: int, unit: int, density: float) -> Pattern:
    cells = -(-5200 // unit)
    return P.from_blocks(np.random.default_rng(seed).random((cells, cells)) < density, unit=unit)


leaves = st.one_of(
    named_leaves,
    st.builds(_predicate, st.integers(0, 3), st.integers(0, 3), st.integers(1, 5)),
    st.builds(_random_cells, st.integers(0, 99), st.integers(8, 200), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
)


def combined(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    """One more operator around smaller patterns."""
    return st.one_of(
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda a: ~a, inner),
    )


def expressions(base: st.SearchStrategy[Pattern] = leaves) -> st.SearchStrategy[Pattern]:
    """Patterns without heads."""
    return st.recursive(base, combined, max_leaves=4 * WIDER)


def per_head(heads: int, base: st.SearchStrategy[Pattern] = leaves) -> st.SearchStrategy[Pattern]:
    """Patterns with one mask a head, some of them equal."""
    return st.lists(expressions(base), min_size=heads, max_size=heads).map(lambda ps: P.per_head(*ps))


def per_sample(base: st.SearchStrategy[Pattern] = leaves) -> st.SearchStrategy[Pattern]:
    """Patterns with one mask per sample, some of which have one per head."""
    parts = expressions(base) | per_head(3, base)
    return st.lists(parts, min_size=2, max_size=2).map(lambda ps: P.per_sample(*ps))


def compiled_for(choices: Mapping[str, Sequence[Any]], forms: int | None) -> st.SearchStrategy[dict[str, Any]]:
    """What kernels are compiled for: any combination of choices; or one of so many forms, where every choice occurs.

    Every new combination compiles for seconds on a GPU, and one that was met before takes milliseconds.
    """
    if forms is None:
        return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})
    dealt = []
    for shift, values in enumerate(choices.values()):
        if len(values) > forms:
            raise ValueError(f"{forms} forms cannot hold {len(values)} choices: {values}")
        hand = [values[i % len(values)] for i in range(forms)]
        random.Random(shift).shuffle(hand)
        dealt.append(hand)
    return st.sampled_from([dict(zip(choices, row, strict=True)) for row in zip(*dealt, strict=True)])


def is_placed(pattern: Pattern, q_len: int, kv_len: int, q_offset: int | None) -> bool:
    """Whether a pattern takes these lengths: documents do not guess where more queries than keys begin."""
    unsaid = q_len > kv_len and q_offset in (None, kv_len - q_len)
    return not (unsaid and holds(pattern, Documents))


@dataclass(frozen=True)
class Shape:
    """Lengths, block and offset to compile for."""

    q_len: int
    kv_len: int
    block: tuple[int, int]
    q_offset: int | None

    @property
    def offset(self) -> int:
        return self.kv_len - self.q_len if self.q_offset is None else self.q_offset

    def compile(self, pattern: Pattern) -> P.BlockMask:
        if not is_placed(pattern, self.q_len, self.kv_len, self.q_offset):
            assume(False)
        return pattern.compile((self.q_len, self.kv_len), block=self.block, q_offset=self.q_offset)

    def truth(self, pattern: Pattern) -> np.ndarray:
        """What the pattern says, pair by pair."""
        q = np.arange(self.q_len)[:, None] + self.offset
        block = self.block
        grid = P.Grid(self.q_len, self.kv_len, *block, self.offset)
        return np.asarray(pattern.at(grid).allows(q, np.arange(self.kv_len)[None, :]))


def shapes(max_len: int = 600) -> st.SearchStrategy[Shape]:
    lengths = st.integers(1, min(max_len * WIDER, 5000))  # what the largest leaves cover
    return st.builds(
        Shape,
        lengths,
        lengths,
        st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS)),
        st.none() | st.integers(-100, 100),
    )


@st.composite
def cross_documents(draw: st.DrawFn, max_len: int = 150) -> tuple[Pattern, Shape]:
    """Packed queries and keys of other lengths, among other patterns, and a shape that they fit."""
    length = st.integers(0, max_len)
    lengths, kv_lengths = zip(*draw(st.lists(st.tuples(length, length), min_size=1, max_size=6)), strict=True)
    assume(sum(lengths) and sum(kv_lengths))
    block = draw(st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS)))
    shape = Shape(sum(lengths), sum(kv_lengths), block, None)
    pattern = P.documents(lengths, kv_lengths=kv_lengths, causal=draw(st.booleans()))
    return draw(st.sampled_from([pattern, ~pattern, pattern & P.strided(3), P.per_head(pattern, P.causal())])), shape
