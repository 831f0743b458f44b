"""The images of a scorecard: which prompts are shown, and the side-by-side grid as one PNG with readable captions."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROWS = 10
TILE = 144  # least pixels a side in the grid; tiny images are enlarged to the next whole multiple
LARGEST = 256  # pixels a side; larger images are reduced to it
MARGIN, CAPTION, HEADER = 12, 24, 30  # pixels
INK, FAINT, PAPER = (24, 26, 30), (110, 114, 122), (255, 255, 255)


@dataclass
class Row:
    """One prompt. images: model -> (H, W, 3) uint8; notes: model -> what is said under its image."""

    prompt: str
    tag: str | None
    images: dict[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass
class Strip:
    """Several images of one prompt. images: model -> S of (H, W, 3) uint8, each from its own noise."""

    prompt: str
    images: dict[str, list[np.ndarray]] = field(default_factory=dict)


def choose_prompts(tags: list[str | None]) -> list[int]:
    """Places of the prompts to show, at most ROWS: turn by turn one of each tag, in the order of the prompts."""
    queues = [[place for place, tag in enumerate(tags) if tag == each] for each in dict.fromkeys(tags)]
    turns = [queue[turn] for turn in range(ROWS) for queue in queues if turn < len(queue)]
    return sorted(turns[:ROWS])


def find_extremes(ours_P: np.ndarray, theirs_P: np.ndarray, most: int = ROWS) -> tuple[list[int], list[int]]:
    """Places of the prompts with the largest leads of ours over theirs, and with the largest losses, the largest first.

    (P,) each; equal ones in the order of the prompts. A prompt whose score is not a number is in neither, and what is
    no lead is no win: there may be fewer than `most`.
    """
    leads_P = np.asarray(ours_P, dtype=np.float64) - np.asarray(theirs_P, dtype=np.float64)
    places = [place for place, lead in enumerate(leads_P) if np.isfinite(lead)]
    wins = sorted((place for place in places if leads_P[place] > 0), key=lambda place: (-leads_P[place], place))
    losses = sorted((place for place in places if leads_P[place] < 0), key=lambda place: (leads_P[place], place))
    return wins[:most], losses[:most]


def build_tile(image: np.ndarray) -> Image.Image:
    """An image at a size to look at: tiny ones enlarged by a whole factor without smoothing, large ones reduced."""
    picture = Image.fromarray(image)
    side = max(picture.size)
    if side < TILE:
        factor = -(-TILE // side)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return reduce_colours(picture)


def reduce_colours(picture: Image.Image) -> Image.Image:
    """At most LARGEST pixels a side."""
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return picture


def encode_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()


def encode_jpeg(picture: Image.Image) -> bytes:
    """For pages that hold many large images: about a fifth of the PNG."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=82, optimize=True)
    return file.getvalue()


def build_grid(rows: list[Row], headings: dict[str, str]) -> Image.Image:
    """All rows as one picture; headings: model -> its column's title, in the order of the columns."""
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
    """`text` on one line of `width` pixels, with an ellipsis where it had to be cut."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
