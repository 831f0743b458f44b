"""The model families for which `dmdr init` writes a config. No pydantic: help texts need this file quickly."""

from __future__ import annotations

from typing import Literal, get_args

Family = Literal["sdxl", "sd3-medium", "sd35-large", "z-image", "flux"]
FAMILIES: tuple[Family, ...] = get_args(Family)
