"""Where files of the repository stand on the site: links are written for the repository, and the site follows them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
MOVED = {
    "README.md": "index.md",
    "docs/README.md": "index.md",  # a list of pages, which the site's own menu is
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/index.md",
}
CODE = re.compile(r"(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
# In Markdown, and in the HTML of pictures.
LINK = re.compile(r"""(?:(?<=\]\()|(?<=\bsrc=")|(?<=\bsrcset="))([^)"\s#]+)(#[^)"\s]*)?(?=[)"])""")


def place_of(path: str) -> str:
    """The page of the site that a file of the repository is.

    Example:
        >>> [place_of(path) for path in ("benchmarks/README.md", "examples/needle.py", "docs/gallery/x.png")]
        ['benchmarks/index.md', 'examples/needle.md', 'gallery/x.png']
    """
    if path in MOVED:
        return MOVED[path]
    if path.endswith((".py", ".ipynb")):
        return posixpath.splitext(path)[0] + ".md"
    return path.removeprefix("docs/")


def followed(text: str, path: str) -> str:
    """Markdown of a file of the repository, its relative links turned into those between pages of the site.

    Args:
        text: Markdown.
        path: the file it is, from the root of the repository.

    Example:
        >>> followed("see [figures](../benchmarks/README.md#cpu), [here](#a), `[x](y)`", "docs/cpu.md")
        'see [figures](benchmarks/index.md#cpu), [here](#a), `[x](y)`'
        >>> followed('<img src="docs/front/a.svg">', "README.md")
        '<img src="front/a.svg">'
    """
    page = place_of(path)

    def turned(link: re.Match[str]) -> str:
        if urlsplit(link[1]).scheme:
            return link[0]
        target = place_of(posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1])))
        return posixpath.relpath(target, posixpath.dirname(page) or ".") + (link[2] or "")

    return changed(text, prose=lambda part: LINK.sub(turned, part))


def referring(text: str, names: set[str]) -> str:
    """Markdown whose inline code links to the reference where it is a public name.

    Example:
        >>> referring("`sf.attention(q, k, v)` and `attention`", {"sparseflash.attention"})
        '[`sf.attention(q, k, v)`][sparseflash.attention] and `attention`'
    """

    def linked(code: str) -> str:
        name = re.sub(r"^sf\.", "sparseflash.", code.strip("`").partition("(")[0])
        return f"[{code}][{name}]" if name in names else code

    return changed(text, inline=linked)


def plain_cells(text: str) -> str:
    r"""Markdown whose code in tables has plain bars: the site takes them as they are, where GitHub wants `\|`.

    Example:
        >>> plain_cells(r"| `causal() \| local(8)` | 2 |")
        '| `causal() | local(8)` | 2 |'
    """
    return changed(text, inline=lambda code: code.replace("\\|", "|"))


PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\s*'
    r'<img src="([^"]+)"([^>]*)>\s*</picture>'
)


def both_schemes(text: str) -> str:
    """Markdown whose pictures for light and dark follow the site's switch, not the system alone.

    Example:
        >>> dark = '<source media="(prefers-color-scheme: dark)" srcset="d.svg">'
        >>> print(both_schemes(f'<picture>{dark}<img src="l.svg" alt="x"></picture>'))
        <img src="l.svg#only-light" alt="x"><img src="d.svg#only-dark" alt="x">
    """
    return PICTURE.sub(r'<img src="\2#only-light"\3><img src="\1#only-dark"\3>', text)


def changed(
    text: str,
    prose: Callable[[str], str] = lambda part: part,
    inline: Callable[[str], str] = lambda code: code,
) -> str:
    """Markdown, its prose and its inline code changed; code blocks, and code that is the text of a link, are left."""
    parts = CODE.split(text)
    for at, part in enumerate(parts):
        if at % 2 == 0:
            parts[at] = prose(part)
        elif not part.lstrip().startswith("```") and not parts[at - 1].endswith("[") and "\n" not in part:
            parts[at] = inline(part)
    return "".join(parts)
