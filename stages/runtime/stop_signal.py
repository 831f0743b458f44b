"""Whether this process was told to stop. The handler only raises a flag, which a stage reads after each step.

Nothing is installed on import. `python -m stages` installs the handler before it imports anything heavy: the kernel
drops a signal to process 1 of a container that has no handler for it.
"""

from __future__ import annotations

import signal
from types import FrameType

received: list[int] = []  # grows with each signal


def install() -> None:
    """Catch SIGTERM and SIGINT from now on."""
    signal.signal(signal.SIGTERM, _remember)
    signal.signal(signal.SIGINT, _remember)


def is_set() -> bool:
    return bool(received)


def _remember(number: int, frame: FrameType | None) -> None:
    """A second Ctrl-C ends the process at once. A second SIGTERM does not: the kernel may send more than one when the
    flow dies, and the checkpoint must not be lost."""
    received.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
