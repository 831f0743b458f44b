"""Prefect's embedded server, out of reach of the terminal's Ctrl-C.

A terminal sends SIGINT to every process of its foreground group. A server that ends with it leaves the flow, which
still waits for its stage's checkpoint, with nobody to report to, and Prefect says so at length.
"""

from __future__ import annotations

import signal
import subprocess

from prefect.server.api.server import SubprocessASGIServer


class EmbeddedServer(SubprocessASGIServer):
    """Prefect's own, which blocks SIGINT; the flow's process ends it with SIGTERM as ever.

    Prefect keeps one such server a process, whose later starts do nothing: the first one made is the one it uses.
    """

    def _run_uvicorn_command(self) -> subprocess.Popen[bytes]:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits what is blocked
        try:
            return super()._run_uvicorn_command()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
