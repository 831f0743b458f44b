"""Images as text: PNG of 8 bits in base64, as a reward service is sent them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def encode_image(pixels: np.ndarray) -> str:
    """An image (H, W, 3) uint8 as base64 of a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def decode_image(text: str) -> np.ndarray:
    """The image (H, W, 3) uint8 of `encode_image`.

    Raises:
        ValueError: it is none.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image is no PNG in base64 ({' '.join(str(error).split())[:100]})") from error
