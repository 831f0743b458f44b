"""`dmdr watch`: a run while it goes on, in a terminal or as a page that is written again and again. It reads the store
alone, so it works from any machine, whoever runs the stages."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmdr.config.plain_text import to_line
from dmdr.errors import ConfigError, StoreError
from stages.reports.running import RunReader, RunView, StageView, build_stage_row, describe_run
from stages.reports.scorecard_text import format_table
from stages.store.runs import find_run

BARS = "▁▂▃▄▅▆▇█"
NO_NUMBER = "×"
WIDTH = 40  # letters of a sparkline
CURVES = 12  # figures that the screen has room for
FIRST = ("loss", "reward", "watch", "grad_student", "real_scale")  # figures that come first begin so
ALARMS = 5  # that the screen has room for


@dataclass(frozen=True)
class WatchOptions:
    """The options of `dmdr watch`. every: seconds between two looks. once: look once, and end."""

    store: str = "runs"
    html: str | None = None
    every: int = 5
    once: bool = False


def watch_run(run: str, options: WatchOptions) -> int:
    """Show a run until all its stages are sealed, or until Ctrl-C; returns 0.

    Raises:
        InputMissing: there is no such run.
        StoreError: the store does not answer at the first look, or the page cannot be written.
    """
    reader = RunReader(options.store, find_run(options.store, run))
    screen = Screen()
    page = None if options.html is None else check_page(options.html)
    view = reader.read()
    try:
        while True:
            if page is not None:
                from stages.reports.live_page import render_live_page  # late: the image of flows has no pillow

                write_page(page, render_live_page(view, refresh=0 if options.once else options.every))
            screen.show(render_screen(view) if page is None else [f"{describe_run(view)} Page: {page}"])
            if options.once or view.is_finished:
                return 0
            time.sleep(options.every)
            view = look_again(reader, view, screen)
    except KeyboardInterrupt:
        return 0


def look_again(reader: RunReader, before: RunView, screen: Screen) -> RunView:
    """The run as it is now; as it was, where the store does not answer for a moment."""
    try:
        return reader.read()
    except StoreError as error:
        screen.say(f"the store does not answer ({to_line(error)[:120]}); looking again")
        return before


def check_page(path: str) -> Path:
    """
    Raises:
        ConfigError: it is a folder.
    """
    page = Path(path)
    if page.is_dir():
        raise ConfigError(f"--html {path} is a folder; give the file of the page, such as {path.rstrip('/')}/live.html")
    return page


def write_page(page: Path, html: str) -> None:
    """Put a new page in place of the old one at once: a browser may load it at any time."""
    page.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=page.parent, prefix=f".{page.name}", delete=False, encoding="utf-8"
    ) as file:
        file.write(html)
    os.chmod(file.name, 0o644)
    os.replace(file.name, page)


class Screen:
    """Draws over what it drew before, on a terminal. Elsewhere it prints each screen once, if it is another one."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._drawn = 0  # lines
        self._last: Sequence[str] = ()

    def show(self, lines: Sequence[str]) -> None:
        if not self._is_terminal:
            if lines != self._last:
                print("\n".join(lines), flush=True)
            self._last = lines
            return
        size = os.get_terminal_size(sys.stderr.fileno()) if self._is_terminal else os.terminal_size((80, 24))
        shown = [line[: size.columns - 1] for line in lines[: size.lines - 1]]
        shown += [""] * (self._drawn - len(shown))  # over lines of before
        text = "\r" + "\x1b[A" * self._drawn + "".join(f"{line}\x1b[K\n" for line in shown)
        self._drawn = len(shown)
        print(text, end="", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line below what is shown, until the next look."""
        if self._is_terminal:
            print(f"{line[:100]}\x1b[K\r", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def render_screen(view: RunView) -> list[str]:
    """The run on one screen: stages, curves, alarms, cost."""
    lines = [f"{view.run} at {view.store}. {describe_run(view)}"]
    if view.cost_text:
        lines.append(f"cost so far: {view.cost_text}")
    rows = [["stage", "state", "updates", "an update", "time", "effort", "memory"]]
    for stage in view.stages:
        row = build_stage_row(stage)
        bar = "" if row.share is None else f"{draw_bar(row.share)} {row.progress}"
        rows.append([row.label, row.state, bar, row.pace, row.duration, row.effort, row.memory])
    lines += ["", *format_table(rows).splitlines()]
    curves = next((stage for stage in reversed(view.stages) if stage.rows), None)
    if curves is not None:
        lines += ["", *render_curves(curves)]
        if curves.series.strips:
            newest = curves.series.strips[-1]
            place = f"{view.store.rstrip('/')}/{view.run}/{curves.name}/{curves.reader.locate_strip(newest)}"
            lines.append(f"images after update {newest}: {place}")
    alarms = [f"{stage.label}: {to_line(alarm.line)}" for stage, alarm in view.alarms]
    if alarms:
        earlier = len(alarms) - ALARMS
        lines += ["", *([f"{earlier} earlier alarms"] if earlier > 0 else []), *alarms[-ALARMS:]]
    return lines


def render_curves(stage: StageView) -> list[str]:
    """The newest value and a sparkline of each figure, the important ones first."""
    names = dict.fromkeys(name for row in stage.rows for name in row if name != "update")
    chosen = sorted(
        names, key=lambda name: next((n for n, word in enumerate(FIRST) if name.startswith(word)), len(FIRST))
    )
    rows = [[stage.label, "last", ""]]
    for name in chosen[:CURVES]:
        values = [row[name] for row in stage.rows if name in row]
        last = values[-1]
        rows.append([name, "not a number" if last is None else f"{last:.4g}", draw_sparkline(values)])
    return format_table(rows).splitlines()


def draw_sparkline(values: Sequence[float | None], width: int = WIDTH) -> str:
    """A curve in one line: means of groups of equal size, between their least and their greatest."""
    size = math.ceil(len(values) / width) or 1
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    means = [None if None in group else math.fsum(v for v in group if v is not None) / len(group) for group in groups]
    known = [mean for mean in means if mean is not None and math.isfinite(mean)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def draw(mean: float | None) -> str:
        if mean is None or not math.isfinite(mean):
            return NO_NUMBER
        return BARS[3] if high == low else BARS[min(7, int(8 * (mean - low) / (high - low)))]

    return "".join(map(draw, means))


def draw_bar(percent: float, width: int = 16) -> str:
    """How much is done."""
    full = round(width * min(100.0, percent) / 100)
    return "█" * full + "░" * (width - full)
