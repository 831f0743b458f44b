"""A real Prefect server, and clients of it, for the tests."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.support import program

ROOT = Path(__file__).parents[2]
STARTUP = 300  # seconds; a server migrates its database first


def started(*arguments: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "prefect", *arguments]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)


def prefect(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Prefect's command line to its end, in a fork of an interpreter that has Prefect already."""
    done = program.run("from prefect.cli import app; app()", *arguments, environment=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def server_environment(home: Path, **more: str) -> tuple[str, dict[str, str]]:
    """A free port, and the environment of a server that listens there and of all that talk to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PWD": str(ROOT),
    }
    return port, os.environ | own | more


def answers(url: str) -> None:
    """Wait until a URL answers, for at most STARTUP seconds."""
    deadline = time.monotonic() + STARTUP
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.3)


def asked(environment: dict[str, str], path: str, body: dict | None = None, method: str = "POST"):
    """The answer of Prefect's API; None for a body: GET. As Prefect's own client does, a request that meets a locked
    SQLite database (503) is made again."""
    data = None if body is None else json.dumps(body).encode()
    verb = "GET" if body is None else method
    headers, url = {"Content-Type": "application/json"}, f"{environment['PREFECT_API_URL']}{path}"
    deadline = time.monotonic() + STARTUP
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=verb), timeout=60) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as refused:
            if refused.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(1)


def copy_database(home: Path, shared: Path) -> None:
    """Give a server its database with all tables: migrated once in a folder that the workers of pytest share."""
    database = shared / "prefect.db"
    with (shared / "prefect.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            scratch = shared / "prefect-migrated"
            scratch.mkdir(exist_ok=True)
            environment = server_environment(scratch)[1]
            del environment["PREFECT_API_URL"]
            prefect("server", "database", "upgrade", "--yes", environment=environment)
            with closing(sqlite3.connect(scratch / "prefect.db")) as migrated:
                migrated.execute("VACUUM INTO ?", (str(scratch / "whole.db"),))  # with what lies in its log beside it
            (scratch / "whole.db").rename(database)
    shutil.copyfile(database, home / "prefect.db")


@contextmanager
def server_alone(home: Path) -> Iterator[dict[str, str]]:
    """A server on SQLite with the work pool `local`, no deployment and no worker; its clients' environment.

    home: where its database may lie already.
    """
    port, environment = server_environment(home, PYTHONPATH=str(ROOT), PREFECT_DEFAULT_WORK_POOL_NAME="local")
    process = started("server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui", environment=environment)
    try:
        answers(f"{environment['PREFECT_API_URL']}/health")
        asked(environment, "/work_pools/", {"name": "local", "type": "process"})
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
