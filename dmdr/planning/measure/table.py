"""The lines of a measurement. Each is written to files at once, so that a run that is cut off still says something."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

Figures = dict[str, float | str]


@dataclass(frozen=True)
class Line:
    """What was measured, and its figures by name. failed: whether it shows a mistake. note: why it has no figures."""

    name: str
    figures: Figures = field(default_factory=dict)
    failed: bool = False
    note: str = ""

    def format(self) -> str:
        figures = [f"{key} {format_figure(value)}" for key, value in self.figures.items()]
        words = [*(["FAILED"] if self.failed else []), *figures, *([self.note] if self.note else [])]
        return f"{self.name}: {', '.join(words)}"


def format_figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


class Table:
    """Lines as text on stdout and in OUT/measure.txt, and as line, figure, value in OUT/measure.csv."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.text, self.csv = out / "measure.txt", out / "measure.csv"
        self.text.write_text("", encoding="utf-8")
        self.csv.write_text("line,figure,value\n", encoding="utf-8")
        self.lines: list[Line] = []

    def add(self, line: Line) -> None:
        self.lines.append(line)
        print(line.format(), flush=True)
        with self.text.open("a", encoding="utf-8") as text:
            text.write(line.format() + "\n")
        with self.csv.open("a", encoding="utf-8", newline="") as file:
            cells = [*line.figures.items(), *([("note", line.note)] if line.note else [])]
            csv.writer(file).writerows([line.name, key, value] for key, value in cells)
