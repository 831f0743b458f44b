"""The second world of the lab: real garments, tinted, on the grey of the first one.

A garment's brightness says how much of the tint covers the background. So each pixel lies on the straight line from
the background to the tint, the colours are told apart by direction alone, and `untint` gets the garment back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dmdr.config.prompt_record import Metadata
from dmdr.lab.world import BACKGROUND, COLORS, SIZE, article

CLASSES = (  # in the order of Fashion-MNIST's labels, which call them T-shirt/top, Trouser, ..., Ankle boot
    "tee",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
PLURAL = "trousers"  # takes no article
FAINTEST = 24.0  # distance from the background in RGB; what is nearer shows no colour
LEAST_SHARE = 0.7  # of all colour in an image that the main one must have

ARROWS = np.array(list(COLORS.values()), dtype=np.float64) - BACKGROUND  # from the background to each tint
LENGTHS = np.linalg.norm(ARROWS, axis=1)


class Untinted(NamedTuple):
    """color: the main one, None when the image is blank or motley; share: the main one's, of all colour in the image;
    garment: (SIZE, SIZE) in [0, 1], brightness as far as the main colour explains it."""

    color: str | None
    share: float
    garment: np.ndarray


def tint(garments: np.ndarray, colors: list[str]) -> np.ndarray:
    """Garments (N, SIZE, SIZE) uint8 in their colours: (N, SIZE, SIZE, 3) uint8."""
    arrows = ARROWS[[list(COLORS).index(color) for color in colors]]
    alpha = garments[..., None] / 255.0
    return (BACKGROUND + alpha * arrows[:, None, None]).round().astype(np.uint8)


def untint(image: np.ndarray) -> Untinted:
    """What is in an image (SIZE, SIZE, 3) uint8: each pixel votes for the tint in whose direction it lies.

    Raises:
        ValueError: not such an image.
    """
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"garments are ({SIZE}, {SIZE}, 3) uint8 images; got {image.shape} {image.dtype}")
    offset = image.astype(np.float64) - BACKGROUND
    along = offset @ (ARROWS / LENGTHS[:, None]).T
    strength = np.linalg.norm(offset, axis=-1)
    votes = np.bincount(along.argmax(-1).ravel(), (strength * (strength >= FAINTEST)).ravel(), len(COLORS))
    main = int(votes.argmax())
    share = float(votes[main] / votes.sum()) if votes.any() else 0.0
    garment = (along[..., main] / LENGTHS[main]).clip(0, 1)
    return Untinted(list(COLORS)[main] if share >= LEAST_SHARE else None, share, garment)


def caption(metadata: Metadata) -> str:
    """ "a red sneaker", without a template around it."""
    (need,) = metadata["include"]
    words = f"{need['color']} {need['class']}"
    return words if need["class"] == PLURAL else f"{article(words)} {words}"
