"""The model families for which `dmdr init` writes a config, with the settings that differ between them.

No pydantic: help texts need this file quickly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Family = Literal["sdxl", "sd3-medium", "sd35-large", "z-image", "flux"]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class FamilyFacts:
    """What a config of a family begins with.

    kind: the family by its model_index.json. layers: of the published network's config; None where no sibling differs.
    teacher: the address of the published one. guidance: as in the config. rate, fake_rate: of student and fake score in
    the cold start; joint training has half. *_source: where these come from. is_large: whether two samples at once need
    more than half of 80 GB. is_dynamic: whether DynaDG and DynaRS run. wide: whether the fake score's LoRA adapts more
    than the attention.
    """

    title: str
    kind: str
    teacher: str
    guidance: float
    guidance_source: str
    rate: float
    fake_rate: float
    rate_source: str
    layers: int | None = None
    is_large: bool = False
    is_dynamic: bool = True
    wide: bool = False


PAPER = "DMDR, Table 1"
AUTHORS = "authors' code, t2i"
AS_LARGE = "as SD3.5-Large's in the authors' code, t2i; none is published for this family"
FACTS: dict[Family, FamilyFacts] = {
    "sdxl": FamilyFacts(
        "SDXL",
        "sdxl",
        "hub:stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b",
        7.0,
        PAPER,
        1e-6,
        1e-7,
        "authors' code, t2i: SD3-Medium's LoRA of 4 steps, SDXL's fake score of 1 step",
        is_dynamic=False,
        wide=True,
    ),
    "sd3-medium": FamilyFacts(
        "SD3-Medium",
        "sd3",
        "hub:stabilityai/stable-diffusion-3-medium-diffusers@ea42f8cef0f178587cf766dc8129abd379c90671",
        7.0,
        PAPER,
        1e-6,
        5e-7,
        AUTHORS,
        layers=24,
    ),
    "sd35-large": FamilyFacts(
        "SD3.5-Large",
        "sd3",
        "hub:stabilityai/stable-diffusion-3.5-large@ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
        3.5,
        PAPER,
        1e-6,
        2e-8,
        AUTHORS,
        layers=38,
        is_large=True,
    ),
    "z-image": FamilyFacts(
        "Z-Image",
        "z-image",
        "hub:Tongyi-MAI/Z-Image@04cc4abb7c5069926f75c9bfde9ef43d49423021",
        5.0,
        "diffusers' guidance_scale 4.0 for this family is ours less 1",
        1e-6,
        2e-8,
        AS_LARGE,
        is_large=True,
    ),
    "flux": FamilyFacts(
        "FLUX.1",
        "flux",
        "hub:black-forest-labs/FLUX.1-dev@3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
        3.5,
        "its model card; the network takes it as an input",
        1e-6,
        2e-8,
        AS_LARGE,
        is_large=True,
    ),
}
