"""The line of a log that tells how far a stage is: how it is written, and how it is read again."""

from __future__ import annotations

import re
from dataclasses import dataclass

LINE = re.compile(r"(?:^|: )(?P<stage>[a-z_]+) (?P<done>[\d,]+)/(?P<total>[\d,]+)(?:, (?P<words>.*))?$")


@dataclass(frozen=True)
class ProgressLine:
    """done, total: steps of the stage. words: what follows, such as losses and the time left."""

    stage: str
    done: int
    total: int
    words: str

    def __str__(self) -> str:
        return ", ".join(filter(None, (f"{self.stage} {self.done:,}/{self.total:,}", self.words)))


def read_line(line: str) -> ProgressLine | None:
    """Read a line of a stage's log, perhaps with a node's name before it; None if it tells no progress."""
    match = LINE.search(line)
    if match is None:
        return None
    done, total = (int(match[name].replace(",", "")) for name in ("done", "total"))
    return ProgressLine(match["stage"], done, total, match["words"] or "")
