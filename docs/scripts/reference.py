"""`python -m docs.scripts.reference` writes docs/reference/ from the code; `make reference` runs it."""

from __future__ import annotations

from pathlib import Path

from docs.scripts.commands import build_commands_page
from docs.scripts.config import build_config_page

FOLDER = Path(__file__).parents[1] / "reference"
PAGES = {"commands.md": build_commands_page, "config.md": build_config_page}


def write_reference(folder: Path = FOLDER) -> None:
    """Write both pages."""
    folder.mkdir(exist_ok=True)
    for name, build in PAGES.items():
        (folder / name).write_text(build(), encoding="utf-8")


if __name__ == "__main__":
    write_reference()
