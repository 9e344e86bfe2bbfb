"""Pattern: which query may see which key, as a small immutable value, independent of sequence length."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.compiling import compiled
from sparseflash.patterns.grid import LARGEST, Grid, Ints, is_int, make_grid
from sparseflash.patterns.memory import MAX_BYTES
from sparseflash.patterns.misuse import TRUTH, call_of, instead_of
from sparseflash.patterns.placed_image import PlacedImage
from sparseflash.patterns.rasterize import compile_leaf
from sparseflash.patterns.tiles import Words
from sparseflash.patterns.traced_constant import Constant

Bools: TypeAlias = NDArray[np.bool_]

# Precedence as in Python: text has parentheses only where they help the reader.
LEAF = 100


class Pattern(Constant, ABC):
    """Base class of all patterns: symbolic, hashable, independent of sequence length and block size.

    A subclass is a frozen dataclass that must define :meth:`allows`, its definition pair by pair. It may define the
    methods that make compiling linear in the stored blocks. Without them every block is evaluated, which is exact but
    takes O(N^2):

    - :meth:`full_runs`: stretches of blocks known to be fully allowed;
    - :meth:`candidates`: a superset of the other blocks that are not empty;
    - :meth:`keys`: candidates with equal keys have equal tiles, so each distinct key is evaluated once.

    Patterns combine with ``|``, ``&``, ``-``, ``~`` and :func:`per_head`.

    Example:
        >>> from sparseflash import patterns as P
        >>> p = P.causal() & (P.local(2) | P.strided(4))
        >>> str(p)
        'causal() & (local(2) | strided(4))'
        >>> import numpy as np
        >>> p.allows(np.array(9), np.arange(12)).nonzero()[0]
        array([1, 5, 7, 8, 9])
    """

    name: ClassVar[str]  # textual form, e.g. "local"; the class's name unless given
    precedence: ClassVar[int] = LEAF

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    @abstractmethod
    def allows(self, q: Ints, k: Ints) -> Bools:
        """Whether the query at position q may see the key at position k.

        Args:
            q: int64 positions of queries; may be negative under an offset.
            k: int64 positions of keys, of a shape that broadcasts with q.

        Returns:
            Booleans of the broadcast shape, with a leading [heads] axis under ``per_head``.
        """

    def at(self, grid: Grid) -> Pattern:
        """The pattern on this grid; another one only if it depends on the length of the sequence."""
        return self

    def coarser(self, tokens: int) -> Pattern:
        """A similar pattern in cells of at least this many tokens, for masks of nearly empty blocks; self if none."""
        return self

    def candidates(self, grid: Grid) -> tuple[Ints, Ints] | None:
        """Rows and columns of blocks that may hold an allowed pair and are in no full run; None: evaluate all."""
        return None

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints | None:
        """One integer per candidate; equal integers guarantee equal tiles. None: evaluate each candidate.

        Only whole blocks matter: the compiler keeps ragged last blocks separate.
        """
        return None

    def tiles(self, grid: Grid, rows: Ints, cols: Ints) -> Words | None:
        """Tiles of blocks, uint32 [n, BQ, ceil(BK / 32)], if there is a faster way than calling :meth:`allows`.

        Bits of tokens past the lengths are 0. None: call ``allows``.
        """
        return None

    def full_runs(self, grid: Grid) -> tuple[Ints, Ints, Ints] | None:
        """Rows with half-open column intervals whose tokens are all allowed; may overlap or leave the grid."""
        return None

    def compile_on(self, grid: Grid) -> BlockMask:
        """The pattern on a grid of blocks, from the methods above. :meth:`compile` calls it, and caches the result."""
        return BlockMask.of(compile_leaf(self.at(grid), grid))

    @property
    def orders_tokens(self) -> bool:
        """Whether the pattern needs its own token order, as image patterns do."""
        return any(part.orders_tokens for part in parts_of(self))

    @property
    def known_size(self) -> int | None:
        """Number of tokens that the arguments determine, as an image's shape does; None: any number.

        Also None if parts of the pattern are for different numbers of tokens.
        """
        sizes = {part.known_size for part in parts_of(self)} - {None}
        return sizes.pop() if len(sizes) == 1 else None

    def placed_images(self, start: int = 0) -> set[PlacedImage]:
        """The images of the pattern, if its first token is ``start``.

        Example:
            >>> from sparseflash import patterns as P
            >>> P.beside(P.axial((4, 6)), before=5).placed_images()
            {PlacedImage(start=5, shape=(4, 6), order='raster', tile=None)}
        """
        return set().union(*(part.placed_images(start) for part in parts_of(self)))

    def compile(
        self,
        seq_len: int | tuple[int, int],
        block: int | tuple[int, int] = 128,
        q_offset: int | None = None,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> BlockMask:
        """The pattern as a block mask, cached by (pattern, lengths, block, offset).

        Args:
            seq_len: tokens, or (q_len, kv_len).
            block: tokens per block side, one of 16, 32, 64, 128, 256, or (BQ, BK).
            q_offset: position of the first query; default ``kv_len - q_len``.
            max_bytes: limit of the memory that compiling may take, estimated in advance.

        Raises:
            TypeError: lengths, block or offset are not ints, or the pattern's class is not a frozen dataclass.
            ValueError: a length below 1, an unsupported block size, a pattern that cannot have these lengths, or one
                that needs more than ``max_bytes``.

        Warns:
            WastefulPattern: the mask of a long sequence stores many blocks for few allowed pairs.
        """
        return compiled(self, make_grid(seq_len, block, q_offset), max_bytes)

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, other) if isinstance(other, Pattern) else _refused("|", other)

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other) if isinstance(other, Pattern) else _refused("&", other)

    def __sub__(self, other: Pattern) -> Pattern:
        return Minus(self, other) if isinstance(other, Pattern) else _refused("-", other)

    def __invert__(self) -> Pattern:
        return Not(self)

    # Python calls these if the left operand is not a pattern.
    def __ror__(self, other: object) -> Pattern:
        return _refused("|", other)

    def __rand__(self, other: object) -> Pattern:
        return _refused("&", other)

    def __rsub__(self, other: object) -> Pattern:
        return _refused("-", other)

    __array_ufunc__: ClassVar[None] = None  # numpy leaves `array & pattern` to __rand__, instead of each element

    def __bool__(self) -> NoReturn:
        raise TypeError(f"the pattern {self} has no truth value; {TRUTH}")

    def __str__(self) -> str:
        """Text that :func:`sparseflash.parse` reads back, e.g. ``butterfly(unit=256)``."""
        arguments = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                arguments.append(repr(value))
            elif value != field.default:
                arguments.append(f"{field.name}={value!r}")
        return f"{self.name}({', '.join(arguments)})"

    def __repr__(self) -> str:
        return str(self)


@dataclasses.dataclass(frozen=True, repr=False)
class Binary(Pattern):
    """An operator between two patterns."""

    left: Pattern
    right: Pattern

    sign: ClassVar[str]

    def __str__(self) -> str:
        # Chains of one operator stay flat; mixed operators get parentheses even where Python would not need them.
        left = self.left if type(self.left) is type(self) or self.left.precedence == LEAF else Group(self.left)
        right = self.right if self.right.precedence == LEAF else Group(self.right)
        return f"{left} {self.sign} {right}"

    __repr__ = __str__

    def at(self, grid: Grid) -> Pattern:
        return type(self)(self.left.at(grid), self.right.at(grid))

    def coarser(self, tokens: int) -> Pattern:
        return type(self)(self.left.coarser(tokens), self.right.coarser(tokens))


@dataclasses.dataclass(frozen=True)
class Group:
    """A pattern in parentheses, for printing."""

    inner: Pattern

    def __str__(self) -> str:
        return f"({self.inner})"


class Or(Binary):
    """Allowed by either."""

    sign, precedence = "|", 1

    def compile_on(self, grid: Grid) -> BlockMask:
        return compile_pattern(self.left, grid) | compile_pattern(self.right, grid)

    def allows(self, q: Ints, k: Ints) -> Bools:
        return np.logical_or(self.left.allows(q, k), self.right.allows(q, k))


class And(Binary):
    """Allowed by both."""

    sign, precedence = "&", 2

    def compile_on(self, grid: Grid) -> BlockMask:
        return compile_pattern(self.left, grid) & compile_pattern(self.right, grid)

    def allows(self, q: Ints, k: Ints) -> Bools:
        return np.logical_and(self.left.allows(q, k), self.right.allows(q, k))


class Minus(Binary):
    """Allowed by the left one and not by the right one."""

    sign, precedence = "-", 3

    def compile_on(self, grid: Grid) -> BlockMask:
        return compile_pattern(self.left, grid) - compile_pattern(self.right, grid)

    def allows(self, q: Ints, k: Ints) -> Bools:
        return np.logical_and(self.left.allows(q, k), np.logical_not(self.right.allows(q, k)))


@dataclasses.dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Allowed exactly where the inner pattern is not."""

    inner: Pattern

    def compile_on(self, grid: Grid) -> BlockMask:
        return ~compile_pattern(self.inner, grid)

    def allows(self, q: Ints, k: Ints) -> Bools:
        return np.logical_not(self.inner.allows(q, k))

    def at(self, grid: Grid) -> Pattern:
        return Not(self.inner.at(grid))

    def coarser(self, tokens: int) -> Pattern:
        return Not(self.inner.coarser(tokens))

    def __str__(self) -> str:
        simple = self.inner.precedence == LEAF
        return f"~{self.inner}" if simple else f"~({self.inner})"

    __repr__ = __str__


def instead(value: Any) -> str | None:
    """What to write instead of a value that is not a pattern; None without a good guess.

    Example:
        >>> from sparseflash import patterns as P
        >>> instead(P.local)
        'local is not called: write local(window)'
        >>> instead(True)
        'True is not a pattern: write full(), or ~full() for nothing'
    """
    if isinstance(value, type):
        name = value.__name__
        return f"{name} is a class: write {call_of(name, value)}" if issubclass(value, Pattern) else None
    if isinstance(value, BlockMask):
        return (
            "a BlockMask is for given lengths, a pattern for any: "
            "compile the pattern first, pattern.compile(mask.shape, mask.block, mask.q_offset)"
        )
    return instead_of(value)


def _refused(sign: str, other: object) -> Pattern:
    """Refuse an operand that is not a pattern, with advice if there is any, otherwise with Python's own error."""
    words = instead(other)
    if words is not None:
        raise TypeError(f"{sign} joins patterns; {words}")
    python_asks_on: Pattern = NotImplemented
    return python_asks_on


def check_operands(owner: str, patterns: tuple[Pattern, ...]) -> None:
    """Raise unless there are operands and each is a pattern; the error says what to write instead."""
    if not patterns:
        raise ValueError(f"{owner} needs at least one pattern")
    for index, pattern in enumerate(patterns):
        if not isinstance(pattern, Pattern):
            words = instead(pattern)
            raise TypeError(f"{owner} takes patterns; operand {index} is {pattern!r}{f': {words}' * bool(words)}")


def holds(pattern: Pattern, kind: type[Pattern]) -> bool:
    """Whether an expression contains a pattern of this kind."""
    return isinstance(pattern, kind) or any(holds(part, kind) for part in parts_of(pattern))


def parts_of(pattern: Pattern) -> list[Pattern]:
    """The operands of an expression; none for a leaf."""
    inside = (getattr(pattern, f.name) for f in dataclasses.fields(pattern))  # type: ignore[arg-type]
    parts = [p for value in inside for p in (value if isinstance(value, tuple) else (value,))]
    return [p for p in parts if isinstance(p, Pattern)]


def checked_int(owner: str, name: str, value: Any, minimum: int) -> int:
    """Return an argument after checking that it is an int of at least ``minimum``; the error names the call."""
    if not is_int(value):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{owner}: {name} must be at least {minimum}, got {name}={value}")
    if value > LARGEST:
        raise ValueError(f"{owner}: {name} must be at most 2**40, got {name}={value}")
    return int(value)
