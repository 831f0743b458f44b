"""Exit 0 if the torch that is installed here is a CUDA build, which needs the packages of cuda.lock."""

from __future__ import annotations

import re
import sys
from importlib import metadata

from packaging.requirements import Requirement

FROM_TORCH = re.compile(r"cuda|nvidia|triton")


def needs_cuda() -> bool:
    """Whether torch asks for a package of CUDA on this platform."""
    needed = [Requirement(text) for text in metadata.requires("torch") or ()]
    return any(
        FROM_TORCH.match(each.name) and (each.marker is None or each.marker.evaluate({"extra": ""})) for each in needed
    )


if __name__ == "__main__":
    sys.exit(not needs_cuda())
