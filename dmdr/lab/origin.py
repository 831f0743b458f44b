"""Which world of the lab a teacher in a folder was built for, by the recipe that `dmdr lab build` leaves there."""

from __future__ import annotations

import json
from pathlib import Path

from dmdr.config.worlds import World

RECIPE = "recipe.json"
TRAINED_ON: dict[str, World] = {"renders": "shapes", "images": "fashion"}  # key of a recipe -> the world it draws


def read_world(folder: Path) -> World | None:
    """The world that the teacher in a folder draws; None if the lab did not build it."""
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = [world for key, world in TRAINED_ON.items() if isinstance(recipe, dict) and key in recipe]
    return known[0] if known else None
