"""Keep the libraries quiet, which read how much they may say while they are imported."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Call this before transformers is imported: it warns of torchvision, which nothing here needs."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
