"""Drawings as text: what docs/make_drawings.py needs of SVG."""

from __future__ import annotations

from html import escape

from sparseflash.pictures.pixels import EMPTY_COLOUR, FULL_COLOUR, MASKED_COLOUR, PARTIAL_COLOUR

INK, GREY = "#222222", "#a0a0a0"


def colour(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


EMPTY, FULL, PARTIAL, MASKED = map(colour, (EMPTY_COLOUR, FULL_COLOUR, PARTIAL_COLOUR, MASKED_COLOUR))


class Drawing:
    """Rectangles, lines and words on paper, in pixels."""

    def __init__(self, width: int, height: int, about: str, paper: str = EMPTY, font: str = "monospace") -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{font}" font-size="13" role="img">',
            f"<title>{escape(about)}</title>",
        ]
        self.box(0, 0, width, height, paper, line=None)

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str | None = GREY) -> None:
        stroke = f' stroke="{line}"' if line else ""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{stroke}/>')

    def line(self, x0: float, y0: float, x1: float, y1: float, ink: str = GREY) -> None:
        self.parts.append(f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{ink}"/>')

    def words(self, x: float, y: float, text: str, ink: str = INK, anchor: str = "start", size: int = 13) -> None:
        """Text whose middle line is at y."""
        self.parts.append(
            f'<text x="{x:g}" y="{y + size * 0.35:g}" fill="{ink}" text-anchor="{anchor}" font-size="{size}">'
            f"{escape(text)}</text>"
        )

    def text(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])
