"""Show the progress of a stage: a bar on a terminal; in a log a line at most every ten seconds, and one at the end."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from dmdr.config.plain_text import to_line
from stages.runtime.progress_line import ProgressLine

EVERY = 10.0  # seconds between two lines of a log


class Progress:
    """Writes to stderr, because stdout is for results.

    shown: False for all ranks but one, which then write nothing. place: of the stage in the run, "stage 2 of 5".
    """

    def __init__(self, stage: str, *, shown: bool = True, place: str | None = None) -> None:
        self.stage, self.shown, self.place = stage, shown, place
        self._bar: tqdm | None = None
        self._later: float | None = None
        # steps done, and the time then: a resumed stage does not begin at 0, and a first step takes longer than others
        self._first: tuple[int, float] | None = None
        self._done = 0
        self._last_line = time.monotonic()

    def expect(self, later: float) -> None:
        """Tell how much work follows this stage, in steps of this stage; then the time left for all of it is shown."""
        self._later = later

    def update(self, done: int, total: int, **figures: float) -> None:
        """Show that `done` of `total` steps are done, with the figures beside them."""
        if not self.shown:
            return
        texts = {name: f"{value:.4g}" for name, value in figures.items()}
        now = time.monotonic()
        if self._first is None or done < self._done:  # a stage that its watch takes back begins to count again
            self._first = (done, now)
        self._done = done
        steps = done - self._first[0]
        pace = (now - self._first[1]) / steps if steps else None  # seconds a step
        whole = [] if self.place is None else [self.place]
        if pace is not None and self._later is not None:
            whole.append(f"{format_seconds((total - done + self._later) * pace)} left for the run")
        if sys.stderr.isatty():
            self._draw(done, total, texts, ", ".join(whole))
        elif now - self._last_line >= EVERY or done >= total:
            self._last_line = now
            words = [f"{name} {value}" for name, value in texts.items()]
            if pace is not None and done < total:
                words.append(f"{format_seconds((total - done) * pace)} left")
            line = ProgressLine(self.stage, done, total, ", ".join(words + whole))
            print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line at once, above the bar if there is one."""
        if self.shown:
            tqdm.write(f"{self.stage}: {to_line(line)}", file=sys.stderr)
            sys.stderr.flush()

    def _draw(self, done: int, total: int, figures: dict[str, str], whole: str) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, desc=self.stage, dynamic_ncols=True, file=sys.stderr)
        self._bar.total = total
        words = [f"{name} {value}" for name, value in figures.items()] + ([whole] if whole else [])
        self._bar.set_postfix_str(", ".join(words), refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None


def format_seconds(seconds: float) -> str:
    """A duration as people say it: "40 s", "4 min", "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
