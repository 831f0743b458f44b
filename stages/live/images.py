"""A strip as one picture file: equally large images side by side, joined to be stored and split to be shown."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

ENDINGS = ("png", "jpg")
TINY = 144  # pixels; smaller images are kept bit by bit


@dataclass(frozen=True)
class StripFile:
    """An encoded strip. ending: png or jpg."""

    data: bytes
    ending: str


def encode_strip(images_P: np.ndarray, side: int) -> StripFile:
    """Join images (P, H, W, 3) uint8; larger ones are reduced to `side` pixels."""
    from PIL import Image  # late: the image of flows has no pillow, and passes strips on as they are

    tiles = [Image.fromarray(image) for image in images_P]
    for tile in tiles:
        tile.thumbnail((side, side), Image.Resampling.LANCZOS)
    joined = Image.fromarray(np.concatenate([np.asarray(tile) for tile in tiles], axis=1))
    file, is_tiny = io.BytesIO(), max(images_P.shape[1:3]) < TINY
    if is_tiny:
        joined.save(file, format="PNG", optimize=True)
    else:
        joined.save(file, format="JPEG", quality=85, optimize=True)
    return StripFile(file.getvalue(), "png" if is_tiny else "jpg")


def split_strip(data: bytes, count: int) -> list[np.ndarray]:
    """The images (H, W, 3) uint8 of a strip of `count`. Raises ValueError for bytes that are no such picture."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"it is no picture: {error}") from error
    if count < 1 or pixels.shape[1] % count:
        raise ValueError(f"it is {pixels.shape[1]} pixels wide, which are not {count} images")
    return np.split(pixels, count, axis=1)
