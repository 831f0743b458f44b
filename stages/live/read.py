"""Reads live/ of a stage from any machine that reads the store, again and again while the stage runs. No torch.

What it reads may be changed or removed meanwhile, and anybody may have written to a store: a file that is missing or
damaged is left out.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from stages.live.images import StripFile, split_strip
from stages.live.layout import (
    ALARMS,
    OF_ROWS,
    OF_STRIP,
    PROMPTS,
    STATUS,
    STUDENT,
    TEACHER,
    AlarmLine,
    Alarms,
    Status,
    StripPrompts,
    name_strip,
)
from stages.store.address import open_place
from stages.store.layout import LIVE
from stages.store.records import Document, parse_json

DocumentT = TypeVar("DocumentT", bound=Document)
BESIDE = ("n", "at")  # what a line has besides its metrics row
MOST_PROMPTS = 64  # of a strip that is shown

Row = dict[str, float | None]


@dataclass(frozen=True)
class Series:
    """What live/ tells of a stage. rows: its metrics rows by number, each once. strips: updates that have a strip.

    prompts: whose images a strip shows. has_teacher: whether the teacher's strip is there.
    """

    status: Status | None = None
    rows: tuple[Row, ...] = ()
    alarms: tuple[AlarmLine, ...] = ()
    strips: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    has_teacher: bool = False


class LiveReader:
    """Reads live/ of one stage. Blocks of rows and strips that change no more, unless the stage goes back, are read
    once."""

    def __init__(self, store: str, run: str, stage: str) -> None:
        self.stage = stage
        self._place = open_place(f"{store.rstrip('/')}/{run}/{stage}/{LIVE}")
        self._blocks: dict[int, list[Row]] = {}
        self._names: dict[tuple[str, int], str] = {}  # (kind, update) -> the file of a strip
        self._teacher = ""
        self._strips: dict[str, list[np.ndarray]] = {}
        self._prompts: tuple[str, ...] = ()
        self._recoveries = 0  # of the stage, when it was last read

    def read(self) -> Series:
        """What is there now.

        Raises:
            StoreError, ConfigError, InputMissing: the store does not answer.
        """
        names = self._place.names()
        status = self._read_document(STATUS, Status) if STATUS in names else None
        if status is not None and status.recoveries != self._recoveries:  # the stage went back, and writes them again
            self._recoveries = status.recoveries
            self._blocks, self._strips = {}, {}
        self._names = {
            (match[1], int(match[2])): name for name in names if (match := OF_STRIP.fullmatch(name)) is not None
        }
        self._teacher = next((name for name in names if name.startswith(f"{TEACHER}.")), "")
        prompts = self._read_document(PROMPTS, StripPrompts) if self._names or self._teacher else None
        self._prompts = () if prompts is None else prompts.prompts[:MOST_PROMPTS]
        alarms = self._read_document(ALARMS, Alarms) if ALARMS in names else None
        return Series(
            status=status,
            rows=self._read_rows(names),
            alarms=() if alarms is None else alarms.lines,
            strips=tuple(sorted(update for kind, update in self._names if kind == STUDENT)),
            prompts=self._prompts,
            has_teacher=bool(self._teacher),
        )

    def read_strip(self, update: int, kind: str = STUDENT) -> list[np.ndarray]:
        """The images (H, W, 3) uint8 that the student's EMA drew after an update; empty if they are gone.

        kind: of the images; `real` and `fake` are those of the scores.
        """
        return self._read_images(self._names.get((kind, update), ""), keep=kind == STUDENT)

    def read_teacher(self) -> list[np.ndarray]:
        """The images that the teacher drew; empty where it has not."""
        return self._read_images(self._teacher, keep=True)

    def read_strip_file(self, update: int) -> StripFile | None:
        """The picture file of a strip of the student as it is stored; None if it is gone."""
        return self._read_file(self._names.get((STUDENT, update), ""))

    def read_teacher_file(self) -> StripFile | None:
        """The same of the teacher."""
        return self._read_file(self._teacher)

    def _read_file(self, name: str) -> StripFile | None:
        data = self._place.read(name) if name else None
        return None if data is None else StripFile(data, name.rpartition(".")[2])

    def locate_strip(self, update: int) -> str:
        """The address of a strip's picture file, for a person."""
        return f"{LIVE}/{self._names.get((STUDENT, update), name_strip(STUDENT, update))}"

    def _read_images(self, name: str, *, keep: bool) -> list[np.ndarray]:
        if not name or not self._prompts:
            return []
        if name not in self._strips:
            data, images = self._place.read(name), []
            with suppress(ValueError):
                images = [] if data is None else split_strip(data, len(self._prompts))
            if not images or not keep:
                return images
            self._strips[name] = images
        return self._strips[name]

    def _read_rows(self, names: list[str]) -> tuple[Row, ...]:
        """The rows in their order. The last block grows, and a resumed stage replaces it."""
        blocks = {int(match[1]): name for name in names if (match := OF_ROWS.fullmatch(name)) is not None}
        last = max(blocks, default=0)
        self._blocks = {number: rows for number, rows in self._blocks.items() if number in blocks and number < last}
        for number, name in blocks.items():
            if number not in self._blocks:
                self._blocks[number] = parse_rows(self._place.read(name) or b"")
        rows = {
            int(row["n"] or 0): {name: value for name, value in row.items() if name not in BESIDE}
            for block in self._blocks.values()
            for row in block
        }
        return tuple(rows[n] for n in sorted(rows))

    def _read_document(self, name: str, kind: type[DocumentT]) -> DocumentT | None:
        data = self._place.read(name)
        with suppress(ValueError):
            if data is not None and isinstance(parse_json(data), dict):
                return kind.model_validate_json(data)  # which makes tuples of lists
        return None


def parse_rows(data: bytes) -> list[Row]:
    """The rows of a block; a line that is none is left out."""
    rows = []
    for line in data.splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("n")) is int and type(row.get("update")) is int:
                rows.append({str(key): value for key, value in row.items() if _is_figure(value)})
    return rows


def _is_figure(value: object) -> bool:
    return value is None or type(value) in (int, float)
