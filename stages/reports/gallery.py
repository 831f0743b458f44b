"""The images of a scorecard: which prompts are shown, and a grid of them as one picture with readable captions."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROWS = 10  # prompts in a grid
TILE = 144  # pixels; an image with shorter sides is enlarged by the least whole factor that reaches it
LARGEST = 256  # pixels; an image with a longer side is reduced to it
FEATURED = 512  # pixels; the same for the few images that lead a page
MARGIN, CAPTION, HEADER = 12, 24, 30  # pixels
INK, FAINT, PAPER = (24, 26, 30), (110, 114, 122), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """One prompt. images: model -> (H, W, 3) uint8; notes: model -> the text under its image.

    reasons: model -> why a checker found its image wrong.
    """

    prompt: str
    tag: str | None
    images: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Strip:
    """Several images of one prompt. images: model -> S of (H, W, 3) uint8, each from its own noise."""

    prompt: str
    images: dict[str, list[np.ndarray]]


def choose_prompts(tags: list[str | None]) -> list[int]:
    """Choose at most ROWS prompts to show, taking one of each tag in turn. Returns their places, in order."""
    queues = [[place for place, other in enumerate(tags) if other == tag] for tag in dict.fromkeys(tags)]
    turns = [queue[turn] for turn in range(ROWS) for queue in queues if turn < len(queue)]
    return sorted(turns[:ROWS])


def find_extremes(ours_P: np.ndarray, theirs_P: np.ndarray, most: int = ROWS) -> tuple[list[int], list[int]]:
    """Places of the prompts where ours leads theirs most, and of those where it loses most, the largest first.

    ours_P, theirs_P: scores (prompts,). Equal leads are in the order of the prompts. A prompt with a score that is not
    a number, or with equal scores, is in neither list, so that there may be fewer than `most`.
    """
    leads_P = np.asarray(ours_P, dtype=np.float64) - np.asarray(theirs_P, dtype=np.float64)
    places = [place for place, lead in enumerate(leads_P) if np.isfinite(lead)]
    wins = sorted((place for place in places if leads_P[place] > 0), key=lambda place: (-leads_P[place], place))
    losses = sorted((place for place in places if leads_P[place] < 0), key=lambda place: (leads_P[place], place))
    return wins[:most], losses[:most]


def build_tile(image: np.ndarray) -> Image.Image:
    """An image (H, W, 3) uint8 at a size to look at: a tiny one enlarged without smoothing, a large one reduced."""
    picture = Image.fromarray(image)
    side = max(picture.size)
    if side < TILE:
        factor = -(-TILE // side)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return reduce_size(picture)


def reduce_size(picture: Image.Image, side: int = LARGEST) -> Image.Image:
    """Reduce a picture in place to at most `side` pixels a side, and return it."""
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def encode_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def encode_jpeg(picture: Image.Image, quality: int = 82) -> bytes:
    """For pages that hold many large images: a JPEG has about a fifth of the bytes of a PNG."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=quality, optimize=True)
    return file.getvalue()


def build_grid(rows: list[Row], headings: dict[str, str]) -> Image.Image:
    """Draw all rows as one picture. headings: model -> the title of its column, in the order of the columns."""
    tiles = [[build_tile(row.images[model]) for model in headings] for row in rows]
    title_font, font = ImageFont.load_default(15), ImageFont.load_default(13)
    width = max(tiles[0][0].width, *(int(title_font.getlength(text)) for text in headings.values()))
    height = tiles[0][0].height
    step_x, step_y = width + MARGIN, height + CAPTION + MARGIN
    page = Image.new("RGB", (MARGIN + step_x * len(headings), HEADER + MARGIN + step_y * len(rows)), PAPER)
    draw = ImageDraw.Draw(page)
    for column, text in enumerate(headings.values()):
        draw.text((MARGIN + step_x * column, MARGIN), text, INK, title_font)
    for number, (row, pictures) in enumerate(zip(rows, tiles, strict=True)):
        top = HEADER + MARGIN + step_y * number
        caption = f"{row.prompt}   [{row.tag}]" if row.tag else row.prompt
        draw.text((MARGIN, top), shorten(caption, font, page.width - 2 * MARGIN), FAINT, font)
        for column, picture in enumerate(pictures):
            page.paste(picture, (MARGIN + step_x * column, top + CAPTION))
    return page


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Bring a text to one line of at most `width` pixels, with "..." where it was cut."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
