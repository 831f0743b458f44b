"""The files of live/, and their types. Nothing of them is part of a result: they may be lost without harm.

{store}/{run}/{stage}/live/status.json            how far the stage is, its pace, memory and cost
                          /rows-000003.jsonl       the metrics rows 300 to 399, written anew as they come
                          /alarms.json             the lines of all alarms
                          /strips/prompts.json     whose images the strips show
                                 /teacher.png      what the teacher draws; .jpg, where images are not tiny
                                 /update-00000050.png   what the student's EMA draws after update 50
                                 /real-00000050.png     x0_real and x0_fake of these images, renoised, where asked for
                                 /fake-00000050.png

An object store cannot append, so rows lie in blocks. A block is replaced whole, and its rows are those of the training
state: a resumed stage writes the same rows to the same places, without gaps or doubles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from stages.store.records import Document, Spent

STATUS, ALARMS = "status.json", "alarms.json"
STRIPS = "strips"
PROMPTS, TEACHER = f"{STRIPS}/prompts.json", f"{STRIPS}/teacher"
BLOCK = 100  # rows of one file; part of the names, so it stays
OF_ROWS = re.compile(r"rows-(\d{6})\.jsonl")
OF_STRIP = re.compile(rf"{STRIPS}/(update|real|fake)-(\d{{8}})\.(png|jpg)")
STUDENT, REAL, FAKE = "update", "real", "fake"  # how the names of strips begin


class Gpu(Document):
    """One GPU of the first machine, as its driver tells it. used_mib, total_mib: memory; busy: percent of the time."""

    name: str
    used_mib: float
    total_mib: float
    busy: float


class Status(Document):
    """How far an open stage is. Times are seconds since 1970, by the clock of its machine.

    state: running, stopped, failed or finished. step, steps: updates with those of the fake score alone; update,
    updates: those of the student. recoveries: how often the watch has taken the stage back. pace_s: seconds an update.
    left_s: of this stage; left_run_s: of the run. memory_mib: the most main memory of the first process.
    """

    state: str
    at: float
    began: float
    step: int
    steps: int
    update: int
    updates: int
    recoveries: int = 0
    pace_s: float | None = None
    left_s: float | None = None
    left_run_s: float | None = None
    device: str = ""
    processes: int = 1
    memory_mib: float = 0.0
    gpus: tuple[Gpu, ...] = ()
    spent: Spent = Spent()
    money: float | None = None
    currency: str | None = None


class AlarmLine(Document):
    """An alarm that rang after `update` student updates."""

    update: int
    at: float
    line: str


class Alarms(Document):
    """All alarms of a stage, in the order in which they rang."""

    lines: tuple[AlarmLine, ...] = ()


class StripPrompts(Document):
    """Whose images the strips show, from left to right."""

    prompts: tuple[str, ...]


def name_block(number: int) -> str:
    return f"rows-{number:06d}.jsonl"


def name_strip(kind: str, update: int) -> str:
    """Without its ending."""
    return f"{STRIPS}/{kind}-{update:08d}"


def choose_kept(updates: Iterable[int], *, every: int, keep: int) -> set[int]:
    """Of the updates that have a strip, at most `keep` that are evenly spaced, and the newest.

    every: the distance between two of them. It is doubled, again and again, until they fit, so that those that stay
    today stay tomorrow.
    """
    found = {*updates}
    newest, spacing = max(found, default=0), every
    while newest // spacing + 1 + bool(newest % spacing) > keep:
        spacing *= 2
    return {update for update in found if update % spacing == 0 or update == newest}
