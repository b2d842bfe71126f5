"""`Canvas`: SVG as text, with the few shapes, classes and colours that the picture is made of.

What looks alike has a class, and the style sheet has the colours of all of them twice: for light
viewers and for dark ones. A viewer that does not know the difference shows the light ones, on a
background of their own.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTH = 1120
LEFT, RIGHT = 24, 1096
"""How wide a picture is, and where its margins are."""

# What XML 1.0 has no place for, not even escaped.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_PAINTS: Mapping[str, tuple[str, str, str]] = {
    # class: property, light, dark
    "bg": ("fill", "#ffffff", "#0d1117"),
    "ink": ("fill", "#1f2328", "#e6edf3"),
    "dim": ("fill", "#6a737d", "#8b949e"),
    "lane": ("fill", "#eceff2", "#21262d"),
    "rule": ("stroke", "#d8dee4", "#30363d"),
    "hole": ("stroke", "#b3bac2", "#484f58"),
    # What may be done with a mapping.
    "p-none": ("fill", "#d0d4d9", "#3a4048"),
    "p-r": ("fill", "#b9d7f5", "#24486e"),
    "p-rx": ("fill", "#b7e0bd", "#235c33"),
    "p-rw": ("fill", "#f7dfa5", "#6b5316"),
    "p-rwx": ("fill", "#f3b0a5", "#7d2f2a"),
    # Whose a resident page is.
    "k-own": ("fill", "#47586b", "#a9b8c8"),
    "k-relative": ("fill", "#8250bf", "#b68be8"),
    "k-file": ("fill", "#bf7d0a", "#e3a63f"),
    "k-shared": ("fill", "#c2387f", "#f07ab5"),
    # What a fault wanted.
    "f-read": ("fill", "#0969da", "#58a6ff"),
    "f-write": ("fill", "#d1242f", "#ff7b72"),
    "f-execute": ("fill", "#1a7f37", "#3fb950"),
    "bad": ("fill", "#cf222e", "#ff7b72"),
    "wound": ("stroke", "#cf222e", "#ff7b72"),
    "good": ("fill", "#1a7f37", "#3fb950"),
    "pill": ("fill", "#ffffff", "#0d1117"),
}

_STYLE = """\
text{font:12px ui-sans-serif,system-ui,-apple-system,"Segoe UI","DejaVu Sans",Arial,sans-serif}
.mono{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;font-size:11.5px}
.small{font-size:11px}.big{font-size:20px;font-weight:600}.head{font-size:14px;font-weight:600}
.end{text-anchor:end}.middle{text-anchor:middle}
line,path{fill:none}.hole{stroke-dasharray:2 3}.stripes{fill:url(#stripes)}.part{opacity:.55}
.mapping:hover .lane,.mapping:hover .name{opacity:.7}
"""

_STRIPES = (
    '<defs><pattern id="stripes" width="5" height="5" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="2" height="5" class="bg" opacity=".5"/>'
    "</pattern></defs>"
)


def escaped(text: str) -> str:
    """Return text for XML, within an element or a quoted attribute."""
    text = _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace('"', "&quot;").replace("'", "&#39;")


def style_sheet() -> str:
    """Return the CSS of the classes."""
    light = "".join(f".{name}{{{what}:{value}}}" for name, (what, value, _) in _PAINTS.items())
    dark = "".join(f".{name}{{{what}:{value}}}" for name, (what, _, value) in _PAINTS.items())
    return f"{_STYLE}{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n"


def number(value: float) -> str:
    """Return a coordinate: a tenth of a pixel is enough."""
    return f"{value:.1f}".removesuffix(".0")


class Canvas:
    """SVG elements, in the order in which they were drawn. Coordinates are pixels."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[str] = []

    def begin(self, classes: str, title: str = "") -> None:
        """Begin a group; `title` shows while the mouse is over it."""
        self._parts.append(f'<g class="{classes}">{_title(title)}')

    def end(self) -> None:
        """End the group that was begun last."""
        self._parts.append("</g>\n")

    def rect(
        self, x: float, y: float, width: float, height: float, classes: str, *, title: str = "",
        radius: float = 0,
    ) -> None:  # fmt: skip
        """Draw a rectangle."""
        box = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        corners = f' rx="{number(radius)}"' if radius else ""
        start = f'<rect {box}{corners} class="{classes}"'
        self._parts.append(f"{start}>{_title(title)}</rect>" if title else f"{start}/>")

    def line(self, x1: float, y1: float, x2: float, y2: float, classes: str) -> None:
        """Draw a line."""
        self._parts.append(
            f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" '
            f'class="{classes}"/>'
        )

    def path(self, moves: str, classes: str) -> None:
        """Draw a path."""
        self._parts.append(f'<path d="{moves}" class="{classes}"/>')

    def mark(self, x: float, y: float, classes: str) -> None:
        """Draw a triangle that points down at (x, y)."""
        corners = f"{number(x - 5)},{number(y - 8)} {number(x + 5)},{number(y - 8)}"
        self._parts.append(
            f'<polygon points="{corners} {number(x)},{number(y)}" class="{classes}"/>'
        )

    def text(self, x: float, y: float, text: str, classes: str = "ink") -> None:
        """Write text; y is its base line."""
        self._parts.append(
            f'<text x="{number(x)}" y="{number(y)}" class="{classes}">{escaped(text)}</text>'
        )

    def svg(self, height: float, title: str) -> str:
        """Return the whole document."""
        size = f'width="{WIDTH}" height="{number(height)}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
            f'viewBox="0 0 {WIDTH} {number(height)}" role="img">\n'
            f"{_title(title)}<style>\n{style_sheet()}</style>{_STRIPES}\n"
            f'<rect width="100%" height="100%" class="bg"/>\n{"".join(self._parts)}</svg>\n'
        )


def _title(title: str) -> str:
    return f"<title>{escaped(title)}</title>" if title else ""
