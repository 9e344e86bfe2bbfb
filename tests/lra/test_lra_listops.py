"""ListOps: the grammar's laws, and its files."""

import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflash.lra import LISTOPS, Grammar, open_corpus
from sparseflash.lra.listops import CLOSE, OPERATORS, SPLITS, SYMBOLS, majority_share
from sparseflash.lra.listops_files import ListOpsFile, write, written

Tree = int | tuple[str, list["Tree"]]
GRAMMARS = st.builds(
    Grammar,
    max_depth=st.integers(3, 6),
    max_args=st.integers(3, 6),
    min_length=st.integers(0, 12),
    max_length=st.integers(20, 60),
)


def parsed(words: list[str]) -> Tree:
    """The tree of symbols, by recursive descent; takes them from the list."""
    word = words.pop(0)
    if word.isdecimal():
        return int(word)
    arguments: list[Tree] = []
    while words[0] != "]":
        arguments.append(parsed(words))
    words.pop(0)
    return word, arguments


def value(tree: Tree) -> int:
    """As the original's `to_value` has it: the median is int(np.median), the sum is modulo 10."""
    if isinstance(tree, int):
        return tree
    values = [value(argument) for argument in tree[1]]
    return {
        "[MIN": min(values),
        "[MAX": max(values),
        "[MED": int(statistics.median(values)),
        "[SM": sum(values) % 10,
    }[tree[0]]


def depth(tree: Tree) -> int:
    return 1 if isinstance(tree, int) else 1 + max(map(depth, tree[1]))


def nodes(tree: Tree) -> list[tuple[str, list[Tree]]]:
    return [] if isinstance(tree, int) else [tree, *(node for argument in tree[1] for node in nodes(argument))]


def binary(tree: Tree) -> str:
    """As the original's `to_string` has it: ((op a) b) ], each pair in parentheses."""
    if isinstance(tree, int):
        return str(tree)
    text = tree[0]
    for argument in [*map(binary, tree[1]), "]"]:
        text = f"( {text} {argument} )"
    return text


@given(GRAMMARS, st.integers(0, 2**32), st.integers(0, 2**32))
@settings(max_examples=60)
def test_trees_obey_their_grammar_and_have_their_value(grammar: Grammar, seed: int, index: int) -> None:
    tokens, answer = grammar.draw(seed, index)
    assert grammar.min_length < len(tokens) < grammar.max_length
    words = [SYMBOLS[token] for token in tokens]
    tree = parsed(words)
    assert not words
    assert value(tree) == answer
    assert depth(tree) <= grammar.max_depth
    assert all(2 <= len(arguments) <= grammar.max_args for _, arguments in nodes(tree))
    assert written(tokens.tolist()) == binary(tree)
    again, _ = grammar.draw(seed, index)
    assert np.array_equal(tokens, again)


def test_the_arena_s_distribution() -> None:
    """A quarter of the nodes above the last level are operators, of each kind and each number of arguments alike.

    The length bounds favour large trees; what they cannot touch are the kinds, and given the tree's shape the digits.
    """
    drawn = [LISTOPS.draw(1, index) for index in range(150)]
    assert all(500 < len(tokens) < 2000 for tokens, _ in drawn)
    trees = [parsed([SYMBOLS[token] for token in tokens]) for tokens, _ in drawn]
    assert max(map(depth, trees)) == 10
    found = [node for tree in trees for node in nodes(tree)]
    kinds = Counter(kind for kind, _ in found)
    for kind in OPERATORS:  # 4.5 standard errors
        assert abs(kinds[kind] / len(found) - 1 / 4) < 4.5 * (3 / 16 / len(found)) ** 0.5
    assert {len(arguments) for _, arguments in found} == set(range(2, 11))
    digits = Counter(token for tokens, _ in drawn for token in tokens.tolist() if token < 10)
    for digit in range(10):
        assert abs(digits[digit] / digits.total() - 1 / 10) < 4.5 * (0.09 / digits.total()) ** 0.5
    # MIN and MAX of many arguments are mostly 0 and 9: the answers are not alike likely.
    assert 0.14 < majority_share(LISTOPS, 1000) < 0.20


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_depth": 1}, "max_depth must be in 2..100"),
        ({"max_args": 1}, "max_args must be in 2"),
        ({"min_length": 10, "max_length": 11}, "2 more than min_length"),
        ({"max_depth": 2, "max_args": 3, "min_length": 5, "max_length": 9}, "min_length is out of reach.*at most 5"),
    ],
)
def test_grammars_without_trees_are_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Grammar(**fields)


SHORT = Grammar(max_depth=3, max_args=4, min_length=8, max_length=30)


def test_files_hold_what_is_drawn(tmp_path: Path) -> None:
    assert write(tmp_path, SHORT, train=60, workers=2) == {"train": 60, "val": 1, "test": 1}
    with pytest.warns(UserWarning, match="not the published"):
        stored = open_corpus("listops", tmp_path)
    drawn = open_corpus("listops", grammar=SHORT)
    assert stored.splits == {"train": range(60), "val": range(60, 61), "test": range(61, 62)}
    for split, place in stored.splits.items():
        for i, index in enumerate(place):
            (tokens,), label = stored[index]
            (expected,), answer = drawn[SPLITS[split][i]]
            assert (tokens.tolist(), label) == (expected.tolist(), answer)
    with pytest.raises(FileExistsError, match=r"basic_train.tsv is there already"):
        write(tmp_path, SHORT, train=60)
    with pytest.raises(ValueError, match="1 to 96,000 trees; got 0"):
        write(tmp_path / "other", SHORT, train=0)
    assert not list(tmp_path.glob(".*"))


def test_lines_as_the_original_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "basic_train.tsv"
    file.write_bytes(
        b"Source\tTarget\r\n( ( ( [MAX 2 ) 9 ) ] )\t9\r\n( ( ( [SM ( ( ( [MED 1 ) 4 ) ] ) ) 9 ) ] )\t1\r\n"
    )
    found = ListOpsFile(file)
    assert len(found) == 2
    tokens, answer = found[1]
    assert ([SYMBOLS[token] for token in tokens], answer) == (["[SM", "[MED", "1", "4", "]", "9", "]"], 1)
    assert tokens[-1] == CLOSE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"source\ttarget\n[MAX 2 9 ]\t9\n", "must begin with"),
        (b"Source\tTarget\n", "has no lines after its header"),
        (b"", "has no lines"),
        (b"Source\tTarget\n( [MAX 2 )\t10\n", "line 2: the target must be a digit; got b'10'"),
        (b"Source\tTarget\n[MAX 2 9 ]\n", "line 2: the target must be a digit; got b''"),
        (b"Source\tTarget\n1\t1\n[AVG 2 9 ]\t5\n", r"line 3: b'\[AVG' is not a symbol of ListOps"),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "basic_train.tsv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        list(map(ListOpsFile(file).__getitem__, range(2)))
