"""A self-contained HTML page: elements that escape their text, embedded pictures, styles for light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image

LARGEST_PNG = 200_000  # bytes; a picture that needs more is embedded as JPEG

STYLE = """
:root { color-scheme: light dark; }
:root { --ground: #fff; --ink: #1c1e21; --faint: #5f6670; --line: #d9dce1; --card: #f6f7f9; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181b; --ink: #e4e6e9; --faint: #9aa1ab; --line: #34383e; --card: #1e2125; --bad: #ff8a80; }
  img.drawn { filter: invert(0.92) hue-rotate(180deg); }
}
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1rem 0 .4rem; }
nav a { margin-right: 1rem; color: inherit; }
.rows { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem; }
.panels figure { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .8rem; }
.panels h3 { margin: 0 0 .2rem; }
.panels img { width: 100%; }
figure { margin: 0; }
figcaption { font-size: .85rem; color: var(--faint); overflow-wrap: anywhere; }
.pairs figure { max-width: 10rem; }
.pairs b { color: var(--ink); }
img { max-width: 100%; height: auto; display: block; }
img.pixels { image-rendering: pixelated; outline: 1px solid var(--line); }
table { border-collapse: collapse; font-size: .9rem; margin: .4rem 0 1rem; display: block; overflow-x: auto; }
td, th { text-align: left; padding: .15rem 1.4rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
th { color: var(--faint); font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
pre { padding: .8rem; overflow-x: auto; font-size: .82rem; }
.faint { color: var(--faint); }
.bad { color: var(--bad); }
"""
# The browser neither fetches nor runs anything, whatever the page may contain.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_VOID = ("img", "meta")


class Html(str):
    """Markup. Any other string is text, which `element` escapes."""


def element(tag: str, *content: Any, **attributes: Any) -> Html:
    """One element; ``class_`` stands for `class`. Text and attributes are escaped here and nowhere else."""
    given = "".join(f' {name.rstrip("_")}="{escape(str(value))}"' for name, value in attributes.items())
    if tag in _VOID:
        return Html(f"<{tag}{given}>")
    return Html(f"<{tag}{given}>{join(content)}</{tag}>")


def join(content: Iterable[Any]) -> Html:
    """Concatenate pieces: markup unchanged, text escaped."""
    return Html("".join(piece if isinstance(piece, Html) else escape(str(piece)) for piece in content))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """A table; without a head row if ``head`` is empty."""
    top = [element("tr", *(element("th", name) for name in head))] if head else []
    return element("table", *top, *(element("tr", *(element("td", cell) for cell in row)) for row in rows))


def picture(image: Image.Image, about: str, side: int, wanted: int) -> Html:
    """A picture of at most ``side`` pixels; a small one is enlarged by a whole factor towards ``wanted``."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind, data = "png", _encoded(image, format="PNG", optimize=True)
    if len(data) > LARGEST_PNG:
        kind, data = "jpeg", _encoded(image, format="JPEG", quality=85)
    factor = max(1, wanted // image.width)
    return element(
        "img", class_="pixels", width=image.width * factor, alt=about, src=f"data:image/{kind};base64,{_text(data)}"
    )


def drawing(svg: bytes, about: str) -> Html:
    """A drawing of dark lines on a transparent ground, inverted in dark mode."""
    return element("img", class_="drawn", alt=about, src=f"data:image/svg+xml;base64,{_text(svg)}")


def page(title: str, *content: Any) -> str:
    """The complete file."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("meta", name="viewport", content="width=device-width"),
        element("title", title),
        Html(f"<style>{STYLE}</style>"),
    )
    return "<!DOCTYPE html>\n" + element("html", head, element("body", *content), lang="en") + "\n"


def is_page(content: bytes) -> bool:
    """True if ``page`` wrote a file of this content."""
    return content.startswith(page("").partition("<title>")[0].encode())


def _encoded(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
