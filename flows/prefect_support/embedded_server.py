"""Prefect's embedded server, out of reach of the terminal's Ctrl-C.

A terminal sends SIGINT to every process of its foreground group. A server that ends with it leaves the flow, which
still waits for its stage's checkpoint, with nobody to report to, and Prefect says so at length.
"""

from __future__ import annotations

import signal
import subprocess

from dmdr.errors import ConfigError


def prepare_server() -> None:
    """Let the server that Prefect starts for this process block SIGINT. SIGTERM, with which Prefect ends it, it gets.

    Raises:
        ConfigError: what a server needs is not installed.
    """
    try:
        from prefect.server.api.server import SubprocessASGIServer
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"Prefect's server cannot run here, {missing.name} is not installed (the image dmdr-flow has no server); "
            "set PREFECT_API_URL to the address of one that runs"
        ) from None

    class EmbeddedServer(SubprocessASGIServer):
        def _run_uvicorn_command(self) -> subprocess.Popen[bytes]:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits what is blocked
            try:
                return super()._run_uvicorn_command()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    EmbeddedServer()  # Prefect keeps the first that is made, for all that ask for one
