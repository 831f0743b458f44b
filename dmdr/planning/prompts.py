"""What the ways to encode a run's prompts cost: room in the store, bytes to read, room on a disk, memory."""

from __future__ import annotations

from dataclasses import dataclass

from dmdr.config.run import Config
from dmdr.planning.gpus import GIB
from dmdr.planning.stage_plan import StagePlan
from dmdr.promptset.encode import DTYPES, choose_layout
from dmdr.promptset.layout import Layout

TEXT = 200  # bytes of a prompt's record, about
STORED = "stage"
ON_THE_FLY = "on_the_fly"


@dataclass(frozen=True)
class Way:
    """One way to encode prompts.

    name: the value of prompts.encode. dtype: of prompts.dtype. each: bytes of a prompt in the store.
    stored: bytes in the store. read: bytes that a process reads in both training stages.
    kept: the most bytes on the disk of a process. encoders: bytes of text encoders in memory while a stage trains.
    """

    name: str
    dtype: str
    each: int
    stored: int
    read: int
    kept: int
    encoders: int

    def is_chosen(self, config: Config, layout: Layout) -> bool:
        """Whether a config takes this way. layout: what `choose` returned."""
        if layout == "text":
            return self.name == ON_THE_FLY
        return self.name == STORED and self.dtype == config.prompts.dtype


def choose(config: Config, prompts: int, plans: list[StagePlan]) -> Layout:
    """The layout that the stage prompts chooses for so many prompts."""
    return choose_layout(config.prompts, prompts, plans[0].conditioning)


def list_ways(config: Config, prompts: int, plans: list[StagePlan], encoders: int) -> list[Way]:
    """The costs of each way. encoders: bytes of the teacher's text encoders."""
    met = sum(plan.updates * plan.prompts for plan in plans)
    limit = config.execution.prompt_cache * GIB
    ways = []
    for dtype in DTYPES:
        each = plans[0].conditioning * DTYPES[dtype].itemsize + TEXT
        own = config.model_copy(
            update={"prompts": config.prompts.model_copy(update={"encode": STORED, "dtype": dtype})}
        )
        stored = prompts * each
        # a set that is read by whole shards is read once by each of the two stages, unless the cache is too small
        read = min(met * each, 2 * stored) if choose(own, prompts, plans) == "joined" else met * each
        ways.append(Way(STORED, dtype, each, stored, read, min(stored, limit), 0))
    texts = prompts * TEXT
    ways.append(Way(ON_THE_FLY, config.prompts.dtype, TEXT, texts, 2 * texts, texts, encoders))
    return ways


def add_text_encoders(config: Config, layout: Layout, plans: list[StagePlan], encoders: int) -> None:
    """Count the text encoders in the memory of each GPU, if they lie there while a stage trains."""
    if layout == "text" and config.execution.text_encoders == "device":
        for plan in plans:
            plan.parts["text encoders"] = encoders
