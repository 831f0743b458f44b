"""Let torchvision be imported beside a build of torch that it was not built for.

open_clip and lpips import torchvision, whose packages are built for CUDA. Beside a CPU build of torch its import fails,
and so does every library that imports it: torchvision registers two operators from Python that only its compiled half
defines. A hook waits for the first import of torchvision. It loads the compiled half if that fits, and otherwise
declares the two operators; nothing here calls them. setup.sh copies this file beside the packages of .venv, for scripts
that do not import dmdr.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Hook(importlib.abc.MetaPathFinder):
    """Acts once, on the first import of torchvision, and removes itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.origin is not None:
            self.define_operators(Path(spec.origin).parent / "_C.so")
        return spec

    @staticmethod
    def define_operators(compiled: Path) -> None:
        """Load the compiled half of torchvision, or declare the operators where it does not fit this torch."""
        import torch

        try:
            torch.ops.load_library(compiled)
        except OSError:
            for operator in OPERATORS:
                torch.library.define(f"torchvision::{operator}", SIGNATURE)


def install() -> None:
    """Set the hook, once. It does nothing until torchvision is imported; an imported torchvision needs no hook."""
    is_set = any(type(each).__module__.endswith("torchvision_shim") for each in sys.meta_path)
    if "torchvision" not in sys.modules and not is_set:
        sys.meta_path.insert(0, Hook())
