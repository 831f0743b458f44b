"""torchvision beside a torch that it was not built for.

open_clip and lpips import torchvision. Its packages are built for CUDA: beside a CPU build of torch, importing it fails
at two operators that are registered from Python but defined in the compiled half, and with it every library that looks
for it. The hook waits until somebody imports torchvision, loads the compiled half where it fits, and else declares the
two operators; nothing here calls them. setup.sh puts a copy of this file beside the packages of .venv, for scripts that
do not import dmdr.
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
    """Acts once, on the first import of torchvision, and then is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.origin is not None:
            self.define(Path(spec.origin).parent / "_C.so")
        return spec

    @staticmethod
    def define(compiled: Path) -> None:
        import torch

        try:
            torch.ops.load_library(compiled)
        except OSError:
            for operator in OPERATORS:
                torch.library.define(f"torchvision::{operator}", SIGNATURE)


def install() -> None:
    """Costs nothing until torchvision is imported, and nothing where it is imported already."""
    hooked = any(type(each).__module__.endswith("torchvision_shim") for each in sys.meta_path)
    if "torchvision" not in sys.modules and not hooked:
        sys.meta_path.insert(0, Hook())
