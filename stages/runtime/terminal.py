"""stdout and stderr of our programs: what is written there moves no cursor and hides nothing.

1. Control characters are made visible, except those with which progress is drawn on stderr.
2. A reader that goes away (`dmdr runs | head -1`) ends no work: the rest is not printed, and the exit code tells how
   the work ended.
3. What the encoding of a terminal lacks is written as an escape.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TextIO

from dmdr.config.plain_text import escape

PROGRESS = re.compile(r"(\r|\x1b\[[KA])")  # back to the start of the line; erase to its end; one line up


class PlainStream(io.TextIOBase):
    """A stream that passes text on without control characters. draws: keeps those that draw progress."""

    def __init__(self, stream: TextIO, *, draws: bool) -> None:
        self._stream, self._draws = stream, draws
        self._is_read = True  # whether anybody still reads it

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        if self._is_read:
            with self._notice_end():
                self._stream.write(self._clean(text))
        return len(text)

    def flush(self) -> None:
        if self._is_read:
            with self._notice_end():
                self._stream.flush()

    def finish(self) -> None:
        """Write out what is left. What cannot be written is dropped: Python would complain of it at its end."""
        try:
            self.flush()
        except OSError:
            drop_output(self._stream)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def _clean(self, text: str) -> str:
        parts = PROGRESS.split(text) if self._draws else [text]
        cleaned = "".join(part if self._draws and PROGRESS.fullmatch(part) else escape(part) for part in parts)
        return cleaned.encode(self.encoding, "backslashreplace").decode(self.encoding)

    @contextmanager
    def _notice_end(self) -> Iterator[None]:
        """Drop what follows once nobody reads any more; Python would complain when it flushes at the end."""
        try:
            yield
        except BrokenPipeError:
            self._is_read = False
            drop_output(self._stream)


def drop_output(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere."""
    with suppress(OSError, ValueError):  # a stream that is no file, or is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def plain_streams() -> Iterator[None]:
    """stdout and stderr are plain as long as the context lasts."""
    out, err = PlainStream(sys.stdout, draws=False), PlainStream(sys.stderr, draws=True)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            for stream in (out, err):
                stream.finish()
