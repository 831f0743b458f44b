"""Images that show nothing: not numbers, black, white, or of one colour.

An image counts where at least SHARE of its pixels are within NEAR of the colour in every channel, so that a small
object on an empty background is none of these.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Fault = Literal["not a number", "black", "white", "one colour"]
FAULTS: tuple[Fault, ...] = ("not a number", "black", "white", "one colour")
SHARE = 0.995
NEAR = 8  # of 255
SAMPLED = 128  # pixels a side are enough


def find_fault(image: np.ndarray, is_finite: bool) -> Fault | None:
    """What is wrong with an image (H, W, 3) uint8; is_finite: whether its values were numbers."""
    if not is_finite:
        return "not a number"
    step = max(1, min(image.shape[:2]) // SAMPLED)
    pixels = image[::step, ::step].reshape(-1, 3).astype(np.int16)

    def is_near(colour: np.ndarray | int) -> bool:
        return bool((np.abs(pixels - colour).max(axis=1) <= NEAR).mean() >= SHARE)

    if is_near(0):
        return "black"
    if is_near(255):
        return "white"
    return "one colour" if is_near(np.median(pixels, axis=0)) else None
