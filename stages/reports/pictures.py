"""Images that a page holds itself: models side by side on the same prompt and noise, and several of one prompt."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from stages.reports.gallery import LARGEST, TILE, Row, Strip, build_tile, encode_jpeg, encode_png, reduce_size


@dataclass(frozen=True)
class Picture:
    """An image as a data: URI, so that it needs no file. is_tiny: shown with its pixels sharp."""

    source: str
    alt: str
    is_tiny: bool


@dataclass(frozen=True)
class Captioned:
    """An image of one model; notes: what the metrics say of it; reason: why a checker found it wrong, or empty."""

    picture: Picture
    model: str
    notes: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class SideBySide:
    """A prompt with an image of each model."""

    prompt: str
    tag: str | None
    images: tuple[Captioned, ...]


@dataclass(frozen=True)
class ModelStrip:
    """Images that one model drew of one prompt."""

    model: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Strips:
    """A prompt with several images of each model."""

    prompt: str
    models: tuple[ModelStrip, ...]


def embed_image(image: np.ndarray, alt: str, side: int = LARGEST) -> Picture:
    """An image (H, W, 3) uint8: a tiny one bit by bit as PNG, a large one reduced to `side` pixels, as JPEG.

    Where the side is small, there are many images on the page, so they are compressed more.
    """
    if max(image.shape[:2]) < TILE:
        return Picture(_encode_uri(encode_png(Image.fromarray(image)), "png"), alt, is_tiny=True)
    jpeg = encode_jpeg(reduce_size(Image.fromarray(image), side), quality=82 if side >= LARGEST else 72)
    return Picture(_encode_uri(jpeg, "jpeg"), alt, is_tiny=False)


def embed_tile(image: np.ndarray, alt: str) -> Picture:
    """An image (H, W, 3) uint8 as PNG, a tiny one enlarged."""
    tile = build_tile(image)
    return Picture(_encode_uri(encode_png(tile), "png"), alt, is_tiny=max(image.shape) < tile.width)


def _encode_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def place_side_by_side(rows: Sequence[Row], labels: Mapping[str, str], side: int = LARGEST) -> list[SideBySide]:
    """The prompts with the images of all models. labels: model -> its name on the page, in the order of the images.

    side: pixels to which large images are reduced.
    """
    return [
        SideBySide(
            row.prompt,
            row.tag,
            tuple(
                Captioned(
                    embed_image(row.images[model], describe_image(label, row.prompt), side),
                    label,
                    split_notes(row.notes.get(model, "")),
                    row.reasons.get(model, ""),
                )
                for model, label in labels.items()
                if model in row.images
            ),
        )
        for row in rows
    ]


def describe_image(label: str, prompt: str) -> str:
    """The text that stands for an image."""
    return f"{label}: {prompt}"


def split_notes(notes: str) -> tuple[str, ...]:
    """What the metrics say of an image, one by one."""
    return tuple(note for note in notes.split(", ") if note)


def lay_out_strips(strips: Sequence[Strip], labels: Mapping[str, str]) -> list[Strips]:
    """How much the images of one prompt differ, model by model; labels: as for `place_side_by_side`."""
    return [
        Strips(
            strip.prompt,
            tuple(
                ModelStrip(label, _embed_all(strip.images[model], label, strip.prompt))
                for model, label in labels.items()
                if strip.images.get(model)
            ),
        )
        for strip in strips
    ]


def _embed_all(images: Sequence[np.ndarray], label: str, prompt: str) -> tuple[Picture, ...]:
    count = len(images)
    return tuple(
        embed_image(image, f"{label}, image {number} of {count}: {prompt}")
        for number, image in enumerate(images, start=1)
    )
