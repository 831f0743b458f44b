"""End with the process that started us: the kernel sends SIGTERM when that process dies. Linux only."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> Callable[[], None] | None:
    """A function that a child runs before exec, so that the kernel sends it SIGTERM when this process dies.

    libc is loaded here, before the fork, because nothing may take a lock after the fork.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
