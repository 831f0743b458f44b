"""The guidance scale of a teacher: one number, or a range from which training draws one number an update. No torch."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator, Field

HINT = "give a number from 1, or a range such as [6.5, 7.5]"


def _check_scale(value: object) -> object:
    """Refuse in one line what is neither a scale nor a range of scales; a list becomes a tuple."""
    is_range = isinstance(value, list | tuple)
    given = list(value) if isinstance(value, list | tuple) else [value]
    bounds = [float(each) for each in given if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(bounds) < len(given):
        raise ValueError(f"teacher.guidance_scale is no number; {HINT}")
    shown = ", ".join(f"{each:g}" for each in bounds)
    if is_range and len(bounds) != 2:
        raise ValueError(f"teacher.guidance_scale is [{shown}], and a range has two numbers; {HINT}")
    if not all(math.isfinite(each) and each >= 1 for each in bounds):
        raise ValueError(f"teacher.guidance_scale is {shown}, and a scale is a number from 1, which is none; {HINT}")
    if is_range and bounds[0] >= bounds[1]:
        raise ValueError(f"teacher.guidance_scale is [{shown}], whose first number is not the lower one; {HINT}")
    return tuple(bounds) if is_range else value


Scale = Annotated[
    Annotated[float, Field(ge=1.0)] | tuple[Annotated[float, Field(ge=1.0)], Annotated[float, Field(ge=1.0)]],
    BeforeValidator(_check_scale),
]


def take_middle(scale: float | tuple[float, float]) -> float:
    """The scale itself, or the middle of a range."""
    return (scale[0] + scale[1]) / 2 if isinstance(scale, tuple) else scale
