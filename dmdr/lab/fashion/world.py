"""The second world of the lab: real garments, tinted, on the grey background of the first world.

The brightness of a garment is the opacity of the tint. So each pixel lies on the straight line from the background to
the tint. The direction of that line identifies the colour, and `untint` recovers the garment.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dmdr.lab.vocabulary import COLORS
from dmdr.lab.world import BACKGROUND, SIZE

FAINTEST = 24.0  # distance from the background in RGB; nearer pixels have no colour
LEAST_SHARE = 0.7  # the least share of all colour in an image that its main colour must have

ARROWS = np.array(list(COLORS.values()), dtype=np.float64) - BACKGROUND  # from the background to each tint
LENGTHS = np.linalg.norm(ARROWS, axis=1)


class Untinted(NamedTuple):
    """What an image shows.

    color: the main colour, None if there is no colour or no main one. share: the part of the main colour in all colour
    of the image. garment: (SIZE, SIZE) in [0, 1], its brightness, computed from the main colour alone.
    """

    color: str | None
    share: float
    garment: np.ndarray


def tint(garments: np.ndarray, colors: list[str]) -> np.ndarray:
    """Give garments (N, SIZE, SIZE) uint8 their colours: (N, SIZE, SIZE, 3) uint8."""
    arrows = ARROWS[[list(COLORS).index(color) for color in colors]]
    alpha = garments[..., None] / 255.0
    return (BACKGROUND + alpha * arrows[:, None, None]).round().astype(np.uint8)


def untint(image: np.ndarray) -> Untinted:
    """The colour and the garment in an image (SIZE, SIZE, 3) uint8. Each pixel votes for the tint of its direction.

    Raises:
        ValueError: the image has another shape or dtype.
    """
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"untint needs an image ({SIZE}, {SIZE}, 3) uint8, got {image.shape} {image.dtype}; convert it"
        )
    offset = image.astype(np.float64) - BACKGROUND
    along = offset @ (ARROWS / LENGTHS[:, None]).T
    strength = np.linalg.norm(offset, axis=-1)
    votes = np.bincount(along.argmax(-1).ravel(), (strength * (strength >= FAINTEST)).ravel(), len(COLORS))
    main = int(votes.argmax())
    share = float(votes[main] / votes.sum()) if votes.any() else 0.0
    garment = (along[..., main] / LENGTHS[main]).clip(0, 1)
    return Untinted(list(COLORS)[main] if share >= LEAST_SHARE else None, share, garment)
