"""The words of the world of garments: its classes and captions. No numpy."""

from __future__ import annotations

from dmdr.config.prompt_record import Metadata
from dmdr.lab.vocabulary import article

CLASSES = (  # in the order of Fashion-MNIST's labels: T-shirt/top, Trouser, ..., Ankle boot
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


def caption(metadata: Metadata) -> str:
    """The caption without a template, for example "a red sneaker"."""
    (need,) = metadata["include"]
    words = f"{need['color']} {need['class']}"
    return words if need["class"] == PLURAL else f"{article(words)} {words}"
