"""What is known of a prompt beside its text. No torch: prompt lists are read where there is none."""

from __future__ import annotations

from typing import NotRequired, TypedDict

Need = TypedDict(  # in this form because "class" is a word of Python
    "Need",
    {"class": str, "count": int, "color": NotRequired[str], "position": NotRequired[tuple[str, int]]},
)
"""One clause of GenEval's metadata: `count` objects of a class, in a color, at a position.

position: (relation, place): how they stand to the objects of the clause at that earlier place of `include`.
"""


class Metadata(TypedDict):
    """What GenEval says of a prompt: what its image must show.

    tag: the task. include: what must be there. exclude: how many of a class are too many.
    """

    tag: NotRequired[str]
    include: NotRequired[list[Need]]
    exclude: NotRequired[list[Need]]


class PromptRecord(Metadata):
    """A prompt and what its source says about it: one line of a shard, kept as the source wrote it.

    A dictionary, so that unknown keys stay, and in their order. Only `prompt` is checked when a source is read. A
    metric that uses another key checks it, and refuses what it cannot use.
    """

    prompt: str
    unseen: NotRequired[bool]  # the lab's worlds: it names a pair of colour and class that no training prompt names
    item_id: NotRequired[str]  # DPG-Bench: by which its questions are found
    style: NotRequired[str]  # HPDv2: its folder of images
    index: NotRequired[int]  # HPDv2: the place of a bare prompt in its file
