"""Images of the models side by side on the same prompts and noise, and several of one prompt in a strip."""

from __future__ import annotations

from html import escape

from dmdr.metrics.scorecard import Figures
from stages.reports.gallery import Row, Strip
from stages.reports.html import render_picture

LARGE = "Large images are reduced here."


def render_side_by_side(card: Figures, rows: dict[str, list[Row]]) -> str:
    """A part a heading; under each image what the metrics say of it."""
    parts = []
    for heading, of_heading in rows.items():
        parts.append(f"<h3>{escape(heading)}</h3>")
        parts += [_render_side(card, row) for row in of_heading] or ['<p class="faint">No prompt.</p>']
    return "".join(parts)


def _render_side(card: Figures, row: Row) -> str:
    cells = []
    for model in card.models:
        if model.name not in row.images:
            continue
        image = render_picture(row.images[model.name], f"{model.label}: {row.prompt}")
        notes = filter(None, row.notes.get(model.name, "").split(", "))
        note = ", ".join(f'<span class="whole">{escape(each)}</span>' for each in notes)
        cells.append(
            f"<figure>{image}<figcaption><b>{escape(model.label)}</b><small>{note}</small></figcaption></figure>"
        )
    tag = f" <small>{escape(row.tag)}</small>" if row.tag else ""
    return f'<p class="prompt">{escape(row.prompt)}{tag}</p><div class="side">{"".join(cells)}</div>'


def render_strips(card: Figures, strips: list[Strip]) -> str:
    """How much the images of one prompt differ, model by model."""
    parts = []
    for strip in strips:
        cells = []
        for model in card.models:
            images = strip.images.get(model.name, [])
            if images:
                told = [f"{model.label}, image {n + 1} of {len(images)}: {strip.prompt}" for n in range(len(images))]
                row = "".join(render_picture(image, alt) for image, alt in zip(images, told, strict=True))
                caption = f"<figcaption><b>{escape(model.label)}</b></figcaption>"
                cells.append(f'<figure>{caption}<div class="strip">{row}</div></figure>')
        parts.append(f'<p class="prompt">{escape(strip.prompt)}</p><div class="strips">{"".join(cells)}</div>')
    return "".join(parts)
