"""Keep the libraries quiet, which read how much they may say while they are imported."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Call this before transformers and diffusers are imported.

    transformers warns of torchvision, which nothing here needs; diffusers, of each prompt that an encoder cuts;
    bitsandbytes, which diffusers imports where it is installed, of a faster 4-bit kernel for some CPUs.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
