"""The record of a prompt: its text and what its source says about it. No torch: prompt lists are read without it."""

from __future__ import annotations

import re
from typing import NotRequired, TypedDict

Need = TypedDict(  # the functional form, because "class" is a keyword of Python
    "Need",
    {"class": str, "count": int, "color": NotRequired[str], "position": NotRequired[tuple[str, int]]},
)
"""One clause of GenEval's metadata: `count` objects of a class, in a color, at a position.

position: (relation, index): where the objects are as seen from those of the clause at that earlier index of `include`.
"""


class Metadata(TypedDict):
    """GenEval's metadata of a prompt: what its image must show.

    tag: the task. include: the objects that must be there. exclude: for a class, how many objects are too many.
    """

    tag: NotRequired[str]
    include: NotRequired[list[Need]]
    exclude: NotRequired[list[Need]]


class PromptRecord(Metadata):
    """A prompt and what its source says about it: one line of a shard, kept as the source wrote it.

    It is a dictionary, so that unknown keys are kept, in their order. Reading a source checks only `prompt`. A metric
    that uses another key checks that key and refuses a value that it cannot use.
    """

    prompt: str
    unseen: NotRequired[bool]  # lab: it names a pair of colour and class that no training prompt names
    item_id: NotRequired[str]  # DPG-Bench: the key of the prompt's questions, and the name of its image
    style: NotRequired[str]  # HPDv2: the folder of its images
    index: NotRequired[int]  # HPDv2: the position of the prompt in its file


FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_file_name(value: object) -> bool:
    """Whether a value of a record can be the name of a file or folder, on every system and below its own folder."""
    return isinstance(value, str) and FILE_NAME.fullmatch(value) is not None
