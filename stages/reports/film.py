"""A training as a film strip: what the student drew from the same prompts and noise after more and more updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.live.read import LiveReader, Series
from stages.reports.pictures import Picture, describe_image, embed_image

FRAMES = 8  # of a film strip in a report
ROWS = 4  # prompts in it
SIDE = 128  # pixels of its images


@dataclass(frozen=True)
class FilmRow:
    """The images of one prompt, one for each update of the film. teacher: None where it drew none."""

    prompt: str
    pictures: tuple[Picture, ...]
    teacher: Picture | None


@dataclass(frozen=True)
class Film:
    """The film strip of one training stage. updates: student updates done when the images of a column were drawn."""

    stage: str
    updates: tuple[int, ...]
    rows: tuple[FilmRow, ...]

    @property
    def has_teacher(self) -> bool:
        return any(row.teacher is not None for row in self.rows)


def build_film(reader: LiveReader, series: Series, *, frames: int, rows: int, side: int = SIDE) -> Film | None:
    """At most `frames` strips, evenly spaced, the first and the last among them; None where there is none."""
    strips = {update: reader.read_strip(update) for update in choose_frames(series.strips, frames)}
    shown = {update: images for update, images in strips.items() if images}
    if not shown:
        return None
    teacher = reader.read_teacher()
    stage = reader.stage.replace("_", " ")
    return Film(
        stage,
        tuple(shown),
        tuple(
            FilmRow(
                prompt,
                tuple(
                    embed_image(images[place], describe_image(f"{stage}, update {update}", prompt), side)
                    for update, images in shown.items()
                ),
                embed_image(teacher[place], describe_image("teacher", prompt), side) if teacher else None,
            )
            for place, prompt in enumerate(series.prompts[:rows])
        ),
    )


def choose_frames(updates: Sequence[int], most: int) -> list[int]:
    """At most `most` of the updates, evenly spaced, with the first and the last."""
    if len(updates) <= most:
        return list(updates)
    last = len(updates) - 1
    return [updates[round(place * last / (most - 1))] for place in range(most)]
