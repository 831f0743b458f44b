"""Show the progress of a stage: a bar on a terminal; in a log a line at most every ten seconds, and one at the end."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines of a log


class Progress:
    """Writes to stderr, because stdout is for results. shown: False for all ranks but one, which then write nothing."""

    def __init__(self, stage: str, *, shown: bool = True) -> None:
        self.stage, self.shown = stage, shown
        self._bar: tqdm | None = None
        self._first: tuple[int, float] | None = (
            None  # steps done, and the time then: a resumed stage does not begin at 0
        )
        self._last_line = time.monotonic()

    def update(self, done: int, total: int, **figures: float) -> None:
        """Show that `done` of `total` steps are done, with the figures beside them."""
        if not self.shown:
            return
        texts = {name: f"{value:.4g}" for name, value in figures.items()}
        if sys.stderr.isatty():
            self._draw(done, total, texts)
            return
        now = time.monotonic()
        self._first = self._first or (done, now)
        if now - self._last_line >= EVERY or done >= total:
            self._last_line = now
            words = [f"{self.stage} {done:,}/{total:,}", *(f"{name} {value}" for name, value in texts.items())]
            steps, seconds = done - self._first[0], now - self._first[1]
            if steps and done < total:
                words.append(f"{(total - done) * seconds / steps:.0f} s left")
            print(", ".join(words), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line at once, above the bar if there is one."""
        if self.shown:
            tqdm.write(f"{self.stage}: {line}", file=sys.stderr)
            sys.stderr.flush()

    def _draw(self, done: int, total: int, figures: dict[str, str]) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, desc=self.stage, dynamic_ncols=True, file=sys.stderr)
        self._bar.total = total
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None
