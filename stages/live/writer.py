"""Writes live/ of an open stage: blocks of rows, strips, alarms and the status. Runs in a thread of its own.

The series continues those of earlier attempts. What an attempt wrote after its last checkpoint goes first: the resumed
stage makes these updates again. Blocks before it that are missing, because the store was away, are written again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np

from dmdr.config.live import Live
from stages.live.images import ENDINGS, encode_strip
from stages.live.layout import (
    ALARMS,
    BLOCK,
    OF_ROWS,
    OF_STRIP,
    PROMPTS,
    STATUS,
    TEACHER,
    AlarmLine,
    Alarms,
    Status,
    StripPrompts,
    choose_kept,
    name_block,
    name_strip,
)
from stages.store.address import open_place
from stages.store.folder import Folder
from stages.store.remote import Remote

Row = Mapping[str, float]


class Writer:
    """The files of live/ at one address. Every method raises StoreError, and what a store raises besides.

    before: live/ of the stage before, whose teacher drew the same. has_teacher: whether the teacher's strip is there;
    None until `resume` has looked.
    """

    def __init__(self, address: str, live: Live, *, before: str | None = None) -> None:
        self.address, self.live, self.before = address, live, before
        self.has_teacher: bool | None = None
        self.times: dict[int, float] = {}  # number of a row -> when it came, where that is known
        self.alarms: list[AlarmLine] = []
        self._strips: set[int] = set()
        self._opened: Folder | Remote | None = None

    @property
    def _place(self) -> Folder | Remote:
        """Its requests to a store share nothing with those of the stage."""
        if self._opened is None:
            self._opened = open_place(self.address)
        return self._opened

    def resume(self, rows: Sequence[Row], update: int, prompts: Sequence[str], *, rung: int = 0) -> None:
        """Make the files those of a stage with these rows after this update, whatever earlier attempts left.

        rung: the last update at which an alarm took the stage back; alarms up to it stay.
        """
        place = self._place
        place.tidy()
        self._strips = set()
        names = place.names()
        blocks = {int(match[1]): name for name in names if (match := OF_ROWS.fullmatch(name))}
        last = len(rows) // BLOCK
        for number, name in blocks.items():
            if number > last:
                place.remove(name)
        for name in names:
            match = OF_STRIP.fullmatch(name)
            if match and int(match[2]) > update:
                place.remove(name)
            elif match and match[1] == "update":
                self._strips.add(int(match[2]))
        self.has_teacher = any(name.startswith(f"{TEACHER}.") for name in names) or self._copy_teacher(prompts)
        for number in range(last + 1):
            count = self._read_times(number) if number in blocks else 0
            if number == last or count != BLOCK:  # its end was on its way when the attempt was killed
                self.write_block(number, rows[number * BLOCK : (number + 1) * BLOCK])
        self._resume_alarms(max(update, rung))
        self._publish(PROMPTS, StripPrompts(prompts=tuple(prompts)).to_json())

    def write_block(self, number: int, rows: Sequence[Row]) -> None:
        """Write a block of rows whole."""
        first = number * BLOCK
        lines = [
            json.dumps({"n": n, "at": self.times.get(n), **{key: finite(value) for key, value in row.items()}})
            for n, row in enumerate(rows, start=first)
        ]
        self._publish(name_block(number), "".join(line + "\n" for line in lines).encode())

    def write_status(self, status: Status) -> None:
        self._publish(STATUS, status.to_json())

    def write_teacher(self, images_P: np.ndarray) -> None:
        strip = encode_strip(images_P, self.live.side)
        self._publish(f"{TEACHER}.{strip.ending}", strip.data)
        self.has_teacher = True

    def write_strip(self, kind: str, update: int, images_P: np.ndarray) -> None:
        """Write a strip; where there are too many of the student's, some go with all that belongs to their update."""
        strip = encode_strip(images_P, self.live.side)
        self._publish(f"{name_strip(kind, update)}.{strip.ending}", strip.data)
        if kind == "update":
            self._strips.add(update)
            kept = choose_kept(self._strips, every=self.live.strips_every or 1, keep=self.live.keep_strips)
            if dropped := self._strips - kept:
                for name in self._place.names():
                    if (match := OF_STRIP.fullmatch(name)) and int(match[2]) in dropped:
                        self._place.remove(name)
                self._strips = kept

    def write_alarm(self, alarm: AlarmLine) -> None:
        """Add an alarm. A resumed stage meets those after its checkpoint again."""
        known = {(each.update, each.line) for each in self.alarms}
        if (alarm.update, alarm.line) not in known:
            self.alarms.append(alarm)
        self._publish(ALARMS, Alarms(lines=tuple(self.alarms)).to_json())

    def _copy_teacher(self, prompts: Sequence[str]) -> bool:
        """Whether the stage before has a teacher's strip of these prompts, which stands here from now on."""
        if self.before is None:
            return False
        place, wanted = open_place(self.before), StripPrompts(prompts=tuple(prompts)).to_json()
        if place.read(PROMPTS) != wanted:
            return False
        for ending in ENDINGS:
            if (data := place.read(f"{TEACHER}.{ending}")) is not None:
                self._publish(f"{TEACHER}.{ending}", data)
                return True
        return False

    def _read_times(self, block: int) -> int:
        """How many rows a block has. When they came, only the attempt that wrote them knows, and now this one."""
        rows = (self._place.read(name_block(block)) or b"").splitlines()
        with suppress(ValueError, TypeError, KeyError):  # damaged: then nobody knows
            for row in map(json.loads, rows):
                if row["at"] is not None:
                    self.times.setdefault(int(row["n"]), float(row["at"]))
        return len(rows)

    def _resume_alarms(self, update: int) -> None:
        data = self._place.read(ALARMS)
        if data is None:
            return
        with suppress(ValueError):
            earlier = [each for each in Alarms.model_validate_json(data).lines if each.update <= update]
            known = {(each.update, each.line) for each in earlier}
            own = [each for each in self.alarms if each.update <= update and (each.update, each.line) not in known]
            self.alarms = [*earlier, *own]
        self._publish(ALARMS, Alarms(lines=tuple(self.alarms)).to_json())

    def _publish(self, name: str, data: bytes) -> None:
        self._place.publish(name, lambda file: file.write_bytes(data))


def finite(value: float) -> float | None:
    """A figure as strict JSON has it: null for what is not a number."""
    return value if math.isfinite(value) else None
