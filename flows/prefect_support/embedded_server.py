"""Prefect's embedded server, protected from the terminal's Ctrl-C.

A terminal sends SIGINT to every process of its foreground group. If the server ends with it, the flow, which still
waits for its stage's checkpoint, has nobody to report to, and Prefect prints a long complaint.
"""

from __future__ import annotations

import signal
import subprocess

from dmdr.errors import ConfigError


def prepare_server() -> None:
    """Make the server that Prefect starts for this process block SIGINT. It still gets SIGTERM, which is how Prefect
    ends it.

    Raises:
        ConfigError: a package that the server needs is not installed.
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
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits the blocked signals
            try:
                return super()._run_uvicorn_command()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    EmbeddedServer()  # Prefect keeps the first instance and uses it from then on
