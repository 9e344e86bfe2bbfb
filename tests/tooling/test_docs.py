"""Every block of code on a page runs, or the page says why it does not; links lead somewhere."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import make_drawings, make_families, make_front, make_presets
from docs.building import places
from sparseflash.patterns import parse
from tests import pages
from tests.pages import BLOCKS, PAGES, ROOT, Block, blocks_of
from tests.tooling import test_front_page

NEEDS = {"docs/diffusers.md": "diffusers", "docs/transformers.md": "transformers"}
SESSIONS = sorted({block.page for block in BLOCKS if block.is_session})
# The programs of this page talk to each other: tests/distributed/test_several_gpus_page.py runs them under torchrun.
ELSEWHERE = "docs/several-gpus.md"
RUN = [b for b in BLOCKS if b.language != "text" and not b.is_session and b.page != ELSEWHERE and b.why is None]
NOT_RUN = [block for block in BLOCKS if block.why is not None]
SECONDS = 240  # a machine that other work shares


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, for what examples write."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", SESSIONS)
def test_sessions_of_the_page_answer_what_they_show(page: str, place: Path) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"{NEEDS[page]} is not installed")
    failed, tried = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed


@pytest.mark.parametrize("block", RUN, ids=str)
def test_programs_and_commands_of_the_pages_run(block: Block, place: Path) -> None:
    done = run(block, place)
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr[-4000:]}"


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_what_is_not_run_says_why(block: Block) -> None:
    assert block.why
    pytest.skip(f"{block}: {block.why}")


def run(block: Block, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a block in an empty folder, where `python` and `sparseflash` are those of this checkout."""
    commands = place / "bin"
    commands.mkdir()
    for name, call in (("python", ""), ("sparseflash", "-m sparseflash ")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call}"$@"\n')
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(commands), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        "OMP_NUM_THREADS": "1",
    }
    shell = ["bash", "-euc", block.code]
    command = shell if block.language == "bash" else [sys.executable, "-c", block.code]
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def test_a_block_that_fails_is_noticed(place: Path) -> None:
    bash, python = blocks_of("```bash\nfalse\ntrue\n```\n\n```python\nassert not 1\n```\n", "x.md")
    assert run(bash, place).returncode != 0
    (place / "again").mkdir()
    assert run(python, place / "again").returncode != 0


def test_every_block_has_a_language_and_every_fence_is_one() -> None:
    for path in PAGES:
        page = path.relative_to(ROOT).as_posix()
        blocks = [block for block in BLOCKS if block.page == page]
        assert len(re.findall(r"^ *(?:```|~~~)", path.read_text(), re.MULTILINE)) == 2 * len(blocks), page
        for block in blocks:
            assert block.language in ("python", "bash", "text"), f"{block}: name the language; text is not run"
            assert block.why is None or not block.is_session, f"{block}: sessions of a page run together"


def test_what_is_not_run_is_listed_in_one_place() -> None:
    section = (
        (ROOT / "CONTRIBUTING.md").read_text().split("## Code on pages that tests do not run\n")[1].split("\n## ")[0]
    )
    listed = re.findall(r"^- (\S+), `([^`]+)`: (.+?)\.$", section, re.MULTILINE)
    assert listed == [
        (block.page, block.code.splitlines()[0].partition("  #")[0].rstrip(), block.why) for block in NOT_RUN
    ]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in places.LINK.finditer(page.read_text()):
            assert "://" in link[1] or (page.parent / link[1]).exists(), f"{page.name} links to {link[1]}"


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in listed, page.name


def test_drawings_are_what_the_code_draws() -> None:
    assert make_drawings.outdated() == [], "run make gallery"


def test_messages_of_the_command_line_on_the_troubleshooting_page_are_in_the_code() -> None:
    section = (ROOT / "docs/troubleshooting.md").read_text().split("## The command line\n")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) >= 8
    code = "\n".join(path.read_text() for folder in ("sparseflash", "patterns", "kernels")
                     for path in (ROOT / folder).rglob("*.py"))  # fmt: skip
    code = re.sub(r"""["']\n\s*f?["']""", "", code)  # literals that go on in the next line
    for message in messages:
        # What varies is in capitals, quotes or brackets, or a number of an option.
        parts = re.split(r"\b[A-Z_]{3,}\b|'[^']*'|\[\.\.\.\]|--lr [\d.]+|\btext\b", message)
        for part in parts:
            assert part.strip() in code, f"{message!r}: nothing says {part!r}"


def test_tables_of_the_presets_page_are_what_the_code_says() -> None:
    text = make_presets.PAGE.read_text()
    assert make_presets.page(text) == text, "run make gallery"
    assert {found[2] for found in make_presets.TABLE.finditer(text)} == {"presets", *make_presets.CLASSES}


@pytest.mark.parametrize(("file", "name", "transposed"), [("rows.svg", "row", False), ("columns.svg", "column", True)])
def test_drawings_of_lists_say_what_the_pairs_say(file: str, name: str, transposed: bool) -> None:
    """Lists of blocks from the pairs themselves, by nothing that makes masks or tables."""
    n, b = make_drawings.TOKENS, make_drawings.BLOCK
    pairs = parse(make_drawings.EXAMPLE).compile(n).to_dense()
    blocks = pairs.reshape(n // b, b, n // b, b).swapaxes(1, 2)
    if transposed:
        blocks = blocks.swapaxes(0, 1)
    words = re.findall(r">([^<>\n]+)</text>", (make_drawings.FOLDER / file).read_text())
    for line in range(n // b):
        start = words.index(f"{name} {line}") + 1
        end = words.index(f"{name} {line + 1}") if line + 1 < n // b else len(words)
        spans, entries = words[start : start + 2], words[start + 2 : end]
        full = [int(e) for at, e in enumerate(entries) if e.isdigit() and entries[at + 1 : at + 2] != ["t"]]
        tiled = [int(entries[at - 1]) for at, e in enumerate(entries) if e.startswith("t")]
        every, some = blocks[line].all(axis=(1, 2)), blocks[line].any(axis=(1, 2))
        assert full == [i for i in range(n // b) if every[i]] + tiled, f"{name} {line}"
        assert tiled == [i for i in range(n // b) if some[i] and not every[i]], f"{name} {line}"
        lengths = [int(stop) - int(begin) for begin, stop in (re.findall(r"\d+", span) for span in spans)]
        assert lengths == [every.sum(), some.sum() - every.sum()]


@pytest.mark.parametrize(
    "module",
    [pages, places, make_families, make_front, make_presets, test_front_page],
    ids=lambda module: module.__name__,
)
def test_examples_of_these_helpers_run(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert tried
    assert not failed
