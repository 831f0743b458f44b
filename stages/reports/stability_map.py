"""The result of `dmdr tune`: a table for a terminal, and a map of the cells as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dmdr.planning.stability import Cell, CellResult, Look, Verdict
from stages.reports.scorecard_text import format_table

TILE_WIDTH, TILE_HEIGHT = 150, 84  # pixels of a cell
GAP, LEFT, TOP, HEADER, FOOT = 10, 100, 34, 44, 26  # pixels: between cells; for words at the left, above and below
NARROWEST, EDGE = 640, 3  # pixels: of the picture, which has a line of words; of a frame
INK, FAINT, PAPER, MARK = (27, 30, 36), (86, 93, 104), (255, 255, 255), (200, 30, 30)
WORSE, BETTER, UNSTABLE = (247, 232, 208), (46, 125, 84), (228, 229, 233)  # of stable cells by reward; of the others
WRAP = 24  # letters of a reason on a line
MOST_LINES = 4


def format_cells(results: Sequence[CellResult], start: Look, teacher: Look, verdict: Verdict) -> str:
    """A row for each cell, and for the start and the teacher."""
    rows = [["student", "fake score", "ratio", "seed", "reward", "saturation", "contrast", "fake loss", "stable"]]
    for name, look in (("teacher", teacher), ("start", start)):
        rows.append([name, "", "", "", *_list_figures(look), ""])
    for result in results:
        cell, why = result.cell, verdict.unstable.get(result.cell, "")
        rates = [f"{cell.student_rate:g}", f"{cell.fake_rate:g}", str(cell.fake_updates), str(cell.seed)]
        word = "no: " + why if why else "yes"
        rows.append(
            [*rates, *_list_figures(result.look), word + (", recommended" if cell == verdict.recommended else "")]
        )
    return format_table(rows)


def _list_figures(look: Look | None) -> list[str]:
    if look is None:
        return ["", "", "", ""]
    fit = "" if math.isnan(look.fit) else f"{look.fit:.3f}"
    return [f"{look.reward:.4f}", f"{look.saturation:.3f}", f"{look.contrast:.3f}", fit]


def draw_map(results: Sequence[CellResult], start: Look, verdict: Verdict, *, title: str) -> Image.Image:
    """A panel for each ratio: student rates from left to right, rates of the fake score from below upwards.

    The config's own cell is the first result; its repetition with another seed is not shown. A stable cell is the
    greener, the higher its reward.
    """
    own = results[0].cell
    shown = {result.cell: result for result in results if result.cell.seed == own.seed}
    rewards = [r.look.reward for c, r in shown.items() if r.look is not None and c not in verdict.unstable]
    scale = (min(rewards), max(rewards)) if rewards else (0.0, 0.0)
    ratios = sorted({cell.fake_updates for cell in shown})
    panels = [_draw_panel([r for c, r in shown.items() if c.fake_updates == each], verdict, scale) for each in ratios]
    width = max(sum(panel.width for panel in panels) + GAP, NARROWEST)
    page = Image.new("RGB", (width, HEADER + max(panel.height for panel in panels) + FOOT), PAPER)
    draw, left = ImageDraw.Draw(page), 0
    places: list[int] = []
    for panel in panels:
        page.paste(panel, (left, HEADER))
        places.append(left)
        left += panel.width
    for ratio, place in zip(ratios, places, strict=True):
        draw.text((place + LEFT, HEADER - 10), f"fake_updates {ratio}", INK, ImageFont.load_default(13))
    for cell, colour in ((own, INK), (verdict.recommended, MARK)):
        place = places[ratios.index(cell.fake_updates)]
        x, y = _place_cell(cell, [each for each in shown if each.fake_updates == cell.fake_updates])
        corner = (place + x, HEADER + y)
        edge = EDGE if colour == MARK else 0  # outside of the config's own, where both are one cell
        box = (corner[0] - edge, corner[1] - edge, corner[0] + TILE_WIDTH + edge, corner[1] + TILE_HEIGHT + edge)
        draw.rectangle(box, outline=colour, width=EDGE)
    draw.text((GAP, GAP), title, INK, ImageFont.load_default(16))
    words = f"number: held-out reward, {start.reward:.4f} at the start; black frame: the config's own; red: recommended"
    draw.text((GAP, page.height - FOOT + 6), words, FAINT, ImageFont.load_default(12))
    return page


def _place_cell(cell: Cell, cells: Sequence[Cell]) -> tuple[int, int]:
    """The upper left corner of a cell in the panel of these cells."""
    students = sorted({each.student_rate for each in cells})
    fakes = sorted({each.fake_rate for each in cells}, reverse=True)
    column, row = students.index(cell.student_rate), fakes.index(cell.fake_rate)
    return LEFT + column * (TILE_WIDTH + GAP), TOP + row * (TILE_HEIGHT + GAP)


def _draw_panel(results: Sequence[CellResult], verdict: Verdict, scale: tuple[float, float]) -> Image.Image:
    cells = [result.cell for result in results]
    corners = [_place_cell(cell, cells) for cell in cells]
    size = (max(x for x, _ in corners) + TILE_WIDTH + GAP, max(y for _, y in corners) + TILE_HEIGHT + GAP)
    panel = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    for x, rate in {(x, cell.student_rate) for (x, _), cell in zip(corners, cells, strict=True)}:
        draw.text((x, TOP - 20), f"student {rate:g}", FAINT, font)
    for y, rate in {(y, cell.fake_rate) for (_, y), cell in zip(corners, cells, strict=True)}:
        draw.text((GAP, y + 6), f"fake score\n{rate:g}", FAINT, font)
    for result, (x, y) in zip(results, corners, strict=True):
        _draw_cell(draw, (x, y), result, verdict, scale=scale)
    return panel


def _draw_cell(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    result: CellResult,
    verdict: Verdict,
    *,
    scale: tuple[float, float],
) -> None:
    """scale: the lowest and the highest reward of the stable cells."""
    x, y = at
    why, font = verdict.unstable.get(result.cell), ImageFont.load_default(11)
    box = (x, y, x + TILE_WIDTH, y + TILE_HEIGHT)
    if why is not None or result.look is None:
        draw.rectangle(box, fill=UNSTABLE)
        lines = textwrap.wrap(f"unstable: {why}", WRAP)[:MOST_LINES]
        draw.multiline_text((x + 8, y + 8), "\n".join(lines), INK, font, spacing=3)
        return
    low, high = scale
    share = (result.look.reward - low) / (high - low) if high > low else 0.5
    ink = PAPER if share > 0.6 else INK
    draw.rectangle(box, fill=tuple(round(a + share * (b - a)) for a, b in zip(WORSE, BETTER, strict=True)))
    draw.text((x + 8, y + 6), f"{result.look.reward:.4f}", ink, ImageFont.load_default(20))
    figures = [f"saturation {result.look.saturation:.3f}", f"contrast {result.look.contrast:.3f}"]
    if not math.isnan(result.look.fit):
        figures.append(f"fake loss {result.look.fit:.3f}")
    draw.multiline_text((x + 8, y + 34), "\n".join(figures), ink, font, spacing=3)
