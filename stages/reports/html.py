"""The pieces of HTML that pages are made of: tables, numbers, pictures. Each page is XML as well, so all is closed."""

from __future__ import annotations

import base64
from html import escape

import numpy as np
from PIL import Image

from stages.reports.gallery import TILE, encode_jpeg, encode_png, reduce_colours
from stages.reports.style import STYLE
from stages.reports.verdict import format_number

MARK = '<span class="mark">trained on</span>'
DIVERSITY = (
    "Diversity is the mean distance between the images of one prompt: root mean square over pixels in [0, 1], LPIPS, "
    "or cosine distance in the image embedding of a held-out reward. Higher is more varied, which is no merit by "
    "itself."
)
TABLE = '<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table{kind}>{inside}</table></div>'


def render_document(title: str, body: list[str], style: str = "") -> str:
    """A page; title: not escaped yet."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<style>{STYLE}{style}</style></head>\n<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def render_table(head: str, rows: list[str], *, name: str, kind: str = "") -> str:
    """Rows below a head, scrolled where they do not fit. name: what the table is, for who cannot see it."""
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return render_scrolled(inside, name=name, kind=kind)


def render_scrolled(inside: str, *, name: str, kind: str = "") -> str:
    return TABLE.format(name=escape(name, quote=True), kind=f' class="{kind}"' if kind else "", inside=inside)


def render_plain_table(rows: list[tuple[str, str]], *, name: str) -> str:
    """Names and values."""
    lines = "".join(f"<tr><td>{escape(key)}</td><td><code>{escape(value)}</code></td></tr>" for key, value in rows)
    return render_scrolled(f"<tbody>{lines}</tbody>", name=name, kind="plain")


def format_figure(value: float | None, sign: str = "") -> str:
    """A number, or that it is none."""
    return f'<b class="bad">{format_number(value)}</b>' if value is None else format_number(value, sign)


def format_count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def render_picture(image: np.ndarray, alt: str) -> str:
    """An image (H, W, 3) uint8 as an <img> that needs no file: a tiny one bit by bit, a large one reduced, as JPEG."""
    if max(image.shape[:2]) < TILE:
        kind, data, tiny = "png", encode_png(Image.fromarray(image)), ' class="tiny"'
    else:
        kind, data, tiny = "jpeg", encode_jpeg(reduce_colours(Image.fromarray(image))), ""
    text = base64.b64encode(data).decode("ascii")
    return f'<img{tiny} src="data:image/{kind};base64,{text}" alt="{escape(alt, quote=True)}"/>'
