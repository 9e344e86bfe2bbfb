"""The front page is short and reads easily, and what is said of the headline figures is all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sparseflash
from docs import make_front
from tests.pages import PAGES, ROOT, prose_of

README = (ROOT / "README.md").read_text()
MOST_WORDS = 700
MOST_IN_A_PARAGRAPH = 80
# On Flesch's scale 60 and above is plain English, 30 to 50 is academic writing. The page's subject brings words such as
# "attention" and "compile", three and two syllables each, so it is not asked to be easier than plain.
LEAST_EASE = 60
# Pages about these two figures at length; they have the same caveats, in sections of their own.
AT_LENGTH = {"docs/path256.md", "benchmarks/path256.md"}
CAVEATS = ("re-implementation of the generator", "97.4 %, 96.8 to 97.9", "not evaluated", "726 of 65,536")


def plain(text: str) -> str:
    r"""Prose as it is read: no code, no HTML, no tables, no headings; the texts of links stay.

    Example:
        >>> plain("# A\n\nSee [the page](x.md) or `y`.\n\n| a | b |\n|---|---|\n")
        'See the page or y.'
    """
    text = re.sub(r"<!--.*?-->|<picture>.*?</picture>", "", prose_of(text), flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    kept = [line for line in text.splitlines() if not line.startswith(("#", "|"))]
    return "\n".join(kept).replace("`", "").replace("*", "").strip()


def paragraphs(text: str) -> list[str]:
    """Prose between empty lines."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", plain(text)) if part.strip()]


def syllables(word: str) -> int:
    """Groups of vowels, without a silent e at the end.

    Example:
        >>> [syllables(word) for word in ("mask", "pattern", "compile", "table", "attention")]
        [1, 2, 2, 2, 3]
    """
    word = word.lower()
    found = len(re.findall(r"[aeiouy]+", word))
    silent = re.search(r"[^aeiouy]e$", word) and not re.search(r"[^aeiouy]le$", word)
    return max(1, found - bool(silent))


def ease(text: str) -> float:
    """Flesch's reading ease: 206.835 - 1.015 words a sentence - 84.6 syllables a word.

    Example:
        >>> round(ease("The cat sat on the mat. It was warm."))
        118
    """
    parts = [part for paragraph in paragraphs(text) for part in re.split(r"(?<=[.!?:;])\s+", paragraph)]
    sentences = [words for part in parts if (words := re.findall(r"[A-Za-z][A-Za-z'-]*", part))]
    words = [word for sentence in sentences for word in sentence]
    return 206.835 - 1.015 * len(words) / len(sentences) - 84.6 * sum(map(syllables, words)) / len(words)


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS
    long = [text for text in paragraphs(README) if len(text.split()) > MOST_IN_A_PARAGRAPH]
    assert long == []


def test_the_readme_reads_easily() -> None:
    assert ease(README) >= LEAST_EASE


def test_long_sentences_of_long_words_are_noticed() -> None:
    assert ease("Heterogeneous implementations necessitate comprehensive documentation of configurability.") < 0


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_headline_figures_come_with_all_that_belongs_to_them(path: Path) -> None:
    """Who drew the images, that the release was not evaluated, which pixels are tokens: in the same sentence."""
    if path.relative_to(ROOT).as_posix() in AT_LENGTH:
        pytest.skip("a page about these figures")
    text = re.sub(r"\s+", " ", path.read_text())
    for sentence in re.split(r"(?<=[a-z).])\. (?=[A-Z])|(?<=\.) - | \| ", text):
        if re.search(r"\b(97\.6|95\.5) %", sentence):
            missing = [caveat for caveat in CAVEATS if caveat not in sentence]
            assert not missing, f"{path.name}: {sentence} lacks {missing}"


def test_the_readme_installs_from_a_checkout_until_there_is_a_release() -> None:
    for path in PAGES:
        assert not re.search(r"pip install [\"']?sparseflash(?!-\*)", path.read_text()), path.name


def test_the_citation_is_of_the_newest_release_in_the_changelog() -> None:
    version, date = re.findall(r"^## \[(\d[^\]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation
    assert sparseflash.__version__ == version or ".dev" in sparseflash.__version__


def test_the_pictures_are_what_the_code_draws() -> None:
    assert make_front.outdated() == [], "run make gallery"
    names = set(re.findall(r"docs/front/([\w.-]+)", README))
    assert names == set(make_front.drawings())


def test_the_picture_says_what_was_measured() -> None:
    lines = {line.name: line.points for line in make_front.series("fwd", make_front.THEMES["light"])}
    assert set(lines) == {"sparseflash", "FlexAttention", "dense SDPA"}
    row = make_front.rows()[65536]
    assert lines["sparseflash"][65536] == row["ours_fwd_ms"] / row["heads"]
    drawn = make_front.drawings()["attention-light.svg"]
    for name, points in lines.items():
        assert f">{name} {make_front.seconds(points[65536])}<" in drawn
    assert "AMD EPYC" in drawn
    assert "2026-11-30" in drawn
    assert "AMD EPYC, 2 threads, 2026-11-30" in README
