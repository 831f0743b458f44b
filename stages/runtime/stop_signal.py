"""Remember SIGTERM and SIGINT as a flag, which a stage reads after each step.

Importing this file installs nothing. `python -m stages` installs the handler before it imports anything heavy: the
kernel drops a signal to process 1 of a container if that process has no handler for it.
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
    """Whether a signal to stop has arrived."""
    return bool(received)


def _remember(number: int, frame: FrameType | None) -> None:
    """Record the signal. A second Ctrl-C ends the process at once. A second SIGTERM does not, because the kernel may
    send several when the flow dies, and the checkpoint must not be lost.
    """
    received.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
