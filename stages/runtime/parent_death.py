"""End with the process that started us: the kernel sends a signal when that process dies. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """A function that a child runs before exec, so that the kernel sends it signal `number` when this process dies.

    libc is loaded here, before the fork, because nothing may take a lock after the fork.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def set_signal() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before the kernel was told
            os.kill(os.getpid(), number)

    return set_signal
