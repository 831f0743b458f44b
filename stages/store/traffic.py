"""Counts the bytes that this process has moved from and to remote stores."""

from __future__ import annotations

from threading import Lock


class Traffic:
    """Bytes of the contents of objects; requests and listings are not counted."""

    def __init__(self) -> None:
        self.read, self.written = 0, 0
        self._lock = Lock()  # parts of a file are moved at the same time

    def count(self, *, read: int = 0, written: int = 0) -> None:
        with self._lock:
            self.read += read
            self.written += written


TRAFFIC = Traffic()
