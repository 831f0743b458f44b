"""The licence of a teacher, as the card in its folder names it."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub.repocard import metadata_load

from stages.reports.export_facts import LicenceFacts


def read_licence(folder: Path) -> LicenceFacts | None:
    """The licence in the front matter of README.md; None if there is no card, or it names none.

    A card that is not YAML names none: it is somebody's text, and no reason not to export.
    """
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        return parse_licence(metadata_load(card))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        return None


def parse_licence(front_matter: object) -> LicenceFacts | None:
    """The licence in a card's front matter; None if it names none."""
    if not isinstance(front_matter, dict) or not isinstance(front_matter.get("license"), str):
        return None
    known = {name: front_matter.get(name) for name in LicenceFacts.model_fields}
    return LicenceFacts(**{name: value for name, value in known.items() if isinstance(value, str)})
