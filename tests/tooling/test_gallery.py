"""The gallery shows every pattern, and what it says is what the code computes."""

from __future__ import annotations

import ast
import inspect
import re

import numpy as np
import pytest
from PIL import Image

from docs.gallery_entries import BLOCK, TOKENS, Entry, entries
from docs.make_gallery import PAGE, PICTURES, compiled, is_current, outdated, page, pictures, pixels
from sparseflash import patterns as P

TEXT = PAGE.read_text()


def constructors() -> list[str]:
    """Public functions that make a pattern from arguments; parse and register name patterns rather than make them."""
    functions = {name: getattr(P, name) for name in P.__all__ if inspect.isfunction(getattr(P, name))}
    made = [n for n, f in functions.items() if inspect.signature(f).return_annotation in ("Pattern", P.Pattern)]
    return sorted(set(made) - {"parse", "register"})


def test_every_pattern_is_shown() -> None:
    assert {"causal", "per_head", "where", "bigbird", "from_blocks"} <= set(constructors())
    called = {
        node.func.id
        for entry in entries()
        for node in ast.walk(ast.parse(entry.text, mode="eval"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    missing = set(constructors()) - called
    assert not missing, f"add {missing} to docs/gallery_entries.py and run make gallery"


def test_the_page_is_what_the_code_writes() -> None:
    assert page() == TEXT, "run make gallery"
    assert outdated() == []


def test_every_linked_file_and_heading_exists() -> None:
    files = re.findall(r'<img src="([^"]+)"', TEXT) + re.findall(r'srcset="([^"]+)"', TEXT)
    assert len(files) == len(set(files)) == 2 * len(list(entries()))
    assert all((PAGE.parent / file).is_file() for file in files)
    assert {(PAGE.parent / file).name for file in files} == {path.name for path in PICTURES.iterdir()}
    headings = {line[4:].lower().replace(" ", "-") for line in TEXT.splitlines() if line.startswith("### ")}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) == headings
    for name in ("README.md", "docs/README.md"):
        root = (PAGE.parent.parent / name).parent
        links = re.findall(r"\]\(([^)#:]+)\)", (PAGE.parent.parent / name).read_text())
        assert links
        assert all((root / link).exists() for link in links), name
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < 1_500_000


@pytest.mark.parametrize("entry", list(entries()), ids=lambda entry: entry.title)
def test_figures_and_pictures_agree_with_the_pattern_itself(entry: Entry) -> None:
    """Densities and pairs from what ``allows`` says, by nothing that the page was made with."""
    section = TEXT.split(f"### {entry.title}\n")[1].split("\n### ")[0]
    found = re.search(r"Blocks ([\d.]+)%, tokens ([\d.]+)%, (\d+) tiles?\.", section)
    assert found is not None
    grid = P.Grid(TOKENS, TOKENS, BLOCK, BLOCK, 0)
    truth = entry.pattern.at(grid).allows(np.arange(TOKENS)[:, None], np.arange(TOKENS)[None, :])
    truth = np.broadcast_to(truth, np.broadcast_shapes(truth.shape, (TOKENS, TOKENS))).reshape(-1, TOKENS, TOKENS)
    blocks = truth.reshape(len(truth), TOKENS // BLOCK, BLOCK, TOKENS // BLOCK, BLOCK).swapaxes(2, 3)
    some, every = blocks.any(axis=(3, 4)), blocks.all(axis=(3, 4))
    assert found[1] == f"{some.mean():.2%}"[:-1]
    assert found[2] == f"{truth.mean():.2%}"[:-1]
    assert int(found[3]) == len(
        np.unique(np.packbits(blocks[some & ~every].reshape(-1, BLOCK * BLOCK), axis=1), axis=0)
    )
    image = np.asarray(Image.open(PICTURES / entry.file).convert("RGB")).astype(int)
    strong = image[..., 2] < 190  # blue or orange; white, pale orange and the frame aside
    strong &= (image != image[..., :1]).any(axis=2)
    assert strong.sum() == truth.sum()


def test_dark_pictures_show_the_same_pairs() -> None:
    for entry in entries():
        light, dark = (np.asarray(Image.open(PICTURES / name).convert("RGB")) for name in pictures(entry))
        assert light.shape == dark.shape
        pairs = np.unique(np.concatenate([light, dark], axis=2).reshape(-1, 6), axis=0)
        assert len(pairs) == len(np.unique(pairs[:, :3], axis=0)) == len(np.unique(pairs[:, 3:], axis=0)), entry.title
        assert dark[0].max() < 128, "the frame, and what lies between two masks"


def test_every_picture_is_described() -> None:
    alts = re.findall(r'<img [^>]*alt="([^"]+)"', TEXT)
    assert len(set(alts)) == len(list(entries()))
    assert all(len(alt) > 40 for alt in alts)


def test_a_changed_picture_is_noticed() -> None:
    first = next(entries())
    wanted = pixels(compiled(first)).copy()
    assert is_current(PICTURES / first.file, wanted)
    wanted[100, 100] = 0
    assert not is_current(PICTURES / first.file, wanted)
    assert not is_current(PICTURES / "absent.png", wanted)
