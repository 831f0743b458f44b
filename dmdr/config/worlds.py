"""The lab's two worlds: which rewards and metrics know only one of them, and which teachers draw it. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from dmdr.config.reward_weights import FASHION, LAB

World = Literal["shapes", "fashion"]
WORDS: dict[World, str] = {"shapes": "the lab's coloured shapes", "fashion": "the lab's tinted garments"}
OF_METRIC: dict[str, World] = {  # rewards and metrics that know nothing else
    **dict.fromkeys((*LAB, "lab-checker", "lab-checker-soft"), "shapes"),
    **dict.fromkeys((*FASHION, "fashion-judge"), "fashion"),
}
OF_TEACHER: dict[str, World] = {"lab:flow": "shapes", "lab:denoising": "shapes", "lab:fashion": "fashion"}


def name_world(path: str, declared: World | None) -> World | None:
    """The world that a teacher draws, as far as its address tells; None if only the files there can tell.

    declared: the config's teacher.world.
    """
    return declared or OF_TEACHER.get(path)


def refuse_other_worlds(used: Mapping[str, Iterable[str]], teacher: str, world: World | None) -> None:
    """Refuse rewards and metrics of a world that the teacher does not draw.

    used: key of the config -> the rewards and metrics that it names. world: that the teacher draws; None: no world.

    Raises:
        ValueError: with one line.
    """
    for key, names in used.items():
        for name in names:
            known = OF_METRIC.get(name)
            if known is not None and known != world:
                raise ValueError(
                    f"{key} has {name}, which knows only {WORDS[known]}, and teacher.path {teacher} "
                    f"{f'draws {WORDS[world]}' if world else 'is no teacher of the lab'}; name a real one such as "
                    f"hpsv2.1 or pickscore, or drop it (teacher.world: {known} says that a teacher draws them)"
                )
