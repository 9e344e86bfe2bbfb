"""ListOps: nested lists of digits with MIN, MAX, MED and SM (the sum modulo 10); the answer is a digit.

The task is that of Nangia and Bowman 2018, *ListOps: A Diagnostic Dataset for Latent Tree Learning*
(https://arxiv.org/abs/1804.06028), the distribution that of the Long Range Arena (``lra_benchmarks/data/listops.py``):

- a node is an operator with probability 1/4, else a digit; at the largest depth, the root being at depth 1, always a
  digit;
- an operator has 2 to ``max_args`` arguments, all numbers equally likely;
- the length counts digits, operators and closing brackets, and trees are drawn until it lies *between* the two bounds,
  both exclusive: 501 to 1,999;
- the median of an even number of digits is rounded down.

The original draws 100,000 distinct trees without a seed and splits them in the order of a hash set. Here tree i depends
on (seed, i) alone, so a set is a range of indices. Trees of more than 500 symbols practically never repeat; short trees
sometimes do.
"""

import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

OPERATORS: Final = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS: Final = (*map(str, range(10)), *OPERATORS, "]")
"""The symbol of each token id."""
CLOSE: Final = len(SYMBOLS) - 1
SPLITS: Final[dict[str, range]] = {
    "train": range(0, 96_000),
    "val": range(96_000, 98_000),
    "test": range(98_000, 100_000),
}
FRESH: Final = 100_000
"""No set contains trees from this index on."""

_OPERATOR_SHARE = 0.25
# Limits for configs of unknown origin: trees of 10,000 symbols are five times the Arena's longest.
_LIMITS: Final = {"max_depth": 100, "max_args": 1000, "min_length": 10_000, "max_length": 20_000}
# Symbols drawn for one tree before the search ends, in seconds. In the Arena's distribution one tree in a hundred fits.
_BUDGET = 10_000_000
# The value of each operator; `median_low` and `median_high` are the two values in the middle.
_EVALUATE: Final[tuple[Callable[[list[int]], int], ...]] = (
    min,
    max,
    lambda values: (statistics.median_low(values) + statistics.median_high(values)) // 2,
    lambda values: sum(values) % 10,
)


class _TooLongError(Exception):
    pass


def _longest(depth: int, arguments: int, enough: int) -> int:
    """Number of symbols of the longest tree, or a number above ``enough``."""
    longest = 1
    for _ in range(depth - 1):
        longest = 2 + arguments * longest
        if longest > enough:
            break
    return longest


@dataclass(frozen=True)
class Grammar:
    """A distribution of ListOps trees.

    Attributes:
        max_depth: largest depth of a tree; a root without arguments has depth 1.
        max_args: most arguments of an operator.
        min_length: trees are longer than this, in symbols.
        max_length: trees are shorter than this.

    Raises:
        ValueError: a number out of range, or bounds that no tree can meet.

    Example:
        >>> tokens, answer = Grammar(max_depth=3, max_args=4, min_length=8, max_length=16).draw(seed=0, index=5)
        >>> " ".join(SYMBOLS[token] for token in tokens), answer
        ('[MIN [SM 7 7 3 4 ] 9 ]', 1)
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 500
    max_length: int = 2000

    def __post_init__(self) -> None:
        for name, least in (("max_depth", 2), ("max_args", 2), ("min_length", 0), ("max_length", 0)):
            if type(getattr(self, name)) is not int or not least <= getattr(self, name) <= _LIMITS[name]:
                raise ValueError(f"{name} must be in {least}..{_LIMITS[name]:,}; got {getattr(self, name)!r}")
        if self.max_length < self.min_length + 2 or self.max_length < 5:
            raise ValueError(
                f"max_length must be at least 5 and 2 more than min_length, for neither is reached; got "
                f"{self.max_length!r} and {self.min_length!r}"
            )
        longest = _longest(self.max_depth, self.max_args, self.min_length)
        if longest <= self.min_length:
            raise ValueError(
                f"min_length is out of reach: trees of depth {self.max_depth} with {self.max_args} arguments have at "
                f"most {longest} symbols; got {self.min_length!r}"
            )

    def draw(self, seed: int, index: int) -> tuple[NDArray[np.uint8], int]:
        """Tree ``index`` of a seed: its symbols, as indices into `SYMBOLS`, and its value.

        Raises:
            ValueError: all trees among ten million symbols were too short or too long.
        """
        # Python guarantees that random() returns the same numbers for the same seed in every version.
        uniform = random.Random(f"listops {seed} {index}").random
        drawn = 0
        while drawn < _BUDGET:
            symbols: list[int] = []
            try:
                value = self._grow(1, symbols, uniform)
            except _TooLongError:
                continue
            finally:
                drawn += len(symbols)
            if len(symbols) > self.min_length:
                return np.array(symbols, np.uint8), value
        raise ValueError(
            f"no tree among {_BUDGET:,} symbols is longer than {self.min_length} and shorter than {self.max_length}: "
            f"let bounds lie further apart, or nearer to what the depth and the arguments give"
        )

    def _grow(self, depth: int, symbols: list[int], uniform: Callable[[], float]) -> int:
        """Append a random tree, in reading order, and return its value."""
        if depth == self.max_depth or uniform() >= _OPERATOR_SHARE:
            digit = int(10 * uniform())
            symbols.append(digit)
            return digit
        operator = int(len(OPERATORS) * uniform())
        symbols.append(10 + operator)
        arguments = 2 + int((self.max_args - 1) * uniform())
        values = [self._grow(depth + 1, symbols, uniform) for _ in range(arguments)]
        symbols.append(CLOSE)
        if len(symbols) >= self.max_length:
            raise _TooLongError
        return _EVALUATE[operator](values)


LISTOPS: Final = Grammar()
"""The distribution of the Long Range Arena."""


def majority_share(grammar: Grammar, trees: int = 1000) -> float:
    """Share of the most frequent answer among the first trees of seed 0, give or take half a standard error.

    Example:
        >>> 0.1 < majority_share(Grammar(max_depth=3, max_args=4, min_length=8, max_length=30), trees=200) < 0.3
        True
    """
    answers = Counter(grammar.draw(0, index)[1] for index in range(trees))
    return max(answers.values()) / trees
